"""Initial weights: read from files of this project and of others, and matched to a network.

No code in a file is executed: safetensors holds only bytes, and pickles are read by torch's weights-only unpickler.
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
from knltrain.files import open_regular
from knltrain.runlog.console import Console
from knltrain.weights.metadata import is_safetensors

# Names that torch's own wrappers put before those of what they wrap: DataParallel and its kin, torch.compile.
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod)\.")
# The counter that torch.optim.swa_utils.AveragedModel keeps beside the network.
_AVERAGED = "n_averaged"
_MAX_NAMED = 3


def initialize(
    model: nn.Module, config: RunConfig, out: Path, group: Group, console: Console, *, resumed: bool
) -> dict[str, Any] | None:
    """Loads ``init_from`` into a new run's model; a resumed run loads its weights from its checkpoint.

    Args:
        model: the initialised network, changed in place.
        config: the configuration, with ``init_from`` or without.
        out: the run's folder.
        group: the ranks; rank 0 reads the file first.
        console: for messages.
        resumed: whether the run is resumed from a checkpoint.

    Returns:
        For config.json: the file, its SHA-256, and the names of tensors not loaded from it; None without a file.

    Raises:
        KnltrainError: the file is missing or damaged, belongs to another network, or differs between ranks.
        ConfigError: the run in OUT started from the same file with other contents.
    """
    if not config.init_from:
        return None
    if resumed:
        return _recorded(config, out, console) if group.is_first else None
    if not group.is_first:
        group.barrier()  # rank 0 reads first, so that an error is reported once
    path = find(Path(config.init_from), console.warn)
    digest = checksum(str(path))
    fresh = load(path, model)
    if group.is_first:
        group.barrier()
    require_same_file(f"init-from {path}", digest, group)
    console.line(f"starts from {path}" + (f"; {' and '.join(fresh)} start fresh: other classes" if fresh else ""))
    return {"file": str(path), "sha256": digest, "fresh": fresh}


def require_same_file(what: str, digest: str, group: Group) -> None:
    """Compares the checksums of the file on all ranks. All ranks call it at once.

    Raises:
        KnltrainError: they differ; the message starts with ``what``.
    """
    rows = group.gather(torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))
    if (rows != rows[0]).any():
        raise KnltrainError(f"{what}: ranks read different files; it must be the same on all nodes")


def find(path: Path, say: Callable[[str], None]) -> Path:
    """Returns the file of weights at a path: the file itself, or that of a checkpoint or a run's newest checkpoint.

    Args:
        path: a file, a checkpoint, or a run's folder.
        say: called with a message for each checkpoint that was passed over.

    Raises:
        KnltrainError: there is none.
    """
    if path.is_dir():
        path = checkpoint.newest(path, say) / "model.safetensors"
    if not path.exists():
        raise KnltrainError(f"init-from {path}: no such file")
    if not path.is_file():  # opening a pipe would block
        raise KnltrainError(f"init-from {path}: neither a file nor the folder of a run")
    return path


def load(path: Path, model: nn.Module) -> list[str]:
    """Loads a file of weights into a model.

    Names may have a prefix (``module.``, ``_orig_mod.``, ``model.``), also one beside others, as in a file of Lightning
    that has a loss too. If only the last layer has another number of outputs, it
    keeps its initial weights, for training on other classes. Batch norm's counter may be missing, as in older files.

    Returns:
        The names of the last layer's tensors if they keep their initial values, otherwise an empty list.

    Raises:
        KnltrainError: the file is damaged, or of another network; the model is then unchanged.
    """
    expected = model.state_dict()
    tensors = _of_the_network(path, read(path), expected)
    missing = [name for name in expected if name not in tensors and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [name for name, own in expected.items() if name in tensors and tensors[name].shape != own.shape]
    fresh = misshapen if _is_head(misshapen, tensors, model) else []
    shapes = [f"{_quote(name)} {_shape(tensors[name])} instead of {_shape(expected[name])}" for name in misshapen]
    problems = [
        f"{what} {_first_few(items)}"
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
            raise KnltrainError(f"{path}: {_quote(name)} contains NaN or Inf")
    model.load_state_dict(kept, strict=False)
    return fresh


def read(path: Path) -> dict[object, dict[str, Tensor]]:
    """Reads the state dicts of a file: safetensors, or by ``torch.save``, bare or in a training program's file.

    Returns:
        By its name in the file, each state dict; mostly there is one.

    Raises:
        KnltrainError: the file is damaged, or holds something else.
        OSError: it cannot be read now.
    """
    if path.is_file():
        open_regular(path).close()  # its errors are of the kind that they are, those of the libraries are not
    if is_safetensors(path):
        try:
            return {"": load_file(path)}
        except (OSError, SafetensorError) as error:
            raise KnltrainError(f"{path} cannot be read as safetensors: {_first_line(error)}") from None
    content = _unpickled(path)
    if found := _state_dicts(content):
        return found
    if not isinstance(content, dict) or not content:
        raise KnltrainError(f"{path}: no state dict in it")
    for name, value in content.items():
        if not (isinstance(name, str) and _is_dense_cpu_tensor(value)):
            raise KnltrainError(f"{path}: no state dict, because {_quote(name)} is not a dense CPU tensor")
    return {"": content}


def _unpickled(path: Path) -> object:
    """Returns what ``torch.save`` wrote, if it is tensors and plain values."""
    try:
        # Checkpoints of torchvision's training reference hold their arguments as Namespace, a class without behaviour.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            content: object = torch.load(path, map_location="cpu", weights_only=True)
            return content
    except Exception as error:  # torch raises many types for damaged files
        # torch's message advises to load the file with arbitrary code execution; it is not passed on.
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise KnltrainError(
                f"{path} holds {_quote(refused[1])} beside tensors, which is not executed; save only a state dict, "
                "preferably as safetensors"
            ) from None
        reason = _first_line(error) if isinstance(error, OSError) else "damaged, or not tensors by torch.save"
        raise KnltrainError(f"{path} cannot be read as a state dict: {reason}") from None


def _state_dicts(content: object) -> dict[object, dict[str, Tensor]]:
    """Returns the state dicts of a training program's file by their names in it; none of a bare state dict.

    torchvision's reference calls the network's ``model``, Lightning and timm ``state_dict``, others
    ``model_state_dict``, ``net`` or ``module``. A moving average is one beside it.
    """
    if not isinstance(content, dict):
        return {}
    return {
        name: value for name, value in content.items()
        if isinstance(value, dict) and value
        and all(isinstance(key, str) and _is_dense_cpu_tensor(tensor) for key, tensor in value.items())
    }  # fmt: skip


def _is_dense_cpu_tensor(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.device.type == "cpu"
        and value.layout == torch.strided
    )


def _recorded(config: RunConfig, out: Path, console: Console) -> dict[str, Any] | None:
    """Returns the record of the file in the run's config.json, if the file is unchanged or gone."""
    try:
        record: dict[str, Any] | None = json.loads((out / "config.json").read_text("utf-8"))["init_from"]
    except (FileNotFoundError, ValueError, KeyError):
        record = None
    if record is None:
        console.warn("init-from has no effect: the run resumes from a checkpoint")
    elif os.path.isfile(record["file"]) and checksum(record["file"]) != record["sha256"]:
        raise ConfigError(f"{out} holds a run that started from another {record['file']}; give another --out")
    return record


