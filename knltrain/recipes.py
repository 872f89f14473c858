"""Named recipes: functions that return a configuration, each with its source in the docstring.

Sources are cited by the keys of ``SOURCES``. Warm-ups that a source gives in iterations are turned into epochs of
1,281,167 images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from knltrain.config import AugmentConfig, OptimConfig, RunConfig, ScheduleConfig
from knltrain.errors import ConfigError

IMAGENET_IMAGES = 1_281_167

SOURCES = {
    "ICLR": "Large Batch Training of Convolutional Networks with Layer-wise Adaptive Rate Scaling, submission to ICLR "
    "2018 by the authors of LARS, close to arXiv 1708.03888; the number is that of the table",
    "Paper": "100-epoch ImageNet Training with AlexNet in 24 Minutes, arXiv 1709.05011; its abstracts",
    "Intel": "solvers in intel/caffe at 44d5363, models/intel_optimized_models/multinode",
    "NVCaffe": "solvers of the first author of LARS in borisgin/nvcaffe-0.16 at 8896d33, models/",
    "Goyal": "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, arXiv 1706.02677",
    "FFCV": "configurations rn50_*_epochs.yaml and train_imagenet.py in libffcv/ffcv-imagenet at 5bab20e and 606c584, "
    "accuracies of its README at 4dd291a",
    "LAMB": "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv 1904.00962",
    "Codreanu": "Codreanu, Podareanu and Saletore 2017, Scale out for large minibatch SGD: Residual network training "
    "on ImageNet-1K with improved accuracy and reduced time to train",
    "MLPerf": "reference convergence points in mlcommons/logging at 7bbf792, training_3.1.0/rcps_resnet.json",
    "NUS": "NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch at a8222c6, by the group of [Paper]'s first author",
    "He": "Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2",
}

# By the batch: the optimizer and the learning rate over time of a method.
Method = Callable[[int], tuple[OptimConfig, ScheduleConfig]]


@dataclass(frozen=True)
class Recipe:
    """A configuration with a name, and what is known of the accuracy it reaches.

    Attributes:
        published: top-1 that a source reports for these numbers, with the source.
        measured: what this project itself has run, with the file that shows it, or "not run".
        methods: other optimizers for the same training, by name.
    """

    name: str
    build: Callable[[], RunConfig]
    published: str
    measured: str
    methods: Mapping[str, Method]

    def config(self) -> RunConfig:
        """The recipe's configuration, carrying the recipe's name."""
        return replace(self.build(), recipe=self.name)


RECIPES: dict[str, Recipe] = {}


def recipe(
    *, published: str, measured: str = "not run", methods: Mapping[str, Method] = MappingProxyType({})
) -> Callable[[Callable[[], RunConfig]], Callable[[], RunConfig]]:
    """Registers the decorated function under its name, with dashes for underscores."""

    def register(build: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
        name = build.__name__.replace("_", "-")
        RECIPES[name] = Recipe(name, build, published, measured, methods)
        return build

    return register


def at_batch(name: str, optimizer: str, batch: int) -> RunConfig:
    """A recipe at another batch, by its own optimizer or by another method's rule; all else stays.

    By its own optimizer, the recipe's learning rate grows with the batch as :func:`scaled` has it, its warm-up takes
    as many epochs as it did, and batches that a run begins with grow alike.

    Args:
        name: a key of ``RECIPES``.
        optimizer: its own, or one of its ``methods``.
        batch: images a step.

    Raises:
        ConfigError: there is no rule for this optimizer.
    """
    recipe, config = RECIPES[name], RECIPES[name].config()
    if optimizer == config.optim.name:
        optim, schedule = scaled(config.optim, config.global_batch, batch), config.schedule
    elif optimizer in recipe.methods:
        optim, schedule = recipe.methods[optimizer](batch)
    else:
        there = ", ".join(dict.fromkeys((config.optim.name, *recipe.methods)))
        raise ConfigError(f"{name} has no rule for the optimizer {optimizer!r}; it has one for {there}")
    smaller = tuple(max(1, round(before * batch / config.global_batch)) for before in schedule.batches)
    return replace(config, global_batch=batch, optim=optim, schedule=replace(schedule, batches=smaller))


def scaled(optim: OptimConfig, before: int, after: int) -> OptimConfig:
    """An optimizer at another batch: the rate of SGD grows with it [Goyal], that of others with its root [NUS]."""
    if optim.lr_scaling == "linear":
        return optim
    ratio = after / before
    return replace(optim, lr=optim.lr * (ratio if optim.name == "sgd" else math.sqrt(ratio)))


def _warmup_epochs(iterations: int, batch: int) -> float:
    return iterations * batch / IMAGENET_IMAGES


# --- AlexNet ----------------------------------------------------------------------------------------------------------


def _alexnet(model: str, batch: int, lr: float, *, warmup_epochs: float, warmup_lr: float) -> RunConfig:
    """What the AlexNet experiments of [ICLR] share: LARS, eta 0.001, poly 2 from step 0, 100 epochs, 227 pixels.

    Everything decays, biases too, as the published algorithm has it; Caffe's own network files exempt biases
    (decay_mult 0).
    """
    return RunConfig(
        model=model,
        image_size=227,
        epochs=100,
        global_batch=batch,
        local_batch=512,
        optim=OptimConfig(name="lars", variant="paper", lr=lr, momentum=0.9, weight_decay=5e-4),
        schedule=ScheduleConfig(name="poly", power=2, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr),
        augment=AugmentConfig(name="crop-flip", resize=256),
    )


@recipe(published="58.7 [ICLR 3]")
def alexnet_512() -> RunConfig:
    """AlexNet at 512: LR 2, 2 epochs of warm-up [ICLR]. The start of the ramp is not given; 0 is used."""
    return _alexnet("alexnet", 512, 2, warmup_epochs=2, warmup_lr=0)


@recipe(published="58.5 [ICLR 3]")
def alexnet_4k() -> RunConfig:
    """AlexNet at 4,096: LR 10, 2 epochs of warm-up [ICLR]. The start of the ramp is not given; 0 is used."""
    return _alexnet("alexnet", 4096, 10, warmup_epochs=2, warmup_lr=0)


@recipe(published="58.2 [ICLR 3]")
def alexnet_8k() -> RunConfig:
    """AlexNet at 8,192: LR 10, ramp of 600 iterations from LR 1 [NVCaffe, bvlc_alexnet/solver_8K]."""
    return _alexnet("alexnet", 8192, 10, warmup_epochs=_warmup_epochs(600, 8192), warmup_lr=1)


def _alexnet_bn_sgd(batch: int) -> tuple[OptimConfig, ScheduleConfig]:
    """LR 0.08 at 512, decay 5e-4, poly 2 [NVCaffe, alexnet_bn/solver], by linear scaling with 5 epochs of warm-up."""
    optim = OptimConfig(name="sgd", variant="heavy-ball", lr=0.04, lr_scaling="linear", weight_decay=5e-4)
    return optim, ScheduleConfig(name="poly", power=2, warmup_epochs=5 if batch > 512 else 0)


_ALEXNET_BN: Mapping[str, Method] = {"sgd": _alexnet_bn_sgd}


@recipe(published="60.2 [ICLR 3]", methods=_ALEXNET_BN)
def alexnet_bn_512() -> RunConfig:
    """AlexNet-BN at 512: LR 2, 5 epochs of warm-up [ICLR]. The start of the ramp is not given; 0 is used."""
    return _alexnet("alexnet_bn", 512, 2, warmup_epochs=5, warmup_lr=0)


@recipe(published="60.1 [ICLR 3]", methods=_ALEXNET_BN)
def alexnet_bn_8k() -> RunConfig:
    """AlexNet-BN at 8,192: LR 14 [ICLR], ramp of 600 iterations from LR 1 [NVCaffe, alexnet_bn/solver_8K].

    That solver's LR is 10.
    """
    return _alexnet("alexnet_bn", 8192, 14, warmup_epochs=_warmup_epochs(600, 8192), warmup_lr=1)


@recipe(published="59.3 [ICLR 3]", methods=_ALEXNET_BN)
def alexnet_bn_16k() -> RunConfig:
    """AlexNet-BN at 16,384: LR 23 [ICLR], ramp of 400 iterations from LR 1 [NVCaffe, alexnet_bn/solver_16k].

    That solver's LR is 24; [ICLR] finds the same accuracy for any LR between 13 and 22.
    """
    return _alexnet("alexnet_bn", 16384, 23, warmup_epochs=_warmup_epochs(400, 16384), warmup_lr=1)


@recipe(published="57.8 at LR 22 [ICLR 3]", methods=_ALEXNET_BN)
def alexnet_bn_32k() -> RunConfig:
    """AlexNet-BN at 32,768: LR 32, ramp of 400 iterations from LR 1 [Intel, alexnet_bn_64nodes].

    The solver that was released, for 64 nodes of 512 images; no accuracy was published with it. Its 4,000 iterations
    are called 100 epochs there; 100 epochs of 1,281,167 images are 3,910.
    """
    return _alexnet("alexnet_bn", 32768, 32, warmup_epochs=_warmup_epochs(400, 32768), warmup_lr=1)


# --- ResNet-50 --------------------------------------------------------------------------------------------------------


def _resnet50(batch: int, lr: float, *, warmup_epochs: float, epochs: float = 100) -> RunConfig:
    """What the ResNet-50 experiments of [ICLR] table 4, "max aug", share: LARS, decay 5e-4, poly 2."""
    return RunConfig(
        model="resnet50",
        image_size=224,
        epochs=epochs,
        global_batch=batch,
        local_batch=32,
        zero_init_residual=True,
        optim=OptimConfig(name="lars", variant="paper", lr=lr, momentum=0.9, weight_decay=5e-4),
        schedule=ScheduleConfig(name="poly", power=2, warmup_epochs=warmup_epochs),
        augment=AugmentConfig(name="rrc", resize=256),
    )


def _goyal(batch: int) -> RunConfig:
    """[Goyal]: LR 0.1 per 256 images, ÷10 at epochs 30, 60, 80, decay 1e-4 not on batch norm, 32 images a worker."""
    return RunConfig(
        model="resnet50",
        image_size=224,
        epochs=90,
        global_batch=batch,
        local_batch=32,
        zero_init_residual=True,
        optim=OptimConfig(
            name="sgd",
            variant="nesterov",
            lr=0.1,
            lr_scaling="linear",
            momentum=0.9,
            weight_decay=1e-4,
            decay_on="not-norm",
        ),
        schedule=ScheduleConfig(
            name="step", milestones=(30, 60, 80), gamma=0.1, warmup_epochs=5 if batch > 256 else 0, warmup_lr=0.1
        ),
        augment=AugmentConfig(name="rrc", resize=256),
    )


def _resnet50_sgd(batch: int) -> tuple[OptimConfig, ScheduleConfig]:
    config = _goyal(batch)
    return config.optim, config.schedule


def _resnet50_lars(batch: int) -> tuple[OptimConfig, ScheduleConfig]:
    config = resnet50_32k_mlperf()
    return scaled(config.optim, config.global_batch, batch), config.schedule


# [Goyal], and the numbers of ``resnet50-32k-mlperf`` with the root of the batch [NUS].
_RESNET50: Mapping[str, Method] = {"sgd": _resnet50_sgd, "lars": _resnet50_lars}


@recipe(published="76.40 ± 0.12 [Goyal]", methods=_RESNET50)
def resnet50_256() -> RunConfig:
    """ResNet-50 at 256: the small-batch baseline that large batches are held against [Goyal]."""
    return _goyal(256)


@recipe(published="75.2 [ICLR 4]", methods=_RESNET50)
def resnet50_8k() -> RunConfig:
    """ResNet-50 at 8,192 with LARS: LR 30, 5 epochs of warm-up, 100 epochs [ICLR]."""
    return _resnet50(8192, 30, warmup_epochs=5)


@recipe(published="76.26 ± 0.09 [Goyal]", methods=_RESNET50)
def resnet50_8k_goyal() -> RunConfig:
    """ResNet-50 at 8,192 by linear scaling, gradual warm-up from 0.1 over 5 epochs [Goyal]."""
    return _goyal(8192)


@recipe(published="74.4 [ICLR 4]", methods=_RESNET50)
def resnet50_16k() -> RunConfig:
    """ResNet-50 at 16,384 with LARS: LR 33, 12 epochs of warm-up, 100 epochs [ICLR]."""
    return _resnet50(16384, 33, warmup_epochs=12)


@recipe(published="72.5 in 100 epochs [ICLR 4]", methods=_RESNET50)
def resnet50_32k() -> RunConfig:
    """ResNet-50 at 32,768 with LARS in 90 epochs: LR 40, 12 epochs of warm-up [ICLR].

    [Paper] runs 90 epochs and claims no loss of accuracy (75.4), but no text read gives its learning rate; these are
    the numbers that its first author published for this batch in the same months. ``resnet50-32k-mlperf`` is what
    to use for accuracy.
    """
    return _resnet50(32768, 40, warmup_epochs=12, epochs=90)


@recipe(published="74.9, LR not given [Paper]", methods=_RESNET50)
def resnet50_32k_64ep() -> RunConfig:
    """ResNet-50 at 32,768 in 64 epochs [Paper, last abstract]; the other numbers are those of ``resnet50-32k``."""
    return _resnet50(32768, 40, warmup_epochs=12, epochs=64)


@recipe(published="75.9 in 56 epochs [MLPerf]", methods=_RESNET50)
def resnet50_32k_mlperf() -> RunConfig:
    """ResNet-50 at 32,768 as the reference converges: LR 21.2, warm-up 16, momentum 0.94, decay 2.5e-5 [MLPerf].

    Batch norm and biases are neither adapted nor decayed; batch-norm span 128; label smoothing 0.1; the decay ends
    at 1e-4. The 2,267 decay steps are read as the whole run (58 epochs), which fits the 56.0 epochs that the
    reference needs on average to reach the target.
    """
    base = _resnet50(32768, 21.2, warmup_epochs=16, epochs=58)
    return replace(
        base,
        local_batch=128,
        label_smoothing=0.1,
        optim=replace(base.optim, variant="mlperf", momentum=0.94, weight_decay=2.5e-5),
        schedule=replace(base.schedule, name="poly-after-warmup", end_lr=1e-4),
    )


@recipe(published="76.75 [NUS]")
def resnet50_32k_nus() -> RunConfig:
    """ResNet-50 at 32,768 in 90 epochs: LR 32, 14 epochs of warm-up, decay 1e-4, no epsilon [NUS].

    Of these numbers the same source has the best curve over batches that is verified: 77.02 at 512, 76.96 at 16,384.
    Not in what was read of it: the shape of the decay (poly 2 here) and label smoothing (none here). Batch norm and
    biases are neither adapted nor decayed, which is an option there. Its LARS keeps the learning rate outside the
    momentum buffer and multiplies the whole buffer by the newest trust ratio; ours has both inside, as published.
    """
    base = _resnet50(32768, 32, warmup_epochs=14, epochs=90)
    return replace(base, optim=replace(base.optim, variant="mlperf", weight_decay=1e-4))


def _ffcv(epochs: float, resized: float) -> RunConfig:
    """ResNet-50 in a budget of epochs, small images first [FFCV].

    SGD, LR 1.7 at 8 x 512 images, which rises from 1e-4 of it over 2 epochs and falls to 0 in a straight line; decay
    1e-4, not on batch norm; label smoothing 0.1; 160 pixels, then 192; evaluated at 256, cut out of 256 x 256/224. The
    source interpolates the size by epochs in multiples of 32; ``resized`` is the first epoch that comes out as 192. It
    has blur pooling besides, averages over both flips when it evaluates, and normalises over 512 images, 64 here.
    """
    return RunConfig(
        model="resnet50",
        image_size=256,
        epochs=epochs,
        global_batch=4096,
        local_batch=64,
        label_smoothing=0.1,
        optim=OptimConfig(
            name="sgd", variant="heavy-ball", lr=1.7, momentum=0.9, weight_decay=1e-4, decay_on="not-norm"
        ),
        schedule=ScheduleConfig(
            name="poly-after-warmup",
            power=1,
            warmup_epochs=2,
            warmup_lr=1.7e-4,
            image_sizes=(160, 192),
            image_size_epochs=(resized, epochs),
        ),
        augment=AugmentConfig(name="rrc"),
    )


@recipe(published="73.8, with blur pooling and flips [FFCV]")
def resnet50_ffcv_16() -> RunConfig:
    """ResNet-50 in 16 epochs at 4,096, of 160 and, from epoch 12 on, of 192 pixels [FFCV]."""
    return _ffcv(16, 12)


@recipe(published="76.6, with blur pooling and flips [FFCV]")
def resnet50_ffcv_32() -> RunConfig:
    """ResNet-50 in 32 epochs at 4,096, of 160 and, from epoch 25 on, of 192 pixels [FFCV]."""
    return _ffcv(32, 25)


@recipe(published="78.4, with blur pooling and flips [FFCV]")
def resnet50_ffcv_88() -> RunConfig:
    """ResNet-50 in 88 epochs at 4,096, of 160 and, from epoch 71 on, of 192 pixels [FFCV]."""
    return _ffcv(88, 71)


# --- small images -----------------------------------------------------------------------------------------------------


def _small(model: str, batch: int, method: Method, *, epochs: float) -> RunConfig:
    optim, schedule = method(batch)
    return RunConfig(
        model=model,
        image_size=32,
        epochs=epochs,
        global_batch=batch,
        local_batch=256,
        # Of the two, only the ResNet has residual blocks.
        zero_init_residual=model == "resnet20",
        optim=optim,
        schedule=schedule,
        augment=AugmentConfig(name="pad-crop-flip"),
    )


def _small_sgd(lr: float, weight_decay: float) -> Method:
    """Nesterov SGD by linear scaling, no decay on batch norm [Goyal]; warm-up and decay fit a few epochs."""

    def method(batch: int) -> tuple[OptimConfig, ScheduleConfig]:
        del batch  # the configuration multiplies
        optim = OptimConfig(name="sgd", variant="nesterov", lr=lr, lr_scaling="linear", weight_decay=weight_decay,
                            decay_on="not-norm")  # fmt: skip
        return optim, ScheduleConfig(name="poly", power=2, warmup_epochs=2)

    return method


def _small_lars(lr: float, weight_decay: float) -> Method:
    """LARS with ``lr`` at 2,048 and the root of the batch [NUS]; batch norm and biases left out, as in [MLPerf]."""

    def method(batch: int) -> tuple[OptimConfig, ScheduleConfig]:
        optim = OptimConfig(name="lars", variant="mlperf", lr=lr, weight_decay=weight_decay)
        return scaled(optim, 2048, batch), ScheduleConfig(name="poly", power=2, warmup_epochs=2)

    return method


def _small_lamb(batch: int) -> tuple[OptimConfig, ScheduleConfig]:
    """LAMB with 0.02 at 2,048 and the root of the batch [LAMB]; batch norm and biases left out."""
    optim = OptimConfig(name="lamb", variant="mlperf", lr=0.02, weight_decay=0.01, eps=1e-6)
    return scaled(optim, 2048, batch), ScheduleConfig(name="poly", power=2, warmup_epochs=2)


_CIFAR: Mapping[str, Method] = {"sgd": _small_sgd(0.1, 5e-4), "lars": _small_lars(16.0, 5e-4), "lamb": _small_lamb}
# [He]: 0.1 at 128, decay 1e-4. For LARS nothing is published; it starts where the other network does.
_CIFAR_RESNET20: Mapping[str, Method] = {"sgd": _small_sgd(0.2, 1e-4), "lars": _small_lars(16.0, 1e-4)}


def _cifar(batch: int, optimizer: str) -> RunConfig:
    return _small("alexnet_bn_small", batch, _CIFAR[optimizer], epochs=15)


def _cifar_resnet20(batch: int, optimizer: str) -> RunConfig:
    return _small("resnet20", batch, _CIFAR_RESNET20[optimizer], epochs=30)


@recipe(published="-", methods=_CIFAR)
def cifar_256() -> RunConfig:
    """CIFAR-10 at 256 with Nesterov SGD: the small-batch baseline for ``cifar-2k`` and ``cifar-8k``."""
    return _cifar(256, "sgd")


@recipe(published="-", measured="81.84 [perf/results]", methods=_CIFAR)
def cifar_2k() -> RunConfig:
    """CIFAR-10 at 2,048 with LARS: as few steps an epoch as a batch of 52K has on ImageNet."""
    return _cifar(2048, "lars")


@recipe(published="-", methods=_CIFAR)
def cifar_2k_goyal() -> RunConfig:
    """CIFAR-10 at 2,048 by linear scaling with warm-up [Goyal]: what ``cifar-2k`` is held against."""
    return _cifar(2048, "sgd")


@recipe(published="-", methods=_CIFAR)
def cifar_8k() -> RunConfig:
    """CIFAR-10 at 8,192 with LARS: 92 steps in 15 epochs, as few an epoch as a batch of 210K has on ImageNet."""
    base = _cifar(8192, "lars")
    return replace(base, optim=replace(base.optim, lr=12.0), schedule=replace(base.schedule, warmup_epochs=3))


@recipe(published="-", methods=_CIFAR)
def cifar_8k_goyal() -> RunConfig:
    """CIFAR-10 at 8,192 by linear scaling with warm-up [Goyal]: what ``cifar-8k`` is held against."""
    return _cifar(8192, "sgd")


@recipe(published="91.25 in 64,000 steps of 128 [He]", methods=_CIFAR_RESNET20)
def cifar_resnet20_256() -> RunConfig:
    """ResNet-20 on CIFAR-10 at 256 with Nesterov SGD: LR 0.1 for 128 images, decay 1e-4 [He]; 30 epochs, poly 2."""
    return _cifar_resnet20(256, "sgd")


@recipe(published="-", methods=_CIFAR_RESNET20)
def cifar_resnet20_2k() -> RunConfig:
    """ResNet-20 on CIFAR-10 at 2,048 with LARS."""
    return _cifar_resnet20(2048, "lars")


@recipe(published="-", methods=_CIFAR_RESNET20)
def cifar_resnet20_2k_goyal() -> RunConfig:
    """ResNet-20 on CIFAR-10 at 2,048 by linear scaling with warm-up [Goyal]."""
    return _cifar_resnet20(2048, "sgd")


@recipe(published="-", methods=_CIFAR_RESNET20)
def cifar_resnet20_8k() -> RunConfig:
    """ResNet-20 on CIFAR-10 at 8,192 with LARS."""
    return _cifar_resnet20(8192, "lars")


@recipe(published="-", methods=_CIFAR_RESNET20)
def cifar_resnet20_8k_goyal() -> RunConfig:
    """ResNet-20 on CIFAR-10 at 8,192 by linear scaling with warm-up [Goyal]."""
    return _cifar_resnet20(8192, "sgd")


# What later work does besides, each added to ``cifar-2k`` or ``cifar-8k`` by itself. Their numbers are this project's,
# and not tuned.


@recipe(published="-", methods=_CIFAR)
def cifar_2k_lamb() -> RunConfig:
    """``cifar-2k`` with LAMB [LAMB], which leaves batch norm and biases alone, and decays by 0.01."""
    return _cifar(2048, "lamb")


@recipe(published="-")
def cifar_2k_ema() -> RunConfig:
    """``cifar-2k`` whose weights are averaged over the last two epochs or so."""
    return replace(cifar_2k(), ema_decay=0.98)


@recipe(published="-")
def cifar_2k_collapse() -> RunConfig:
    """``cifar-2k`` with a last epoch without augmentation, after [Codreanu]."""
    base = cifar_2k()
    return replace(base, augment=replace(base.augment, collapse_epochs=1))


@recipe(published="-")
def cifar_2k_resizing() -> RunConfig:
    """``cifar-2k`` with images of 24 pixels in the first ten of its 15 epochs, after [FFCV]."""
    base = cifar_2k()
    return replace(base, schedule=replace(base.schedule, image_sizes=(24,), image_size_epochs=(10,)))


@recipe(published="-")
def cifar_8k_batches() -> RunConfig:
    """``cifar-8k`` that begins with batches of 2,048, for as long as its learning rate rises."""
    base = cifar_8k()
    return replace(base, schedule=replace(base.schedule, batches=(2048,), batch_epochs=(3,)))


@recipe(published="-", measured="98.60 [perf/results]", methods=_CIFAR)
def quickstart() -> RunConfig:
    """Pictures drawn by rule, LARS at 512: everything that an ImageNet run uses, in a minute or two."""
    base = _cifar(512, "lars")
    return replace(
        base,
        data="shapes",
        epochs=8,
        local_batch=128,
        optim=replace(base.optim, lr=10.0),
        schedule=replace(base.schedule, warmup_epochs=1),
        augment=AugmentConfig(name="crop-flip", resize=36),
    )
