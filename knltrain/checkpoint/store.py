"""The checkpoints of a run: writing, listing, verifying and restoring them.

OUT/checkpoints/step-00001234/ holds model.safetensors (the network that is evaluated: float32 weights and buffers),
optimizer.safetensors, with several ranks statistics.safetensors (each rank's own running statistics of batch norm), and
state.json, which has the sizes and checksums of the others and of itself. If a moving average of the weights is
evaluated, trained.safetensors has the weights that training continues with. A checkpoint is written under another name,
synced and renamed: a folder of this name is complete, unless it was changed or the disk failed since.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from knltrain.checkpoint.files import (
    PackedTensors,
    Sum,
    check_file,
    read_tensors,
    seal,
    unseal,
    write_file,
)
from knltrain.errors import ConfigError, KnltrainError
from knltrain.files import open_regular, resolved, says_absent, sync_folder

_MODEL, _OPTIMIZER, _STATISTICS = "model.safetensors", "optimizer.safetensors", "statistics.safetensors"
_TRAINED = "trained.safetensors"
# Prefix of the moving average's running statistics, beside the network's own.
_AVERAGE = "average/"
_STATE = "state.json"
_NAME = re.compile(r"step-\d{8,18}")


@dataclass(frozen=True)
class Progress:
    """Progress of a run. The order of samples and all random draws are functions of the step.

    Attributes:
        step: optimizer updates done.
        evaluated_step: the step of the last evaluation.
        top1: its result, percent; None before the first.
        best_top1: best evaluation so far, percent; None before the first.
        wall_s: seconds of training before this process, evaluations and checkpoints included.
        skipped_steps: steps whose update was skipped because of NaN or Inf.
        skipped_in_a_row: consecutive skipped steps up to now.
        steps_above_chance: consecutive steps up to now with the loss of a diverged run.
        rewinds: how often the run went back to a checkpoint.
        lr_factor: factor of the schedule's learning rate, lowered by rewinds.
        gradient_signal: moving average of estimates of the squared norm of the true gradient.
        gradient_noise: moving average of estimates of the trace of the covariance of one image's gradient.
    """

    step: int
    evaluated_step: int = 0
    top1: float | None = None
    best_top1: float | None = None
    wall_s: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    steps_above_chance: int = 0
    rewinds: int = 0
    lr_factor: float = 1.0
    gradient_signal: float = 0.0
    gradient_noise: float = 0.0


class _State(TypedDict):
    """Required fields of state.json: its checksum shows only that it is unchanged, not that knltrain wrote it."""

    step: int
    model: str
    image_size: int
    resize: int
    dropout: float | None
    classes: list[str]
    images: int
    config: dict[str, Any]
    made: dict[str, Any]
    files: dict[str, Sum]


class Snapshot:
    """An in-memory copy of a checkpoint's contents; its memory is reused for the next one."""

    def __init__(self) -> None:
        self._files: dict[str, PackedTensors] = {}
        self.state: dict[str, Any] = {}

    def take(
        self,
        progress: Progress,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        meta: Mapping[str, Any],
        statistics: Mapping[str, Tensor] | None = None,
        average: Mapping[str, Tensor] | None = None,
        average_statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copies everything that training will change.

        Args:
            progress: progress of the run.
            weights: the model's float32 state, as the engine gives it, with running statistics averaged over ranks.
            optimizer: the model's optimizer; its groups have their parameters' names.
            meta: the other fields of :class:`_State`, from which the model is built again.
            statistics: by name, every rank's own running statistics, one row per rank; None with one rank.
            average: the moving average's state, as ``weights``; None without a moving average.
            average_statistics: the moving average's ``statistics``.
        """
        tensors = {_MODEL: weights, _OPTIMIZER: _optimizer_tensors(optimizer)}
        if average is not None:
            tensors |= {_MODEL: average, _TRAINED: weights}
        if statistics:
            averaged = (average_statistics or {}).items()
            tensors[_STATISTICS] = {**statistics, **{f"{_AVERAGE}{name}": rows for name, rows in averaged}}
        self.state = {**asdict(progress), **meta}
        for name in self._files.keys() - tensors.keys():
            del self._files[name]
        for name, contents in tensors.items():
            if name not in self._files or not self._files[name].fits(contents):
                self._files[name] = PackedTensors(contents)
            self._files[name].copy(contents)

    @property
    def files(self) -> Mapping[str, PackedTensors]:
        """Contents of each file, by file name."""
        return self._files


def folder_of(out: Path, step: int) -> Path:
    """Returns the folder of a step's checkpoint in the run's folder ``out``."""
    return out / "checkpoints" / f"step-{step:08}"


def write(snapshot: Snapshot, folder: Path) -> None:
    """Writes a checkpoint, and replaces one of the same name.

    Raises:
        OSError: it could not be written. Existing checkpoints are unchanged, and temporary files are removed.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        sums = {name: asdict(write_file(aside / name, file.parts())) for name, file in snapshot.files.items()}
        text = seal({**snapshot.state, "files": sums}).encode()
        write_file(aside / _STATE, [memoryview(text)])
        sync_folder(aside)
        before = folder.with_name(f".{folder.name}.old.tmp")
        if folder.exists():  # from before the run was resumed at an earlier step
            folder.rename(before)
        aside.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
        sync_folder(folder.parent)
        sync_folder(folder.parent.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def list_checkpoints(out: Path) -> list[Path]:
    """Returns the run's checkpoints, oldest first, valid or not.

    Raises:
        OSError: the folder cannot be read now; a run that took it for empty would start over.
    """
    try:
        with os.scandir(out / "checkpoints") as entries:
            names = [entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir()]
    except OSError as error:
        if not says_absent(error):
            raise
        return []
    return sorted((out / "checkpoints" / name for name in names), key=_step_of)


def remove_old(out: Path, newest: Path, keep: int) -> None:
    """Removes old checkpoints of the run in ``out``.

    The last ``keep`` up to ``newest``, which was just written, and the one with the best top-1 are kept. Checkpoints of
    later steps are removed: they are damaged, or from a trajectory that a rewind abandoned.
    """
    later = [folder for folder in list_checkpoints(out) if _step_of(folder) > _step_of(newest)]
    others = [folder for folder in list_checkpoints(out) if folder not in later]
    rated, unread = [], []
    for folder in others:
        try:
            if (top1 := _top1_of(folder)) is not None:
                rated.append((top1, _step_of(folder), folder))
        except OSError:  # it may be the best
            unread.append(folder)
    kept = [max(rated)[-1], *unread] if rated else unread
    for folder in [*later, *(folder for folder in others[:-keep] if folder not in kept)]:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(out: Path) -> None:
    """Removes temporary folders that a killed process has left."""
    for path in (out / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def verify(folder: Path) -> dict[str, Any]:
    """Compares every file of a checkpoint with its checksum, and returns its state.

    Raises:
        KnltrainError: a file is missing or damaged; the message names it.
    """
    state = read_state(folder)
    try:
        listed = msgspec.convert(state["files"], dict[str, Sum])
        if not {_MODEL, _OPTIMIZER} <= listed.keys() <= {_MODEL, _OPTIMIZER, _STATISTICS, _TRAINED}:
            raise KnltrainError(f"{_STATE} lists other files than a checkpoint has")
        for name, expected in listed.items():
            check_file(folder / name, expected)
    except KnltrainError as error:
        raise KnltrainError(f"checkpoint {folder}: {error}") from None
    return state


def newest(folder: Path, say: Callable[[str], None] = warnings.warn) -> Path:
    """Returns ``folder`` itself if it is a checkpoint, otherwise the newest valid checkpoint of the run in it.

    Args:
        folder: a checkpoint, a run's folder, or the folder of its checkpoints.
        say: called with a message for each checkpoint that was passed over.

    Raises:
        KnltrainError: it is neither, or no checkpoint is valid.
        OSError: one cannot be read now.
    """
    if (folder / _STATE).exists():
        verify(folder)
        return folder
    run = folder.parent if folder.name == "checkpoints" else folder
    found = _newest_valid(list_checkpoints(run), say)
    if found is None:
        raise KnltrainError(f"{folder}: no checkpoint, and no run that has one")
    return found


def find(out: Path, resume: str, say: Callable[[str], None]) -> tuple[Path | None, list[str]]:
    """Resolves the field ``resume``: the newest valid checkpoint for ``auto``, none for ``never``, or a given one.

    A run that has already started from the given checkpoint resumes from the newest that it has written since, by this
    command or by one with ``auto``. Another spelling of a path names the same checkpoint.

    Args:
        out: the run's folder.
        resume: auto, never, a checkpoint, or a run's folder.
        say: called with a message for each checkpoint that was passed over, and if later ones will be removed.

    Returns:
        The checkpoint, and the given ones that the run has started from, as :func:`started_from`.

    Raises:
        ConfigError: OUT holds checkpoints of a run that did not start from the given one.
        KnltrainError: there are checkpoints but none is valid, or the given folder has none.
        OSError: one cannot be read now. It may be whole: neither an older one nor the beginning takes its place.
    """
    if resume == "never":
        return None, []
    there, given = list_checkpoints(out), resolved(resume)
    if resume == "auto" or given == resolved(out):
        folder = _newest_valid(there, say)
        return folder, started_from(read_state(folder)) if folder else []
    if folder := _newest_since(there, str(given), say):
        return folder, started_from(read_state(folder))
    found = newest(given, say)
    if folder := _newest_since(there, str(found), say):
        return folder, started_from(read_state(folder))
    before: list[str] = []
    if found.parent == resolved(out) / "checkpoints":
        before = started_from(read_state(found))
        if later := [folder.name for folder in there if _step_of(folder) > _step_of(found)]:
            say(
                f"{out} goes back to {found.name}: later checkpoints ({', '.join(later)}) are removed when the next is "
                "written; to keep them, give another --out"
            )
    elif there:
        raise ConfigError(f"{out} holds a run that did not start from {given}; give another --out")
    return found, [*before, *dict.fromkeys((str(given), str(found)))]


def started_from(state: Mapping[str, Any]) -> list[str]:
    """Returns the given checkpoints that a checkpoint's run has started from, oldest first, as resolved paths.

    Where a run's folder was given there are two: it, and the checkpoint that was its newest then.
    """
    if isinstance(named := state.get("started_from"), list):
        return [str(path) for path in named]
    resume = str(state["config"].get("resume", "auto"))  # of versions that did not write it
    return [] if resume in ("auto", "never") else [str(resolved(resume))]


def _newest_since(folders: Sequence[Path], given: str, say: Callable[[str], None]) -> Path | None:
    """Returns the newest valid checkpoint of those whose run has started from the given one."""
    return _newest_valid([folder for folder in folders if given in _started_from(folder)], say)


def _newest_valid(folders: Sequence[Path], say: Callable[[str], None]) -> Path | None:
    for folder in reversed(folders):
        try:
            verify(folder)
            return folder
        except KnltrainError as error:
            say(f"passed over: {error}")
    if folders:
        raise KnltrainError(
            f"{folders[0].parent.parent}: none of its {len(folders)} checkpoints is intact; start in another folder"
        )
    return None


def progress_of(state: Mapping[str, Any]) -> Progress:
    """Returns the progress in a checkpoint's state.json.

    Fields that an earlier version did not write have their defaults.

    Raises:
        KnltrainError: fields are missing or have wrong types.
    """
    known = {field.name: state[field.name] for field in fields(Progress) if field.name in state}
    try:
        return msgspec.convert(known, Progress)
    except msgspec.ValidationError as error:
        raise KnltrainError(f"{_STATE} of another version: {error}") from None


def read_state(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's state.json.

    Raises:
        KnltrainError: it is missing or damaged.
    """
    try:
        state = unseal(folder / _STATE)
        msgspec.convert(state, _State)
        progress_of(state)
    except (KnltrainError, msgspec.ValidationError) as error:
        raise KnltrainError(f"checkpoint {folder}: {error}") from None
    return state


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, rank: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Loads a checkpoint into a model and its optimizer.

    They may already belong to an engine, except to ``ipex``, which packs weights.

    Args:
        folder: a checkpoint that :func:`find` has returned.
        model: the checkpoint's network; changed in place.
        optimizer: the model's optimizer; its groups have their parameters' names.
        rank: the rank whose running statistics are loaded, if the checkpoint has those of ``world_size`` ranks.
        world_size: ranks of the run; if the checkpoint has another number, all ranks load the averaged statistics.

    Returns:
        The checkpoint's state.

    Raises:
        KnltrainError: a file is missing or damaged, or belongs to another network.
    """
    state = read_state(folder)
    weights = _load(folder / (_TRAINED if _TRAINED in state["files"] else _MODEL), model)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                parameter.copy_(weights[name])  # if the model has bf16 copies, these are the float32 weights
    load_optimizer(folder, optimizer)
    if _STATISTICS in state["files"]:
        _load_statistics(folder / _STATISTICS, model, rank, world_size)
    return state


def restore_average(folder: Path, model: nn.Module, *, rank: int = 0, world_size: int = 1) -> None:
    """Loads a checkpoint's moving average into its network; does nothing if the checkpoint has none.

    Raises:
        KnltrainError: a file is missing or damaged, or belongs to another network.
    """
    files = read_state(folder)["files"]
    if _TRAINED in files:
        load_weights(folder, model)
        if _STATISTICS in files:
            _load_statistics(folder / _STATISTICS, model, rank, world_size, _AVERAGE)


def load_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Loads a checkpoint's evaluated weights into a model, and returns them.

    Raises:
        KnltrainError: the file is missing or damaged, or belongs to another network.
    """
    return _load(folder / _MODEL, model)


def _load(path: Path, model: nn.Module) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise KnltrainError(
            f"checkpoint {path.parent} is of another network: {str(error).splitlines()[-1].strip()}"
        ) from None
    return tensors


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads a checkpoint's optimizer state into an optimizer whose groups have their parameters' names.

    Raises:
        KnltrainError: the file is missing or damaged, or belongs to another network.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(folder / _OPTIMIZER).items():
        name, _, entry = key.rpartition("/")
        by_name.setdefault(name, {})[entry] = tensor
    state_dict = optimizer.state_dict()
    for group, live in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for index, name, parameter in zip(group["params"], group["names"], live["params"], strict=True):
            entries = by_name.pop(name, {})
            if any(tensor.dim() and tensor.shape != parameter.shape for tensor in entries.values()):
                raise KnltrainError(f"checkpoint {folder} is of another network: {name} has another shape")
            # In the parameter's memory format: the update reads both in the same order.
            state_dict["state"][index] = {
                entry: torch.empty_like(parameter, requires_grad=False).copy_(tensor) if tensor.dim() else tensor
                for entry, tensor in entries.items()
            }
    if by_name:
        raise KnltrainError(f"checkpoint {folder} is of another network: this one has no {next(iter(by_name))}")
    optimizer.load_state_dict(state_dict)


def _load_statistics(path: Path, model: nn.Module, rank: int, world_size: int, prefix: str = "") -> None:
    buffers = dict(model.named_buffers())
    try:
        open_regular(path).close()
        with safe_open(path, "pt") as file, torch.no_grad():
            for key in file.keys():  # noqa: SIM118 - no dictionary
                if key.startswith(_AVERAGE) != bool(prefix):
                    continue
                rows = file.get_slice(key)
                if rows.get_shape()[0] != world_size:
                    return
                buffers[key.removeprefix(prefix)].copy_(rows[rank : rank + 1][0])
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
        if isinstance(error, OSError) and not says_absent(error):
            raise
        raise KnltrainError(f"{path} cannot be read: {error}") from None


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer's state tensors as ``PARAMETER/ENTRY``."""
    state_dict = optimizer.state_dict()
    return {
        f"{name}/{entry}": value
        for group in state_dict["param_groups"]
        for index, name in zip(group["params"], group["names"], strict=True)
        for entry, value in state_dict["state"].get(index, {}).items()
        if isinstance(value, Tensor)
    }


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _started_from(folder: Path) -> list[str]:
    """Returns what :func:`started_from` does; nothing for a damaged checkpoint."""
    try:
        return started_from(read_state(folder))
    except KnltrainError:
        return []


def _top1_of(folder: Path) -> float | None:
    """Returns the top-1 of a checkpoint; None if its step was not evaluated."""
    try:
        progress = progress_of(read_state(folder))
    except KnltrainError:
        return None
    return progress.top1 if progress.evaluated_step == progress.step else None