def _of_the_network(
    path: Path, found: dict[object, dict[str, Tensor]], expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the network's tensors by its own names, of which those in the file may have a prefix.

    Raises:
        KnltrainError: there are several state dicts or prefixes, and none of them has more of these names than others.
    """
    needed = [name for name in expected if not name.endswith(".num_batches_tracked")]
    candidates = {
        (name, prefix): {key.removeprefix(prefix): tensor for key, tensor in plain.items() if key.startswith(prefix)}
        for name, tensors in found.items()
        for plain in [_without_wrappers(tensors)]
        for prefix in {key.removesuffix(needed[0]) for key in plain if f".{key}".endswith(f".{needed[0]}")} or {""}
    }
    # Of several the one that has the most; what it lacks is said by whoever loads it.
    has = {place: sum(name in tensors for name in needed) for place, tensors in candidates.items()}
    fitting = {place: tensors for place, tensors in candidates.items() if has[place] == max(has.values())}
    if len(fitting) > 1:
        places = ", ".join(sorted(_quote(": ".join(filter(None, map(str, place)))) for place in fitting))
        raise KnltrainError(
            f"{path} holds several networks ({places}); save the one that is meant, as by "
            "torch.save(torch.load(FILE, weights_only=True)[NAME], NEW_FILE)"
        )
    return next(iter(fitting.values()))


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = {_WRAPPERS.sub(r"\1", _WRAPPERS.sub(r"\1", name)): tensor for name, tensor in tensors.items()}
    if plain.keys() == tensors.keys():
        return tensors
    plain.pop(_AVERAGED, None)
    return plain


def _is_head(names: list[str], tensors: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether these are all tensors of the last layer, and differ only in the number of outputs."""
    path, last = [
        (path, m) for path, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None
    ][-1]
    own = {f"{path}.{name}": parameter for name, parameter in last.named_parameters(recurse=False)}
    return set(names) == own.keys() and all(
        tensors[name].dim() == own[name].dim() and tensors[name].shape[1:] == own[name].shape[1:] for name in names
    )


def _first_few(items: list[str]) -> str:
    more = len(items) - _MAX_NAMED
    return ", ".join(items[:_MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _quote(name: object) -> str:
    """Returns an untrusted name from a file, escaped and shortened for a message."""
    return f"{name!a:.100}"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{lines[0] if lines else type(error).__name__:.200}"
