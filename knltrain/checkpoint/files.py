"""Files of a checkpoint: tensors in safetensors' format, each file with its size and checksum, and all of them synced.

The format is an eight-byte length, a JSON header of that length with each tensor's type, shape and place, and the
tensors' bytes (https://huggingface.co/docs/safetensors/en/index#format). It is written here and not by the library,
which before its version 0.8 holds the interpreter's lock meanwhile, and leaves a checksum to be made in another pass.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from knltrain.errors import KnltrainError
from knltrain.files import open_regular

_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
# Large enough that Python's part of the work does not count, small enough to be in cache when it is written.
_CHUNK = 2**20


@dataclass(frozen=True)
class Sum:
    """What a file must be: its size in bytes, and the CRC-32 of these in hexadecimal."""

    bytes: int
    crc32: str


class PackedTensors:
    """A copy of tensors as a safetensors file has them: contiguous, one after the other in one piece of memory.

    Args:
        tensors: by name; what they hold is copied by :meth:`copy`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # Wide types first, so that each tensor begins at a multiple of its own.
        names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
        self._kinds = _kinds(tensors)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        places = {}
        for name in names:
            tensor, start = tensors[name], end
            end += tensor.numel() * tensor.itemsize
            places[name] = slice(start, end)
            header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._bytes = torch.empty(end, dtype=torch.uint8)
        self._views = {
            name: self._bytes[place].view(tensors[name].dtype).view(tensors[name].shape)
            for name, place in places.items()
        }

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are tensors of the same names, types and shapes."""
        return self._kinds == _kinds(tensors)

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what the tensors hold now."""
        with torch.no_grad():
            for name, view in self._views.items():
                view.copy_(tensors[name])

    def parts(self) -> list[memoryview]:
        """The file's contents, in pieces."""
        return [memoryview(self._header), self._bytes.numpy().data]


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write_file(path: Path, parts: Sequence[memoryview]) -> Sum:
    """Writes a new file, synced. All that takes time is done without the interpreter's lock.

    Raises:
        OSError: it exists, or cannot be written.
    """
    size = crc = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            for start in range(0, len(part), _CHUNK):
                chunk = part[start : start + _CHUNK]
                crc = zlib.crc32(chunk, crc)
                size += len(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Sum(size, f"{crc:08x}")


def check_file(path: Path, expected: Sum) -> None:
    """Compares a file with its size and checksum.

    Raises:
        KnltrainError: it is missing, unreadable or another one.
    """
    crc = 0
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.bytes:
                raise KnltrainError(f"{path.name} has {size:,} of {expected.bytes:,} bytes")
            while chunk := file.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
    except OSError as error:
        raise KnltrainError(f"{path.name}: {error.strerror}") from None
    if f"{crc:08x}" != expected.crc32:
        raise KnltrainError(f"{path.name} has another checksum than when it was written")


def seal(state: Mapping[str, object]) -> str:
    """JSON of an object, with a checksum of itself."""
    return json.dumps({**state, "crc32": _crc_of(state)}, indent=2) + "\n"


def unseal(path: Path) -> dict[str, object]:
    """Reads what :func:`seal` made.

    Raises:
        KnltrainError: it is missing, no JSON, or not what was written.
    """
    try:
        with open_regular(path) as file:
            state = json.load(file)
    except OSError as error:
        raise KnltrainError(f"{path.name}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise KnltrainError(f"{path.name} is no JSON") from None
    if not isinstance(state, dict) or state.pop("crc32", None) != _crc_of(state):
        raise KnltrainError(f"{path.name} has another checksum than when it was written")
    return state


def _crc_of(state: Mapping[str, object]) -> str:
    return f"{zlib.crc32(json.dumps(state, sort_keys=True).encode()):08x}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        KnltrainError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise KnltrainError(f"{path} cannot be read: {error}") from None
