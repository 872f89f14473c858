"""How a run begins in its folder: alone there, with the configuration that it had, from a checkpoint that is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
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

# What may differ between the parts of one run: where and how it runs, and how long, not what it computes.
_MAY_CHANGE = {
    "data", "stage", "out", "resume", "workers", "max_steps", "checkpoint.every", "checkpoint.keep", "engine",
    "log_trust_ratios",
    "force_bf16", "comm.backend", "comm.timeout_s", "health.policy", "health.max_skips", "health.max_rewinds",
    "health.rewind_factor", "health.divergence_steps", "health.compare_every",
}  # fmt: skip
# A run that was killed a moment ago may have ranks that have not ended yet.
_PATIENCE_S = 10.0
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def lock_run_dir(out: Path, console: Console, *, patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Makes a run's folder, and keeps other runs out of it as long as this process lives.

    The lock is the kernel's (fcntl, which NFS has too): a process that is killed holds it no longer. After the death of
    a node, an NFS server keeps it until the node's lease ends, usually 90 s. A folder that stays empty is removed.

    Args:
        out: the folder.
        console: told who has it, where somebody has to be waited for.
        patience_s: how long to wait, in seconds.

    Raises:
        KnltrainError: another run has it; names the host and the process.
    """
    made = not out.exists()
    path = out / ".lock"
    descriptor = _locked(path, console, patience_s)
    try:
        with contextlib.suppress(OSError):  # a full disk; it is only for people
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{socket.gethostname()}, process {os.getpid()}".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            if made:
                out.rmdir()
        os.close(descriptor)


def _locked(path: Path, console: Console, patience_s: float) -> int:
    out = path.parent
    deadline = time.monotonic() + patience_s
    told = False
    while True:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ends removes the file: what was locked may be one that has no name any more.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                console.warn(f"{out}: {error.strerror}: a second run in this folder would not be noticed")
                return descriptor
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.ENOENT):
                os.close(descriptor)
                raise
            who = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise KnltrainError(f"{out} is in use by a run on {who}; end it, or give another --out") from None
            if not told and error.errno != errno.ENOENT:
                console.line(f"{out} is in use by a run on {who}: waiting up to {patience_s:g} s for it to end")
                told = True
        os.close(descriptor)
        time.sleep(0.1)


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        folder: the checkpoint that it goes on from; None: from the beginning.
        changes: fields that were changed in its course, each with the step, as JSON types.
        convolutions: what native kernels computed of them, so that they still do; None: that is to be chosen.
    """

    folder: Path | None
    changes: list[dict[str, Any]]
    convolutions: dict[str, list[str]] | None

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        group: Group,
        console: Console,
        *,
        made: Mapping[str, object],
        course: Schedule,
        labels_sha256: str,
    ) -> checkpoint.Progress:
        """Gives a model and its optimizer the checkpoint's state, and says where the run stands.

        Args:
            model: as it was initialised.
            optimizer: of the model.
            group: the ranks.
            console: told what is not as it was.
            made: how this run computes: ranks, threads, engine, and so on.
            course: of this run.
            labels_sha256: of the images that there are to train on, in their order; as the checkpoint's meta has it.

        Raises:
            ConfigError: with other batches than before, the next step would have other images than those that follow.
            KnltrainError: the checkpoint cannot be read, or is of another network or other data.
        """
        if self.folder is None:
            return checkpoint.Progress(step=0)
        (unseen,) = group.sum(not self.folder.is_dir())
        if unseen:
            raise KnltrainError(f"{self.folder}: {unseen:.0f} ranks do not see it; OUT must be a folder that all share")
        state = checkpoint.restore(self.folder, model, optimizer, rank=group.rank, world_size=group.world_size)
        if state["images"] != course.num_images:
            raise KnltrainError(f"{self.folder} was trained on {state['images']:,} images, not {course.num_images:,}")
        _refuse_another_place(self.folder, state, course)
        if state.get("labels_sha256", labels_sha256) != labels_sha256:
            console.warn(
                f"{self.folder} was trained on images in another order than they have now: of the epoch that goes on, "
                "some come twice and others do not"
            )
        others = ", ".join(
            f"{name} {state['made'].get(name)} -> {now}" for name, now in made.items() if state["made"].get(name) != now
        )
        if others:
            console.warn(
                f"{self.folder} was made otherwise ({others}): images and their order are the same, bits may differ"
            )
        return checkpoint.progress_of(state)

    def restore_average(self, model: nn.Module, group: Group) -> None:
        """Gives the moving average's network the checkpoint's, if there are both.

        Raises:
            KnltrainError: the checkpoint cannot be read, or is of another network.
        """
        if self.folder is not None:
            checkpoint.restore_average(self.folder, model, rank=group.rank, world_size=group.world_size)

    def latest_valid(self, saved: Sequence[Path], group: Group) -> Start:
        """The same, but from the newest whole checkpoint of those that this process has written, if there is one."""
        folder = self.folder
        for path in reversed(saved if group.is_first else []):
            with contextlib.suppress(KnltrainError):
                checkpoint.verify(path)
                folder = path
                break
        found = group.broadcast_str(str(folder or ""))
        return dataclasses.replace(self, folder=Path(found) if found else None)


def _refuse_another_place(folder: Path, state: Mapping[str, Any], course: Schedule) -> None:
    """Compares where a checkpoint stands among the images with where its step would be now."""
    known = {field.name for field in configuration.fields()}
    then = {name: value for name, value in configuration.flatten(state["config"]).items() if name in known}
    before, step = make_schedule(configuration.override(RunConfig(), then), course.num_images), state["step"]
    if before.images(step) == course.images(step):
        return
    kept: dict[float, int] = {}  # by the epoch that it lasts to, the batch
    for phase in before.phases:
        if phase.first_step < step:
            if kept and list(kept.values())[-1] == phase.batch:
                kept.popitem()
            kept[before.epoch(min(phase.last_step, step))] = phase.batch
    raise ConfigError(
        f"{folder} stands at epoch {before.epoch(step):.4g}, and step {step:,} with these batches at "
        f"{course.epoch(step):.4g}; keep those of before up to there: --schedule.batches "
        f"{','.join(map(str, kept.values()))} --schedule.batch-epochs {','.join(f'{end:.8g}' for end in kept)} "
        "--allow-change global_batch,schedule.batches,schedule.batch_epochs"
    )


def choose(config: RunConfig, out: Path, group: Group, console: Console, allowed: frozenset[str]) -> Start:
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
    folder = convolutions = None
    if group.is_first:
        record = guard_out(config, out, allowed)
        checkpoint.remove_leftovers(out)
        changed = changes(configuration.flatten(record["config"]), config) if record else {}
        folder = checkpoint.find(out, config.resume, console.warn)
        step = 0
        if folder:
            state = checkpoint.read_state(folder)
            step = state["step"]
            # What the same command has written since it began with the one that is named is its own.
            if config.resume not in ("auto", state["config"].get("resume")):
                guard_checkpoint(config, folder, state, allowed)
                changed |= changes(configuration.flatten(state["config"]), config)
            # Of the checkpoint and not of OUT/config.json, which a run writes before its first checkpoint.
            if state["config"].get("conv", RunConfig().conv) == config.conv:
                convolutions = state["made"].get("convolutions", {})
        for name in sorted(allowed - changed.keys()):
            console.warn(f"--allow-change {name} has no effect: it is as it was, or may always change")
        history = record.get("changes", [])
        for name, (was, now) in changed.items():
            history.append({"step": step, "field": name, "before": was, "after": now})
            console.line(f"from step {step} on, {name} is {now} and no longer {was}")
    found, convolutions = json.loads(group.broadcast_str(json.dumps([str(folder or ""), convolutions])))
    return Start(Path(found) if found else None, history, convolutions)


def result_affecting_fields(config: RunConfig) -> dict[str, object]:
    """The fields that decide a run's result, by dotted name."""
    flat = configuration.flatten(configuration.as_dict(config))
    return {name: value for name, value in flat.items() if name not in _MAY_CHANGE}


