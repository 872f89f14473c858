"""A run's state on disk: safetensors and JSON, complete or absent.

OUT/checkpoints/step-00001234/ holds model.safetensors (float32 weights and buffers), optimizer.safetensors and
state.json. It is written aside, synced and renamed, so a folder of that name is always whole.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from knltrain.errors import KnltrainError


@dataclass(frozen=True)
class Progress:
    """Where a run stands. The order of samples and all random draws follow from the step.

    Attributes:
        step: optimizer updates done.
        evaluated_step: the last step that was evaluated.
        best_top1: best evaluation so far, percent; None before the first.
        wall_s: seconds of training before this process, evaluations and checkpoints included.
    """

    step: int
    evaluated_step: int = 0
    best_top1: float | None = None
    wall_s: float = 0.0


def save(
    out: Path,
    progress: Progress,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    meta: dict[str, Any],
    keep: int,
) -> Path:
    """Writes a checkpoint and removes all but the newest ``keep``.

    Args:
        out: the run's folder.
        progress: where the run stands.
        weights: the model's float32 state, as the engine gives it.
        optimizer: of the model; its groups carry their parameters' names.
        meta: what is needed to build the model again, stored with it (model name, classes, …).
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        KnltrainError: it could not be written; nothing is left behind, older checkpoints are untouched.
    """
    folder = out / "checkpoints" / f"step-{progress.step:08}"
    aside = folder.with_name(f".{folder.name}.tmp")
    state = {**asdict(progress), **meta}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, aside / "model.safetensors")
        save_file(_optimizer_tensors(optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n", "utf-8")
        for path in [*aside.iterdir(), aside]:
            _sync(path)
        if folder.exists():  # of a run that was resumed from an earlier step
            shutil.rmtree(folder)
        aside.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise KnltrainError(f"checkpoint {folder}: {error}") from None
    for old in list_checkpoints(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def list_checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("step-*") if (path / "state.json").is_file())


def newest(folder: Path) -> Path:
    """Returns ``folder`` itself if it is a checkpoint, else the newest checkpoint of the run in it.

    Raises:
        KnltrainError: it is neither.
    """
    if (folder / "state.json").is_file():
        return folder
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise KnltrainError(f"{folder}: no checkpoint, and no run that has one")
    return checkpoints[-1]


def find(out: Path, resume: str) -> Path | None:
    """Resolves the field ``resume``: the newest checkpoint for ``auto``, none for ``never``, else the named folder.

    Raises:
        KnltrainError: the named folder holds no checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        checkpoints = list_checkpoints(out)
        return checkpoints[-1] if checkpoints else None
    return newest(Path(resume))


def progress_of(state: dict[str, Any]) -> Progress:
    """The part of a checkpoint's state.json that says where the run stood."""
    return Progress(**{field.name: state[field.name] for field in fields(Progress)})


def read_state(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's state.json.

    Raises:
        KnltrainError: it is missing or damaged.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise KnltrainError(f"checkpoint {folder}: state.json cannot be read: {error}") from None
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Loads a checkpoint's weights into a model.

    Raises:
        KnltrainError: the file is missing or damaged, or belongs to another network.
    """
    tensors = _load(folder / "model.safetensors")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise KnltrainError(
            f"checkpoint {folder} is of another network: {str(error).splitlines()[-1].strip()}"
        ) from None


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads a checkpoint's optimizer state into an optimizer whose groups carry their parameters' names.

    Raises:
        KnltrainError: the file is missing or damaged, or belongs to another network.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _load(folder / "optimizer.safetensors").items():
        name, _, entry = key.rpartition("/")
        by_name.setdefault(name, {})[entry] = tensor
    state_dict = optimizer.state_dict()
    for group, live in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for index, name, parameter in zip(group["params"], group["names"], live["params"], strict=True):
            entries = by_name.pop(name, {})
            if any(tensor.shape != parameter.shape for tensor in entries.values()):
                raise KnltrainError(f"checkpoint {folder} is of another network: {name} has another shape")
            # In the parameter's memory format: the update walks both together.
            state_dict["state"][index] = {
                entry: torch.empty_like(parameter, requires_grad=False).copy_(tensor)
                for entry, tensor in entries.items()
            }
    if by_name:
        raise KnltrainError(f"checkpoint {folder} is of another network: this one has no {next(iter(by_name))}")
    optimizer.load_state_dict(state_dict)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``PARAMETER/ENTRY``."""
    state_dict = optimizer.state_dict()
    return {
        f"{name}/{entry}": value.contiguous()
        for group in state_dict["param_groups"]
        for index, name in zip(group["params"], group["names"], strict=True)
        for entry, value in state_dict["state"].get(index, {}).items()
        if isinstance(value, Tensor)
    }


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise KnltrainError(f"{path} cannot be read: {error}") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
