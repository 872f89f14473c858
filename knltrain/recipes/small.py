"""Recipes for CIFAR-10, and for generated pictures of that size, which need no download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from knltrain.config import AugmentConfig, OptimConfig, RunConfig, ScheduleConfig
from knltrain.recipes.registry import Method, recipe, scaled


def _small(model: str, batch: int, method: Method, *, epochs: float) -> RunConfig:
    optim, schedule = method(batch)
    return RunConfig(
        model=model,
        image_size=32,
        epochs=epochs,
        global_batch=batch,
        local_batch=256,
        # The other model has no residual blocks.
        zero_init_residual=model == "resnet20",
        optim=optim,
        schedule=schedule,
        augment=AugmentConfig(name="pad-crop-flip"),
    )


def _small_sgd(lr: float, weight_decay: float) -> Method:
    """Nesterov SGD by linear scaling, no decay on batch norm [Goyal]; warm-up and decay for few epochs."""

    def method(batch: int) -> tuple[OptimConfig, ScheduleConfig]:
        del batch  # lr_scaling applies it
        optim = OptimConfig(name="sgd", variant="nesterov", lr=lr, lr_scaling="linear", weight_decay=weight_decay,
                            decay_on="not-norm")  # fmt: skip
        return optim, ScheduleConfig(name="poly", power=2, warmup_epochs=2)

    return method


def _small_lars(lr: float, weight_decay: float) -> Method:
    """LARS with ``lr`` at 2,048 and square-root scaling [NUS]; batch norm and biases are not adapted, as in [MLPerf].

    Batch norm and biases are trained with the global learning rate. With [ICLR]'s eta of 0.001, the weights of these
    networks need a rate of 10 to 30, too high for batch norm; an eta ten times as large suits both.
    """

    def method(batch: int) -> tuple[OptimConfig, ScheduleConfig]:
        optim = OptimConfig(name="lars", variant="mlperf", lr=lr, weight_decay=weight_decay, trust_coefficient=0.01)
        return scaled(optim, 2048, batch), ScheduleConfig(name="poly", power=2, warmup_epochs=2)

    return method


def _small_lamb(batch: int) -> tuple[OptimConfig, ScheduleConfig]:
    """LAMB with 0.02 at 2,048 and square-root scaling [LAMB]; batch norm and biases are not adapted."""
    optim = OptimConfig(name="lamb", variant="mlperf", lr=0.02, weight_decay=0.01, eps=1e-6)
    return scaled(optim, 2048, batch), ScheduleConfig(name="poly", power=2, warmup_epochs=2)


_CIFAR: Mapping[str, Method] = {"sgd": _small_sgd(0.1, 5e-4), "lars": _small_lars(3.2, 5e-4), "lamb": _small_lamb}
# [He]: 0.1 at 128, decay 1e-4. For LARS nothing is published; it has the settings of the other network.
_CIFAR_RESNET20: Mapping[str, Method] = {"sgd": _small_sgd(0.2, 1e-4), "lars": _small_lars(3.2, 1e-4)}


def _cifar(batch: int, optimizer: str) -> RunConfig:
    return _small("alexnet_bn_small", batch, _CIFAR[optimizer], epochs=15)


def _cifar_resnet20(batch: int, optimizer: str) -> RunConfig:
    return _small("resnet20", batch, _CIFAR_RESNET20[optimizer], epochs=30)


@recipe(published="-", measured="83.60; 84.79 with LR 0.8 [perf/results]", methods=_CIFAR)
def cifar_256() -> RunConfig:
    """CIFAR-10 at 256 with Nesterov SGD: the small-batch baseline for ``cifar-2k`` and ``cifar-8k``."""
    return _cifar(256, "sgd")


@recipe(published="-", measured="83.28 [perf/results]", methods=_CIFAR)
def cifar_2k() -> RunConfig:
    """CIFAR-10 at 2,048 with LARS: as few steps per epoch as a batch of 52K has on ImageNet."""
    base = _cifar(2048, "lars")
    return replace(base, optim=replace(base.optim, lr=6.4))


@recipe(published="-", methods=_CIFAR)
def cifar_2k_goyal() -> RunConfig:
    """CIFAR-10 at 2,048 by linear scaling with warm-up [Goyal]: the baseline for ``cifar-2k``."""
    return _cifar(2048, "sgd")


@recipe(published="-", measured="74.35 [perf/results]", methods=_CIFAR)
def cifar_8k() -> RunConfig:
    """CIFAR-10 at 8,192 with LARS: 92 steps in 15 epochs, as few per epoch as a batch of 210K has on ImageNet."""
    base = _cifar(8192, "lars")
    return replace(base, optim=replace(base.optim, lr=3.2))


@recipe(published="-", measured="diverges [perf/results]", methods=_CIFAR)
def cifar_8k_goyal() -> RunConfig:
    """CIFAR-10 at 8,192 by linear scaling with warm-up [Goyal]: the baseline for ``cifar-8k``."""
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


# Techniques of later work, each added alone to ``cifar-2k`` or ``cifar-8k``. Their settings are this project's, and not
# tuned.


@recipe(published="-", measured="80.24; 82.25 with LR 0.05 [perf/results]", methods=_CIFAR)
def cifar_2k_lamb() -> RunConfig:
    """``cifar-2k`` with LAMB [LAMB], which does not adapt batch norm and biases; weight decay 0.01."""
    return _cifar(2048, "lamb")


@recipe(published="-", measured="83.94 [perf/results]")
def cifar_2k_nesterov() -> RunConfig:
    """``cifar-2k`` with Nesterov momentum; eta 0.04, and a lower learning rate with linear decay.

    Compared with ``cifar-2k``, batch norm and biases, which LARS does not adapt, have an eighth of the learning rate,
    and the weights half.
    """
    base = cifar_2k()
    return replace(
        base,
        optim=replace(base.optim, variant="nesterov", lr=0.8, trust_coefficient=0.04),
        schedule=replace(base.schedule, power=1),
    )


@recipe(published="-", measured="83.48 [perf/results]")
def cifar_2k_ema() -> RunConfig:
    """``cifar-2k`` with a moving average of the weights over about the last two epochs."""
    return replace(cifar_2k(), ema_decay=0.98)


@recipe(published="-", measured="82.94 [perf/results]")
def cifar_2k_collapse() -> RunConfig:
    """``cifar-2k`` with a last epoch without augmentation, after [Codreanu]."""
    base = cifar_2k()
    return replace(base, augment=replace(base.augment, collapse_epochs=1))


@recipe(published="-", measured="82.18 [perf/results]")
def cifar_2k_resizing() -> RunConfig:
    """``cifar-2k`` with images of 24 pixels in the first ten of its 15 epochs, after [FFCV]."""
    base = cifar_2k()
    return replace(base, schedule=replace(base.schedule, image_sizes=(24,), image_size_epochs=(10,)))


@recipe(published="-", measured="78.98 [perf/results]")
def cifar_8k_batches() -> RunConfig:
    """``cifar-8k`` with batches of 2,048 during the learning-rate warm-up."""
    base = cifar_8k()
    return replace(base, schedule=replace(base.schedule, batches=(2048,), batch_epochs=(2,)))


@recipe(published="-", measured="98.80 in 8 epochs [perf/results]", methods=_CIFAR)
def quickstart() -> RunConfig:
    """Generated pictures, LARS at 512: everything that an ImageNet run uses, in a minute or two."""
    base = _cifar(512, "lars")
    return replace(
        base,
        data="shapes",
        epochs=6,
        local_batch=128,
        optim=replace(base.optim, lr=2.0),
        schedule=replace(base.schedule, warmup_epochs=1),
        augment=AugmentConfig(name="crop-flip", resize=36),
    )