def digest(config: RunConfig) -> str:
    """SHA-256 of the fields that decide a run's result."""
    return hashlib.sha256(json.dumps(result_affecting_fields(config), sort_keys=True).encode()).hexdigest()


def guard_out(config: RunConfig, out: Path, allowed: frozenset[str]) -> dict[str, Any]:
    """Refuses to write into a folder that holds another run.

    Args:
        config: of the run that is about to begin.
        out: its folder.
        allowed: fields that may differ from the run that the folder holds.

    Returns:
        OUT/config.json as it is, or nothing where there is none.

    Raises:
        ConfigError: OUT has a run of another configuration, or one that would be started over.
    """
    path = out / "config.json"
    if not path.exists():
        return {}
    if config.resume == "never":
        raise ConfigError(f"{out} holds a run already; give another --out, or delete the folder to start over")
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        before = configuration.flatten(record["config"])
        record["changes"] = list(record.get("changes", []))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ConfigError(f"{path} is damaged; give another --out, or delete the folder to start over") from None
    _refuse(changes(before, config), allowed, f"{out} holds a run", "give another --out, or ")
    return record


def guard_checkpoint(config: RunConfig, folder: Path, state: Mapping[str, Any], allowed: frozenset[str]) -> None:
    """Refuses to go on from a checkpoint of another configuration.

    Raises:
        ConfigError: the fields that differ.
    """
    _refuse(changes(configuration.flatten(state["config"]), config), allowed, f"{folder} is a checkpoint", "")


def changes(before: Mapping[str, object], config: RunConfig) -> dict[str, tuple[object, object]]:
    """The deciding fields that are not as they were: by name, what they were and what they are.

    A field that there was not yet had its default's effect.
    """
    now = result_affecting_fields(config)
    then = result_affecting_fields(RunConfig()) | {
        name: value for name, value in before.items() if name not in _MAY_CHANGE
    }
    return {
        name: (then.get(name), now.get(name))
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    }


def _refuse(changed: Mapping[str, tuple[object, object]], allowed: frozenset[str], what: str, remedy: str) -> None:
    if refused := changed.keys() - allowed:
        differ = "; ".join(f"{name}: {was} -> {now}" for name, (was, now) in changed.items() if name in refused)
        raise ConfigError(
            f"{what} of another configuration ({differ}); {remedy}--allow-change {','.join(sorted(refused))}"
        )
