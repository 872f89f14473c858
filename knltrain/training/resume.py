"""Where a run begins: from a whole checkpoint, or from the beginning."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from knltrain import checkpoint
from knltrain import config as configuration
from knltrain.comm.group import Group
from knltrain.config import RunConfig
from knltrain.config.schedule import Schedule, make_schedule
from knltrain.errors import ConfigError, KnltrainError
from knltrain.runlog.console import Console
from knltrain.training.run_dir import changes, guard_checkpoint, guard_out
from knltrain.training.same_data import differences


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """What a run begins with.

    Attributes:
        folder: the checkpoint that it goes on from; None: from the beginning.
        changes: fields that were changed during the run, each with the step, as JSON types.
        convolutions: which convolutions native kernels computed, so that they still do; None: that is to be chosen.
        started_from: given checkpoints that the run has started from, as resolved paths.
        allowed: what may differ from the checkpoint.
    """

    folder: Path | None
    changes: list[dict[str, Any]]
    convolutions: dict[str, list[str]] | None
    started_from: list[str] = dataclasses.field(default_factory=list)
    allowed: frozenset[str] = frozenset()

    def check_data(self, classes: Sequence[str], data: Mapping[str, Any], group: Group, console: Console) -> None:
        """Compares the data with those that the checkpoint was trained on; the first rank does, for all.

        Args:
            classes: the class names.
            data: as :func:`~knltrain.training.same_data.describe` says it.
            group: the ranks.
            console: told what is not as it was.

        Raises:
            ConfigError: classes or labels are others, and ``data`` is not allowed to change.
        """
        refusal = self._compare_data(classes, data, console) if group.is_first else ""
        if refusal := group.broadcast_str(refusal):
            raise ConfigError(refusal)

    def _compare_data(self, classes: Sequence[str], data: Mapping[str, Any], console: Console) -> str:
        """Says what is not as it was; returns why the run is refused, or nothing."""
        other: list[str] = []
        perhaps = ""
        if self.folder is not None:
            state = checkpoint.read_state(self.folder)
            other, perhaps = differences(state, classes, data)
        if other and "data" not in self.allowed:
            return (
                f"{self.folder} was trained on other data ({'; '.join(other)}); give those, another --out, or "
                "--allow-change data"
            )
        if other:
            self.changes.append({"step": state["step"], "field": "data", "before": other, "after": "as it is now"})
            console.line(f"from step {state['step']} on, the data are others: {'; '.join(other)}")
        elif "data" in self.allowed:
            console.warn("--allow-change data has no effect: it is as it was, or may always change")
        if perhaps and not other:
            console.warn(f"{self.folder} was trained on {perhaps}")
        return ""

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        group: Group,
        console: Console,
        *,
        runtime_env: Mapping[str, object],
        schedule: Schedule,
    ) -> checkpoint.Progress:
        """Gives a model and its optimizer the checkpoint's state, and says where the run stands.

        Args:
            model: as it was initialised.
            optimizer: of the model.
            group: the ranks.
            console: told what is not as it was.
            runtime_env: how this run computes: ranks, threads, engine, and so on.
            schedule: of this run.

        Raises:
            ConfigError: with other batches than before, the next step would have other images than those that follow.
            KnltrainError: the checkpoint cannot be read, or is of another network.
        """
        if self.folder is None:
            return checkpoint.Progress(step=0)
        if unseen := group.count(not self.folder.is_dir()):
            raise KnltrainError(f"{self.folder}: {unseen} ranks do not see it; OUT must be a folder that all share")
        state = checkpoint.restore(self.folder, model, optimizer, rank=group.rank, world_size=group.world_size)
        _refuse_other_position(self.folder, state, schedule)
        before = state["made"]
        different = [
            f"{name} {before.get(name)} -> {now}" for name, now in runtime_env.items() if before.get(name) != now
        ]
        if different:
            console.warn(
                f"{self.folder} was computed otherwise ({', '.join(different)}): images and their order are the same, "
                "bits may differ"
            )
        return checkpoint.progress_of(state)

    def restore_average(self, model: nn.Module, group: Group) -> None:
        """Gives the moving average's network the checkpoint's, if there are both.

        Raises:
            KnltrainError: the checkpoint cannot be read, or is of another network.
        """
        if self.folder is not None:
            checkpoint.restore_average(self.folder, model, rank=group.rank, world_size=group.world_size)

    def latest_valid(self, saved: Sequence[Path], group: Group) -> ResumePoint:
        """The newest whole checkpoint of those that this process has written; if there is none, this one again."""
        folder = self.folder
        for path in reversed(saved if group.is_first else []):
            with contextlib.suppress(KnltrainError):
                checkpoint.verify(path)
                folder = path
                break
        found = group.broadcast_str(str(folder or ""))
        return dataclasses.replace(self, folder=Path(found) if found else None)


def _refuse_other_position(folder: Path, state: Mapping[str, Any], schedule: Schedule) -> None:
    """Compares how many images a checkpoint has seen with how many its step would have seen now."""
    known = {field.name for field in configuration.fields()}
    then = {name: value for name, value in configuration.flatten(state["config"]).items() if name in known}
    before, step = make_schedule(configuration.override(RunConfig(), then), schedule.num_images), state["step"]
    if before.images(step) == schedule.images(step):
        return
    kept: dict[float, int] = {}  # by the epoch that it lasts to, the batch
    for phase in before.phases:
        if phase.first_step < step:
            if kept and list(kept.values())[-1] == phase.batch:
                kept.popitem()
            kept[before.epoch(min(phase.last_step, step))] = phase.batch
    raise ConfigError(
        f"{folder} stands at epoch {before.epoch(step):.4g}, and step {step:,} with these batches at "
        f"{schedule.epoch(step):.4g}; keep those of before up to there: --schedule.batches "
        f"{','.join(map(str, kept.values()))} --schedule.batch-epochs {','.join(f'{end:.8g}' for end in kept)} "
        "--allow-change global_batch,schedule.batches,schedule.batch_epochs"
    )


def choose(config: RunConfig, out: Path, group: Group, console: Console, allowed: frozenset[str]) -> ResumePoint:
    """Decides from which checkpoint the run in ``out`` goes on; the first rank, which must have locked it, for all.

    Removes what a killed run was about to write.

    Args:
        config: of the run.
        out: its folder.
        group: the ranks.
        console: told which checkpoints were passed over, and why.
        allowed: fields that may differ from what was configured before.

    Raises:
        ConfigError: another field differs.
        KnltrainError: a checkpoint that was named is damaged, or every one of the run is.
    """
    history: list[dict[str, Any]] = []
    started_from: list[str] = []
    folder = convolutions = None
    if group.is_first:
        record = guard_out(config, out, allowed)
        checkpoint.remove_leftovers(out)
        changed = changes(configuration.flatten(record["config"]), config) if record else {}
        folder, started_from = checkpoint.find(out, config.resume, console.warn)
        step = 0
        if folder:
            state = checkpoint.read_state(folder)
            step = state["step"]
            # OUT/config.json has been compared, and speaks for what the run has written since it started.
            if not record or str(folder) in started_from:
                guard_checkpoint(config, folder, state, allowed)
                changed |= changes(configuration.flatten(state["config"]), config)
            # The checkpoint says it, not OUT/config.json: a run writes that before its first checkpoint.
            if state["config"].get("conv", RunConfig().conv) == config.conv:
                convolutions = state["made"].get("convolutions", {})
        for name in sorted(allowed - changed.keys() - {"data"}):  # which is compared when it is open
            console.warn(f"--allow-change {name} has no effect: it is as it was, or may always change")
        history = record.get("changes", [])
        for name, (was, now) in changed.items():
            history.append({"step": step, "field": name, "before": was, "after": now})
            console.line(f"from step {step} on, {name} is {now} and no longer {was}")
    found, convolutions = json.loads(group.broadcast_str(json.dumps([str(folder or ""), convolutions])))
    return ResumePoint(Path(found) if found else None, history, convolutions, started_from, allowed)
