"""Weights that a run starts from: read from files of this project and of others, and matched to a network.

Nothing in a file is executed: safetensors holds bytes alone, and pickles are read by torch's unpickler for tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from knltrain import checkpoint
from knltrain.comm.group import Group
from knltrain.config import RunConfig
from knltrain.data.convert import checksum
from knltrain.errors import ConfigError, KnltrainError
from knltrain.runlog.console import Console

# Under which names programs put a state dict beside other things: torchvision's training reference, and Lightning.
_WRAPPERS = ("model", "state_dict")
_NAMED = 3


def initialize(
    model: nn.Module, config: RunConfig, out: Path, group: Group, console: Console, *, resumed: bool
) -> dict[str, Any] | None:
    """Loads ``init_from`` into a new run's model; a run that goes on has its weights from its checkpoint.

    Args:
        model: the network with weights of its own, changed in place.
        config: names the file, or none.
        out: the run's folder.
        group: the ranks; the first reads the file before the others do.
        console: where to speak.
        resumed: the run goes on from a checkpoint.

    Returns:
        For config.json: the file, its SHA-256, and the tensors that it did not give; None where there is no file.

    Raises:
        KnltrainError: the file is missing or damaged, belongs to another network, or differs from rank to rank.
        ConfigError: the run in OUT started from the same file with another content.
    """
    if not config.init_from:
        return None
    if resumed:
        return _recorded(config, out, console) if group.is_first else None
    if not group.is_first:
        group.barrier()  # rank 0 goes first, so that what is wrong with the file is said once
    path = find(Path(config.init_from), console.warn)
    digest = checksum(str(path))
    fresh = load(path, model)
    if group.is_first:
        group.barrier()
    refuse_different(f"init-from {path}", digest, group)
    console.line(f"starts from {path}" + (f"; {' and '.join(fresh)} start fresh: other classes" if fresh else ""))
    return {"file": str(path), "sha256": digest, "fresh": fresh}


def refuse_different(what: str, digest: str, group: Group) -> None:
    """Compares the checksums of the files that ranks have read.

    Raises:
        KnltrainError: they differ; begins with ``what``.
    """
    number = int(digest[:8], 16)
    if group.sum(number) != [number * group.world_size]:
        raise KnltrainError(f"{what}: ranks read different files; it must be the same on all nodes")


def find(path: Path, say: Callable[[str], None]) -> Path:
    """Returns the file of weights that a path means: itself, or the newest of a run's or a checkpoint's folder.

    Args:
        path: a file, a checkpoint, or a run's folder.
        say: told of each checkpoint that was passed over, and why.

    Raises:
        KnltrainError: there is none.
    """
    if path.is_dir():
        path = checkpoint.newest(path, say) / "model.safetensors"
    if not path.exists():
        raise KnltrainError(f"init-from {path}: no such file")
    if not path.is_file():  # a pipe would be waited for
        raise KnltrainError(f"init-from {path}: neither a file nor the folder of a run")
    return path


def load(path: Path, model: nn.Module) -> list[str]:
    """Loads a file of weights into a model.

    Names may have a prefix that all share (``module.``, ``model.``). Where the last layer alone has another number of
    outputs, it keeps the model's own weights: the start of training on other classes. Batch norm's counter, which
    older files lack, may be missing.

    Returns:
        The names of the last layer's tensors where they are the model's own, else nothing.

    Raises:
        KnltrainError: the file is damaged, or of another network; the model is then unchanged.
    """
    expected = model.state_dict()
    tensors = _without_prefix(read(path), expected)
    missing = [name for name in expected if name not in tensors and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [name for name, own in expected.items() if name in tensors and tensors[name].shape != own.shape]
    fresh = misshapen if _is_head(misshapen, tensors, model) else []
    shapes = [f"{_quote(name)} {_by(tensors[name])} instead of {_by(expected[name])}" for name in misshapen]
    problems = [
        f"{what} {_some(items)}"
        for what, items in (
            ("missing", [_quote(name) for name in missing]),
            ("unknown", [_quote(name) for name in unexpected]),
            ("of another shape", [] if fresh else shapes),
        )
        if items
    ]
    if problems:
        raise KnltrainError(f"{path} is of another network: {'; '.join(problems)}")
    kept = {name: tensor for name, tensor in tensors.items() if name not in fresh}
    for name, tensor in kept.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise KnltrainError(f"{path}: {_quote(name)} is {tensor.dtype}, not {expected[name].dtype}")
        if not torch.isfinite(tensor).all():
            raise KnltrainError(f"{path}: {_quote(name)} holds values that are no finite numbers")
    model.load_state_dict(kept, strict=False)
    return fresh


def read(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a file: safetensors by its suffix, else what ``torch.save`` wrote of a state dict.

    Raises:
        KnltrainError: the file cannot be read, or holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise KnltrainError(f"{path} cannot be read as safetensors: {_line(error)}") from None
    try:
        # Namespace is what torchvision's training reference keeps its arguments in: a class without behaviour.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises on damaged files is of every kind
        # Its advice is not passed on: to read the file again with everything in it executed.
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise KnltrainError(
                f"{path} holds {_quote(refused[1])} beside tensors, which is not executed; save a state dict "
                "alone, best as safetensors"
            ) from None
        reason = _line(error) if isinstance(error, OSError) else "damaged, or nothing that torch.save wrote of tensors"
        raise KnltrainError(f"{path} cannot be read as a state dict: {reason}") from None
    if isinstance(content, dict):
        content = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not content:
        raise KnltrainError(f"{path}: no state dict in it")
    for name, value in content.items():
        if not (isinstance(name, str) and _is_plain(value)):
            raise KnltrainError(f"{path}: no state dict, for {_quote(name)} is no tensor in memory")
    return content


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.device.type == "cpu"
        and value.layout == torch.strided
    )


def _recorded(config: RunConfig, out: Path, console: Console) -> dict[str, Any] | None:
    """What the run's config.json has of the file, if the file still is what it was, or is gone."""
    try:
        record: dict[str, Any] | None = json.loads((out / "config.json").read_text("utf-8"))["init_from"]
    except (OSError, ValueError, KeyError):
        record = None
    if record is None:
        console.warn("init-from has no effect: the run goes on from a checkpoint")
    elif os.path.isfile(record["file"]) and checksum(record["file"]) != record["sha256"]:
        raise ConfigError(f"{out} holds a run that started from another {record['file']}; give another --out")
    return record


def _without_prefix(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes away what all names begin with, as long as none is the network's."""
    while not tensors.keys() & expected.keys():
        prefixes = {name.partition(".")[0] for name in tensors}
        if len(prefixes) != 1 or not all("." in name for name in tensors):
            break
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    return tensors


def _is_head(names: list[str], tensors: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether these are all tensors of the last layer, with another number of outputs and nothing else."""
    path, last = [
        (path, m) for path, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None
    ][-1]
    own = {f"{path}.{name}": parameter for name, parameter in last.named_parameters(recurse=False)}
    return set(names) == own.keys() and all(
        tensors[name].dim() == own[name].dim() and tensors[name].shape[1:] == own[name].shape[1:] for name in names
    )


def _some(items: list[str]) -> str:
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _by(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _quote(name: object) -> str:
    """A name out of a file, which may be of any length and hold anything, for a line."""
    return f"{name!a:.100}"


def _line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{lines[0] if lines else type(error).__name__:.200}"
