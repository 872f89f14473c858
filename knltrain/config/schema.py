"""The fields of a configuration: frozen dataclasses whose leaves have bounds and help texts."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from msgspec import Meta

from knltrain.errors import ConfigError

# Every number has both bounds: absurd values are typing errors, and would overflow somewhere.
Positive = Annotated[float, Meta(gt=0, le=1e6)]
NotNegative = Annotated[float, Meta(ge=0, le=1e6)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=1, le=10**9)]
CountFromZero = Annotated[int, Meta(ge=0, le=10**9)]
StepsFromZero = Annotated[int, Meta(ge=0, le=10**9, extra={"unit": "steps"})]
Epochs = Annotated[float, Meta(ge=1e-6, le=1e6, extra={"unit": "epochs"})]
EpochsFromZero = Annotated[float, Meta(ge=0, le=1e6, extra={"unit": "epochs"})]
Steps = Annotated[int, Meta(ge=1, le=10**12, extra={"unit": "steps"})]
Images = Annotated[int, Meta(ge=1, le=10**7, extra={"unit": "images"})]
Side = Annotated[int, Meta(ge=8, le=8192, extra={"unit": "pixels"})]

OptimizerName = Literal["lars", "lamb", "sgd"]
VariantName = Literal["paper", "mlperf", "larc", "heavy-ball", "nesterov"]
ScheduleName = Literal["poly", "poly-after-warmup", "step", "constant"]
AugmentName = Literal["none", "crop-flip", "rrc", "pad-crop-flip"]
Precision = Literal["auto", "bf16", "fp32"]
EngineName = Literal["auto", "fused", "eager", "compile", "ipex"]
ConvName = Literal["auto", "direct", "winograd"]

VARIANTS: dict[str, tuple[str, ...]] = {
    "lars": ("paper", "mlperf", "larc", "nesterov"),
    "lamb": ("paper", "mlperf"),
    "sgd": ("heavy-ball", "nesterov"),
}
# The variants of LARS and LAMB that neither adapt nor decay batch norm and biases.
WEIGHTS_ONLY = ("mlperf", "nesterov")


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, in the terms of ``knltrain.optim``."""

    name: OptimizerName = _field("lars", "optimizer; each has its own variants")
    variant: VariantName = _field(
        "paper", "lars: paper, mlperf, larc, nesterov; lamb: paper, mlperf; sgd: heavy-ball, nesterov"
    )
    lr: Positive = _field(1.0, "peak learning rate; with lr-scaling linear, per 256 images of global batch")
    lr_scaling: Literal["none", "linear"] = _field("none", "linear: the peak is lr x global batch / 256")
    momentum: Fraction = _field(0.9, "momentum; lamb: decay of the first moment (beta1)")
    beta2: Fraction = _field(0.999, "lamb: decay of the second moment")
    weight_decay: NotNegative = _field(5e-4, "weight decay")
    decay_on: Literal["all", "not-norm", "weights"] = _field(
        "all", "parameters with weight decay: all, all but batch norm's, or all but batch norm's and biases"
    )
    trust_coefficient: Positive = _field(0.001, "eta of LARS")
    eps: NotNegative = _field(
        0.0, "added to the denominator of the trust ratio of LARS, or to the root of LAMB's second moment"
    )

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS[self.name]:
            raise ConfigError(
                f"optim.variant: {self.name} has no variant {self.variant!r}; it has {', '.join(VARIANTS[self.name])}"
            )
        if self.name == "lamb" and not self.eps:
            raise ConfigError("optim.eps 0: lamb divides by it where gradients are zero; 1e-6 is usual")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate, image size and batch over time; the formulas are in ``knltrain.config.schedule``."""

    name: ScheduleName = _field("poly", "poly counts from step 0, poly-after-warmup from the end of warm-up")
    warmup_epochs: EpochsFromZero = _field(0.0, "length of the linear warm-up, in epochs")
    warmup_lr: NotNegative = _field(0.0, "learning rate at step 0, where the warm-up starts")
    power: Annotated[float, Meta(gt=0, le=1000)] = _field(2.0, "power of the polynomial decay")
    end_lr: NotNegative = _field(0.0, "learning rate at the end of the polynomial decay")
    milestones: Annotated[tuple[Epochs, ...], Meta(max_length=100)] = _field(
        (30.0, 60.0, 80.0), "step: epochs at which the rate is multiplied"
    )
    gamma: Annotated[float, Meta(gt=0, le=10)] = _field(0.1, "step: the factor at each milestone")
    image_sizes: Annotated[tuple[Side, ...], Meta(max_length=20)] = _field(
        (), "progressive resizing: the sizes that training starts with, before image-size, which evaluation uses"
    )
    image_size_epochs: Annotated[tuple[Epochs, ...], Meta(max_length=20)] = _field(
        (), "the epochs at which each of image-sizes ends"
    )
    batches: Annotated[tuple[Images, ...], Meta(max_length=20)] = _field(
        (), "batch-size warm-up: the batches that training starts with, before global-batch"
    )
    batch_epochs: Annotated[tuple[Epochs, ...], Meta(max_length=20)] = _field(
        (), "the epochs at which each of batches ends"
    )

    def __post_init__(self) -> None:
        for name, values, epochs in (
            ("image-size", self.image_sizes, self.image_size_epochs),
            ("batch", self.batches, self.batch_epochs),
        ):
            if len(values) != len(epochs) or list(epochs) != sorted(set(epochs)):
                shown = ",".join(f"{epoch:g}" for epoch in epochs) or "none"
                raise ConfigError(
                    f"schedule.{name}-epochs: {shown}; give {len(values)} that rise, one for the end of each of "
                    f"schedule.{name}{'es' if name == 'batch' else 's'}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images; see ``knltrain.data.augment``."""

    name: AugmentName = _field("crop-flip", "augmentation of a training image; rrc is the random resized crop")
    resize: Annotated[int, Meta(ge=8, le=16384, extra={"unit": "pixels"})] | None = _field(
        None, "short side before cropping, pixels; default image-size x 256/224, or image-size for pad-crop-flip"
    )
    min_area: Annotated[float, Meta(ge=1e-6, le=1)] = _field(0.08, "rrc: smallest part of the image's area")
    pad: Annotated[int, Meta(ge=0, le=8192, extra={"unit": "pixels"})] = _field(
        4, "pad-crop-flip: black border on each side, pixels"
    )
    collapse_epochs: EpochsFromZero = _field(
        0.0, "number of last epochs that are trained on evaluation's crop of an image, without augmentation"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommConfig:
    """Communication between ranks."""

    backend: Literal["auto", "ccl", "gloo"] = _field("auto", "process group; auto: oneCCL where it loads, else gloo")
    dtype: Literal["fp32", "bf16"] = _field("fp32", "data type in which gradients are all-reduced")
    bucket_mb: Annotated[float, Meta(ge=0.001, le=1e5, extra={"unit": "MiB"})] | None = _field(
        None, "size of a gradient bucket, MiB; default by the number of ranks: 4 up to 64, more to 25 from 400"
    )
    compression: Literal["none", "powersgd"] = _field(
        "none", "powersgd: gradients are compressed to low-rank float32 factors, for slow interconnects; approximate"
    )
    powersgd_rank: Annotated[int, Meta(ge=1, le=1024, extra={"unit": "columns"})] = _field(
        4, "columns of PowerSGD's factors"
    )
    timeout_s: Annotated[float, Meta(ge=0.1, le=30 * 86400, extra={"unit": "seconds"})] = _field(
        600.0, "time-out of collectives after the first step, and of writing a checkpoint, seconds"
    )
    start_timeout_s: Annotated[float, Meta(ge=0.1, le=30 * 86400, extra={"unit": "seconds"})] = _field(
        600.0, "how long the slowest rank may take to start, and to end its first step, seconds"
    )

    def bucket_mb_of(self, ranks: int) -> float:
        """Returns the size of a gradient bucket in MiB, for a number of ranks.

        Small buckets start early, and the last ends soon after the backward pass. The latency of an all-reduce grows
        with the ranks and favours larger buckets: docs/tuning.md has the measurements.
        """
        return min(25.0, max(4.0, ranks / 16)) if self.bucket_mb is None else self.bucket_mb


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: Epochs = _field(1.0, "epochs between checkpoints; the last step always writes one")
    keep: Annotated[int, Meta(ge=1, le=10**6, extra={"unit": "checkpoints"})] = _field(
        2, "how many of the newest checkpoints to keep, beside the best by top-1"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Reactions to NaN, Inf and divergence; see ``knltrain.training.step_guard``."""

    policy: Literal["stop", "skip", "rewind"] = _field(
        "stop",
        "NaN or Inf in the loss or a gradient: end the run and save its state for study, skip the step's update, or go "
        "back to the last checkpoint with a lower learning rate",
    )
    max_skips: Annotated[int, Meta(ge=1, le=10**6, extra={"unit": "steps"})] = _field(
        5, "skip: maximum of consecutive steps; the run ends at the next"
    )
    max_rewinds: Annotated[int, Meta(ge=1, le=1000, extra={"unit": "rewinds"})] = _field(
        3, "rewind: maximum in a run; it ends at the next"
    )
    rewind_factor: Annotated[float, Meta(gt=0, lt=1)] = _field(0.5, "rewind: the learning rate is multiplied by it")
    divergence_steps: StepsFromZero = _field(
        50, "end the run after this many consecutive steps with a loss 5 % above chance level; 0: never"
    )
    compare_every: StepsFromZero = _field(
        100, "steps between comparisons of the ranks' weights, which also precede each checkpoint; 0: never"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run, independent of the machine that it runs on."""

    recipe: str = _field("", "name of the recipe that this configuration started from")
    data: str = _field("", "ImageFolder directory, tar shards, output of prepare, synthetic, or shapes")
    classes: str = _field("", "file with one class name a line: only these classes of the data are used")
    class_order: str = _field(
        "",
        "how classes are numbered: name, numeric (names that are numbers), or a file with one class name a line; "
        "default: as tar files and prepared data have it, class folders by name",
    )
    stage: str = _field("", "folder of each node, on its own disk or in memory, to which prepared data is copied first")
    out: str = _field("", "folder of the run; default runs/RECIPE")
    model: str = _field("alexnet_bn", "alexnet, alexnet_bn, alexnet_bn_small, resnet20, resnet50 or torchvision:NAME")
    dropout: Fraction | None = _field(None, "dropout before the last layers; default: the model's")
    zero_init_residual: bool = _field(False, "ResNet: start each residual block's last batch-norm gamma at zero")
    image_size: Side = _field(224, "height and width that the model sees, pixels")
    epochs: Epochs = _field(90.0, "passes over the training images")
    max_steps: Steps | None = _field(None, "stop after this many steps, on the schedule of the whole run")
    global_batch: Images = _field(256, "images per optimizer update, over all ranks")
    local_batch: Images | None = _field(
        None, "images of a micro-batch of a rank; gradients of several are accumulated; default: all of its images"
    )
    precision: Precision = _field("auto", "auto: bf16 if the processor is faster in it, else fp32")
    force_bf16: bool = _field(False, "bf16 even on a processor that only emulates it, or that is faster in fp32")
    engine: EngineName = _field(
        "auto",
        "native kernels, plain PyTorch, torch.compile or Intel's extension; auto: the one measured by tune, or fused",
    )
    fp32_precision: Literal["ieee", "bf16"] = _field(
        "ieee",
        "bf16: in fp32, PyTorch rounds the factors of convolutions and dense layers to bf16, which AMX multiplies; "
        "ieee: it does not",
    )
    conv: ConvName = _field(
        "auto",
        "convolutions of engine fused: direct (PyTorch's), winograd (where possible, with fewer multiplications and "
        "larger rounding errors), or auto: for each layer the faster on this node, PyTorch's or the native kernels', "
        "measured once and kept over a resume",
    )
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = _field(
        0, "seed of initial weights, order, augmentation and dropout"
    )
    resume: str = _field("auto", "auto (newest checkpoint in OUT, if any), never, or a checkpoint's folder")
    init_from: str = _field(
        "", "initial weights: safetensors, a state dict like torchvision's (.pth), or a run's folder"
    )
    workers: Annotated[int, Meta(ge=0, le=1024, extra={"unit": "threads"})] | None = _field(
        None, "decoder threads per rank; 0 decodes between steps; default: one per core of the rank"
    )
    on_bad: Literal["fail", "skip"] = _field(
        "fail", "an image that cannot be decoded: end the run, or use the next good one instead"
    )
    label_smoothing: Fraction = _field(0.0, "label smoothing")
    log_trust_ratios: bool = _field(
        False, "log the trust ratio of each layer to OUT/trust_ratios.jsonl, at about a thousand steps of the run"
    )
    ema_decay: Annotated[float, Meta(gt=0, lt=1)] | None = _field(
        None, "decay of an exponential moving average of the weights, which is evaluated and saved; default: none"
    )
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    comm: CommConfig = dataclasses.field(default_factory=CommConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        if self.resize < self.image_size:
            raise ConfigError(
                f"augment.resize {self.resize} is smaller than image-size {self.image_size}: images are scaled to it "
                f"before they are cropped, in evaluation always; give --augment.resize {round(self.image_size * 8 / 7)}"
            )
        if self.schedule.image_sizes and max(self.schedule.image_sizes) > self.image_size:
            raise ConfigError(
                f"schedule.image-sizes {max(self.schedule.image_sizes)} is larger than image-size {self.image_size}, "
                "with which training ends and evaluation runs"
            )
        smallest = self._resize_at(min((self.image_size, *self.schedule.image_sizes)))
        if self.augment.name == "pad-crop-flip" and self.augment.pad > smallest:
            raise ConfigError(
                f"augment.pad {self.augment.pad} is more than the {smallest} pixels of an image: some crops would be "
                f"all black; give --augment.pad {smallest} or less"
            )
        schedule, epochs = self.schedule, f"{self.epochs:g} epochs"
        if schedule.batch_epochs and schedule.batch_epochs[-1] >= self.epochs:
            raise ConfigError(
                f"schedule.batch-epochs {schedule.batch_epochs[-1]:g} is not before the end of {epochs}: no step would "
                f"have the {self.global_batch:,} images of global-batch; change one of them"
            )
        if schedule.image_size_epochs and schedule.image_size_epochs[-1] > self.epochs:
            raise ConfigError(
                f"schedule.image-size-epochs {schedule.image_size_epochs[-1]:g} is after the end of {epochs}: some "
                "sizes would not be used; change one of them"
            )
        if self.augment.name != "none" and self.augment.collapse_epochs >= self.epochs:
            raise ConfigError(
                f"augment.collapse-epochs {self.augment.collapse_epochs:g} leaves no epoch of {epochs} augmented; "
                "change one of them, or use augment.name none"
            )

    @property
    def peak_lr(self) -> float:
        """Peak learning rate, with the linear scaling rule (Goyal et al. 2017, section 2.1) if configured."""
        return self.peak_lr_at(self.global_batch)

    def peak_lr_at(self, batch: int) -> float:
        """Returns the peak learning rate for a batch size."""
        if self.optim.lr_scaling == "linear":
            return self.optim.lr * batch / 256
        return self.optim.lr

    def at_size(self, image_size: int) -> RunConfig:
        """Returns the configuration for another image size in pixels, with ``resize`` in proportion."""
        return dataclasses.replace(
            self,
            image_size=image_size,
            schedule=dataclasses.replace(self.schedule, image_sizes=(), image_size_epochs=()),
            augment=dataclasses.replace(self.augment, resize=self._resize_at(image_size)),
        )

    def _resize_at(self, image_size: int) -> int:
        """Returns :attr:`resize` for another image size."""
        return round(self.resize * image_size / self.image_size)

    @property
    def resize(self) -> int:
        """Short side, in pixels, to which evaluation and crop-flip scale an image before they crop it."""
        if self.augment.resize is not None:
            return self.augment.resize
        if self.augment.name == "pad-crop-flip":
            return self.image_size
        return round(self.image_size * 256 / 224)
