"""Export of trained networks to a state dict, ONNX or torch.export, verified by reading the file again."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from knltrain import checkpoint
from knltrain.config import RunConfig
from knltrain.errors import ConfigError, KnltrainError
from knltrain.files import naming, replacing_path
from knltrain.models import model_of
from knltrain.models.alexnet import LocalResponseNorm
from knltrain.ops.crops import MEAN, STD
from knltrain.ops.lrn import BETA
from knltrain.runlog.console import Console
from knltrain.weights.metadata import About, as_trained

FORMATS = ("safetensors", "pth", "onnx", "pt2")
# Tolerances for float32 sums in another order: relative to the largest logit, and absolute.
_RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE = 1e-4, 1e-5
# Limit of protocol buffers, ONNX's format.
_MAX_ONNX_BYTES = 2**31 - 1
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_METADATA_FILE = "knltrain.json"


def export(folder: Path, dst: Path, console: Console, *, format: str | None = None) -> dict[str, Any]:
    """Writes a checkpoint's network to a file, in float32 and in evaluation mode.

    The file is written under a temporary name and read again, and its logits for random images are compared with the
    network's before it is renamed.

    Args:
        folder: a checkpoint, or a run's folder, whose newest checkpoint is used.
        dst: the file; it must not exist.
        console: for messages about checkpoints that were passed over.
        format: ``safetensors`` or ``pth``, a state dict with the names of ``knltrain.models``, which are torchvision's
            for ``resnet50`` and ``torchvision:NAME``; ``onnx`` or ``pt2``, with the program, for N x 3 x S x S
            normalised images with any N. By default the suffix of ``dst``.

    Returns:
        The written file's properties, and the largest difference of a logit.

    Raises:
        ConfigError: unknown format, a package for it is missing, or ``dst`` exists.
        KnltrainError: there is no valid checkpoint; the network cannot be written in this format, or the file gives
            other logits. No file is left behind.
    """
    kind = format or dst.suffix.removeprefix(".")
    _check_request(dst, kind)
    folder = checkpoint.newest(folder, console.warn)
    state = checkpoint.read_state(folder)
    config = as_trained(RunConfig(), state)
    model = _network(config, len(state["classes"]))
    checkpoint.load_weights(folder, model)
    images = torch.randn(3, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    about = {
        **About(config.model, state["classes"], config.image_size, config.resize).as_metadata(),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
    }
    try:
        with replacing_path(dst, aside=dst.with_name(f".{dst.name}.tmp")) as aside:
            with torch.no_grad(), _quiet():
                expected = model(images)
                _write(model, images[:2], aside, kind, about)
                logits = _read(aside, kind, _network(config, len(state["classes"])), images)
            difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
            if not difference <= _ABSOLUTE_TOLERANCE + _RELATIVE_TOLERANCE * largest:
                raise KnltrainError(
                    f"{dst}: {kind} gives other logits than {folder}: they differ by {difference:.3g} where the "
                    f"largest is {largest:.3g}; nothing was written"
                )
            num_bytes = aside.stat().st_size
    except (KnltrainError, OSError):
        raise
    except Exception as error:  # exporters raise many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise KnltrainError(f"{dst}: {config.model} cannot be written as {kind}: {lines[0]:.300}") from None
    return {
        "checkpoint": str(folder),
        "out": str(dst),
        "format": kind,
        "model": config.model,
        "num_classes": len(state["classes"]),
        "bytes": num_bytes,
        "max_difference": difference,
        "largest_logit": largest,
    }


def _check_request(dst: Path, format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"{dst}: its suffix is not a format; use .{', .'.join(FORMATS)}, or give --format")
    if os.path.lexists(dst):
        raise ConfigError(f"{dst} exists already; give another name, or delete it")
    if not dst.parent.is_dir():
        raise ConfigError(f"{dst}: no folder {dst.parent}")
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise ConfigError(f"{dst}: {' and '.join(missing)} not installed; pip install 'knltrain[export]'")


def _network(config: RunConfig, num_classes: int) -> nn.Module:
    """Returns a network in evaluation mode, with contiguous weights."""
    model: nn.Module = model_of(config, num_classes).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def _write(model: nn.Module, images: Tensor, path: Path, format: str, about: dict[str, str]) -> None:
    # In memory first: on a full disk torch's writers end the process or hide the reason, and safetensors' own writes a
    # file that only this user can read.
    content = _serialized(model, images, format, about)
    with naming(path, needed=len(content)), open(path, "wb") as file:
        file.write(content)


def _serialized(model: nn.Module, images: Tensor, format: str, about: dict[str, str]) -> bytes | memoryview:
    """Returns the contents of the file."""
    if format == "safetensors":
        return serialize(model.state_dict(), metadata={"format": "pt", **about})
    memory = io.BytesIO()
    if format == "pth":
        torch.save(model.state_dict(), memory)
        return memory.getbuffer()
    program = torch.export.export(
        _with_torch_operators(model), (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    if format == "onnx":
        return _as_onnx(program, about)
    torch.export.save(program, memory, extra_files={_METADATA_FILE: json.dumps(about)})
    return memory.getbuffer()


def _as_onnx(program: torch.export.ExportedProgram, about: dict[str, str]) -> bytes:
    num_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    if num_bytes > _MAX_ONNX_BYTES:
        raise ValueError(f"its weights are {num_bytes / 2**30:.1f} GiB, and an ONNX file can hold 2; use pt2")
    translated = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    assert translated is not None
    translated.model.metadata_props.update(about)
    content: bytes = translated.model_proto.SerializeToString()
    return content


def _read(path: Path, format: str, fresh: nn.Module, images: Tensor) -> Tensor:
    """Returns the logits of a written file."""
    logits: Tensor
    if format == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # With an explicit number, ONNX Runtime does not set the affinity of its threads.
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (result,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(result)
    if format == "pt2":
        with open(path, "rb") as file:
            logits = torch.export.load(file).module()(images)
        return logits
    fresh.load_state_dict(load_file(path) if format == "safetensors" else torch.load(path, weights_only=True))
    logits = fresh(images)
    return logits


def _with_torch_operators(model: nn.Module) -> nn.Module:
    """Replaces layers whose operators only this package has by torch's."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LocalResponseNorm):
                setattr(module, name, nn.LocalResponseNorm(5, alpha=1e-4, beta=BETA, k=1.0))
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings of exporters about their internals and unused operators."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
