"""Warnings about fields without effect, so that nothing that the user has set is silently ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from knltrain.config.schema import WEIGHTS_ONLY, RunConfig

# The condition under which a field has an effect, as text and as a test, for fields that have one.
_NEEDS: dict[str, tuple[str, Callable[[RunConfig], bool]]] = {
    "optim.trust_coefficient": ("optim.name lars", lambda c: c.optim.name == "lars"),
    "log_trust_ratios": ("optim.name lars", lambda c: c.optim.name == "lars"),
    "optim.eps": ("optim.name lars or lamb", lambda c: c.optim.name != "sgd"),
    "optim.beta2": ("optim.name lamb", lambda c: c.optim.name == "lamb"),
    "optim.decay_on": (
        f"optim.name sgd, or another optim.variant than {' and '.join(WEIGHTS_ONLY)}",
        lambda c: c.optim.name == "sgd" or c.optim.variant not in WEIGHTS_ONLY,
    ),
    "schedule.warmup_lr": ("schedule.warmup-epochs", lambda c: c.schedule.warmup_epochs > 0),
    "schedule.power": ("a poly schedule", lambda c: c.schedule.name.startswith("poly")),
    "schedule.end_lr": ("a poly schedule", lambda c: c.schedule.name.startswith("poly")),
    "schedule.milestones": ("schedule.name step", lambda c: c.schedule.name == "step"),
    "schedule.gamma": ("schedule.name step", lambda c: c.schedule.name == "step"),
    "augment.min_area": ("augment.name rrc", lambda c: c.augment.name == "rrc"),
    "augment.collapse_epochs": ("another augment.name than none", lambda c: c.augment.name != "none"),
    "augment.pad": ("augment.name pad-crop-flip", lambda c: c.augment.name == "pad-crop-flip"),
    "comm.powersgd_rank": ("comm.compression powersgd", lambda c: c.comm.compression == "powersgd"),
    "comm.dtype": ("comm.compression none", lambda c: c.comm.compression == "none"),
    "comm.bucket_mb": ("comm.compression none", lambda c: c.comm.compression == "none"),
    "zero_init_residual": ("initial weights drawn at random: init-from brings others", lambda c: not c.init_from),
    "health.max_skips": ("health.policy skip", lambda c: c.health.policy == "skip"),
    "health.max_rewinds": ("health.policy rewind", lambda c: c.health.policy == "rewind"),
    "health.rewind_factor": ("health.policy rewind", lambda c: c.health.policy == "rewind"),
    "force_bf16": ("precision bf16", lambda c: c.precision == "bf16"),
}


def unreached_schedule_warnings(config: RunConfig) -> list[str]:
    """Returns warnings about parts of the schedule after the end of the run, such as learning-rate milestones."""
    schedule, end = config.schedule, f"the end of {config.epochs:g} epochs"
    problems = []
    if schedule.warmup_epochs >= config.epochs:
        problems.append(f"schedule.warmup-epochs {schedule.warmup_epochs:g} last to {end}: the rate only rises")
    if schedule.name == "step" and (late := [f"{at:g}" for at in schedule.milestones if at >= config.epochs]):
        problems.append(
            f"schedule.milestones {','.join(late)} {'is' if len(late) == 1 else 'are'} not before {end}"
            + (": the rate never falls" if len(late) == len(schedule.milestones) else "")
        )
    return problems


def unused_field_warnings(config: RunConfig, names: Iterable[str]) -> list[str]:
    """Returns a warning for each named field that has no effect in this configuration."""
    return [
        f"{name.replace('_', '-')} has no effect without {_NEEDS[name][0]}"
        for name in names
        if name in _NEEDS and not _NEEDS[name][1](config)
    ]
