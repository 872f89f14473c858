"""The fields of a configuration: frozen dataclasses whose leaves carry their bounds and their help text."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from msgspec import Meta

from knltrain.errors import ConfigError

# Both bounds of everything: what lies far outside of what makes sense is a slip, and would overflow somewhere inside.
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

    name: OptimizerName = _field("lars", "optimizer; each has variants of its own")
    variant: VariantName = _field(
        "paper", "of lars: paper, mlperf, larc, nesterov; of lamb: paper, mlperf; of sgd: heavy-ball, nesterov"
    )
    lr: Positive = _field(1.0, "peak learning rate; with lr-scaling linear, per 256 images of global batch")
    lr_scaling: Literal["none", "linear"] = _field("none", "linear: the peak is lr x global batch / 256")
    momentum: Fraction = _field(0.9, "momentum; of lamb, of the first moment")
    beta2: Fraction = _field(0.999, "lamb: fraction of the second moment that stays")
    weight_decay: NotNegative = _field(5e-4, "weight decay")
    decay_on: Literal["all", "not-norm", "weights"] = _field(
        "all", "which parameters decay: all, all but batch norm's, or neither batch norm's nor biases"
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
    """What changes over time: learning rate, image size, batch; the formulas are in ``knltrain.config.schedule``."""

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
        (), "progressive resizing: the sizes that training begins with, before image-size, which is what is evaluated"
    )
    image_size_epochs: Annotated[tuple[Epochs, ...], Meta(max_length=20)] = _field(
        (), "the epochs at which each of image-sizes ends"
    )
    batches: Annotated[tuple[Images, ...], Meta(max_length=20)] = _field(
        (), "batch-size warm-up: the batches that training begins with, before global-batch"
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
    """What is cut out of each training image; see ``knltrain.data.augment``."""

    name: AugmentName = _field("crop-flip", "what is cut out of a training image; rrc is the random resized crop")
    resize: Annotated[int, Meta(ge=8, le=16384, extra={"unit": "pixels"})] | None = _field(
        None, "short side before cropping, pixels; default image-size x 256/224, or image-size for pad-crop-flip"
    )
    min_area: Annotated[float, Meta(ge=1e-6, le=1)] = _field(0.08, "rrc: smallest part of the image's area")
    pad: Annotated[int, Meta(ge=0, le=8192, extra={"unit": "pixels"})] = _field(
        4, "pad-crop-flip: black border on each side, pixels"
    )
    collapse_epochs: EpochsFromZero = _field(
        0.0, "the last epochs are trained on what evaluation sees of an image, without augmentation"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommConfig:
    """What travels between ranks."""

    backend: Literal["auto", "ccl", "gloo"] = _field("auto", "process group; auto: oneCCL where it loads, else gloo")
    dtype: Literal["fp32", "bf16"] = _field("fp32", "type of the gradients on the wire")
    bucket_mb: Annotated[float, Meta(ge=0.001, le=1e5, extra={"unit": "MiB"})] | None = _field(
        None, "size of a gradient bucket, MiB; default by the number of ranks: 4 up to 64, more to 25 from 400"
    )
    compression: Literal["none", "powersgd"] = _field(
        "none", "powersgd: gradients travel as thin float32 factors, for networks that are slow; approximate"
    )
    powersgd_rank: Annotated[int, Meta(ge=1, le=1024, extra={"unit": "columns"})] = _field(
        4, "columns of PowerSGD's factors"
    )
    timeout_s: Annotated[float, Meta(ge=0.1, le=30 * 86400, extra={"unit": "seconds"})] = _field(
        600.0, "longest wait for another rank after the first step, and for a checkpoint to be on disk, seconds"
    )

    def bucket_mb_of(self, ranks: int) -> float:
        """MiB of gradients that travel together between so many ranks.

        Small buckets leave early and end soon after the backward pass. What a message costs by itself grows with the
        ranks, and asks for larger ones: docs/tuning.md has the measurements.
        """
        return min(25.0, max(4.0, ranks / 16)) if self.bucket_mb is None else self.bucket_mb


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: Epochs = _field(1.0, "epochs between checkpoints; the last step always writes one")
    keep: Annotated[int, Meta(ge=1, le=10**6, extra={"unit": "checkpoints"})] = _field(
        2, "how many of the newest checkpoints stay, beside the best by top-1"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What is done about NaN, Inf and a loss that diverges; see ``knltrain.training.step_guard``."""

    policy: Literal["stop", "skip", "rewind"] = _field(
        "stop",
        "a loss or gradient that is no number: end the run and save its state for study, leave the step's update out, "
        "or go back to the last checkpoint with a lower learning rate",
    )
    max_skips: Annotated[int, Meta(ge=1, le=10**6, extra={"unit": "steps"})] = _field(
        5, "skip: most steps in a row; the run ends at the next"
    )
    max_rewinds: Annotated[int, Meta(ge=1, le=1000, extra={"unit": "rewinds"})] = _field(
        3, "rewind: most times in a run; it ends at the next"
    )
    rewind_factor: Annotated[float, Meta(gt=0, lt=1)] = _field(0.5, "rewind: the learning rate is multiplied by it")
    divergence_steps: StepsFromZero = _field(
        50, "end the run after so many steps in a row with a loss 5 % above chance; 0 never does"
    )
    compare_every: StepsFromZero = _field(
        100, "steps between two comparisons of the ranks' weights, before checkpoints besides; 0 never compares"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, complete but for the machine it runs on."""

    recipe: str = _field("", "name of the recipe that this configuration started from")
    data: str = _field("", "ImageFolder directory, tar shards, what prepare wrote, synthetic, or shapes")
    stage: str = _field("", "folder of each node, on its own disk or in memory, to which prepared data is copied first")
    out: str = _field("", "folder of the run; default runs/RECIPE")
    model: str = _field("alexnet_bn", "alexnet, alexnet_bn, alexnet_bn_small, resnet20, resnet50 or torchvision:NAME")
    dropout: Fraction | None = _field(None, "dropout before the last layers; default the model's own")
    zero_init_residual: bool = _field(False, "ResNet: start each residual block's last batch-norm gamma at zero")
    image_size: Side = _field(224, "height and width that the model sees, pixels")
    epochs: Epochs = _field(90.0, "passes over the training images")
    max_steps: Steps | None = _field(None, "stop after this many steps, on the schedule of the whole run")
    global_batch: Images = _field(256, "images an optimizer update sees, over all ranks")
    local_batch: Images | None = _field(
        None, "most images a rank passes through the model at once; more are accumulated; default all"
    )
    precision: Precision = _field("auto", "auto: bf16 where the processor is faster in it, else fp32")
    force_bf16: bool = _field(False, "bf16 even on a processor that only emulates it, or that is faster in fp32")
    engine: EngineName = _field(
        "auto", "native kernels, plain PyTorch, torch.compile or Intel's extension; auto: what tune measured, or fused"
    )
    fp32_precision: Literal["ieee", "bf16"] = _field(
        "ieee",
        "bf16: in fp32, PyTorch rounds the factors of convolutions and dense layers to bf16, which AMX multiplies; "
        "ieee: it does not",
    )
    conv: ConvName = _field(
        "auto",
        "convolutions of engine fused: direct (PyTorch's), winograd (by that algorithm where it can, which "
        "multiplies less and rounds more), or auto: layer by layer what is faster on this node, PyTorch's or the "
        "native kernels', measured once and kept over a resume",
    )
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = _field(0, "decides initial weights, order, augmentation, dropout")
    resume: str = _field("auto", "auto (newest checkpoint in OUT, if any), never, or a checkpoint's folder")
    init_from: str = _field(
        "", "weights to start from: safetensors, a state dict as torchvision has it (.pth), or a run's folder"
    )
    workers: Annotated[int, Meta(ge=0, le=1024, extra={"unit": "threads"})] | None = _field(
        None, "decode threads per rank; 0 decodes between the steps; default one per core of the rank"
    )
    on_bad: Literal["fail", "skip"] = _field(
        "fail", "an image that cannot be decoded: end the run, or take the next good one in its place"
    )
    label_smoothing: Fraction = _field(0.0, "label smoothing")
    log_trust_ratios: bool = _field(
        False, "write the trust ratio of each layer to OUT/trust_ratios.jsonl, at about a thousand steps of the run"
    )
    ema_decay: Annotated[float, Meta(gt=0, lt=1)] | None = _field(
        None, "evaluate and save the moving average of the weights, of which each step leaves this part; default none"
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
                "which is what training ends with and what is evaluated"
            )
        smallest = self._resize_at(min((self.image_size, *self.schedule.image_sizes)))
        if self.augment.name == "pad-crop-flip" and self.augment.pad > smallest:
            raise ConfigError(
                f"augment.pad {self.augment.pad} is more than the {smallest} pixels of the images that it is put "
                f"around: crops of nothing but black; give --augment.pad {smallest} or less"
            )
        schedule, epochs = self.schedule, f"{self.epochs:g} epochs"
        if schedule.batch_epochs and schedule.batch_epochs[-1] >= self.epochs:
            raise ConfigError(
                f"schedule.batch-epochs {schedule.batch_epochs[-1]:g} is not before the end of {epochs}: no step would "
                f"have the {self.global_batch:,} images of global-batch; change the one or the other"
            )
        if schedule.image_size_epochs and schedule.image_size_epochs[-1] > self.epochs:
            raise ConfigError(
                f"schedule.image-size-epochs {schedule.image_size_epochs[-1]:g} is after the end of {epochs}: sizes "
                "that were asked for would not come; change the one or the other"
            )
        if self.augment.name != "none" and self.augment.collapse_epochs >= self.epochs:
            raise ConfigError(
                f"augment.collapse-epochs {self.augment.collapse_epochs:g} leaves nothing of {epochs} augmented; "
                "change the one or the other, or take augment.name none"
            )

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, after the linear scaling rule (Goyal et al. 2017, section 2.1) where asked for."""
        return self.peak_lr_at(self.global_batch)

    def peak_lr_at(self, batch: int) -> float:
        """The peak learning rate of steps of so many images."""
        if self.optim.lr_scaling == "linear":
            return self.optim.lr * batch / 256
        return self.optim.lr

    def at_size(self, image_size: int) -> RunConfig:
        """The same with images of another size in pixels, out of images that are scaled as much more or less."""
        return dataclasses.replace(
            self,
            image_size=image_size,
            schedule=dataclasses.replace(self.schedule, image_sizes=(), image_size_epochs=()),
            augment=dataclasses.replace(self.augment, resize=self._resize_at(image_size)),
        )

    def _resize_at(self, image_size: int) -> int:
        """:attr:`resize` for images of another size."""
        return round(self.resize * image_size / self.image_size)

    @property
    def resize(self) -> int:
        """Short side, in pixels, to which evaluation and crop-flip scale an image before they crop it."""
        if self.augment.resize is not None:
            return self.augment.resize
        if self.augment.name == "pad-crop-flip":
            return self.image_size
        return round(self.image_size * 256 / 224)
