"""Files of a checkpoint: tensors in safetensors' format, with sizes and checksums, synced to disk.

The format is an eight-byte length, a JSON header of that length with each tensor's type, shape and offsets, and the
tensors' bytes (https://huggingface.co/docs/safetensors/en/index#format). It is written here and not by the library,
which before version 0.8 holds the GIL while it writes, and would need another pass for a checksum.
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
from knltrain.files import naming, open_regular, says_absent

_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
# Large enough to make Python's overhead negligible, small enough to stay in cache between checksum and write.
_CHUNK = 2**20


@dataclass(frozen=True)
class Sum:
    """Expected size of a file in bytes, and its CRC-32 in hexadecimal."""

    bytes: int
    crc32: str


class PackedTensors:
    """A copy of tensors in the layout of a safetensors file: contiguous, in one block of memory.

    Args:
        tensors: by name; only their types and shapes are used, :meth:`copy` copies their values.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # Wide types first, so that each tensor is aligned to its element size.
        names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
        self._types_and_shapes = _types_and_shapes(tensors)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        slices = {}
        for name in names:
            tensor, start = tensors[name], end
            end += tensor.numel() * tensor.itemsize
            slices[name] = slice(start, end)
            header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._bytes = torch.empty(end, dtype=torch.uint8)
        self._views = {
            name: self._bytes[part].view(tensors[name].dtype).view(tensors[name].shape) for name, part in slices.items()
        }

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors have the same names, types and shapes."""
        return self._types_and_shapes == _types_and_shapes(tensors)

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the tensors' current values."""
        with torch.no_grad():
            for name, view in self._views.items():
                view.copy_(tensors[name])

    def parts(self) -> list[memoryview]:
        """Returns the file's contents, as consecutive parts."""
        return [memoryview(self._header), self._bytes.numpy().data]


def _types_and_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write_file(path: Path, parts: Sequence[memoryview]) -> Sum:
    """Writes a new file and syncs it. Checksum, write and sync release the GIL.

    Raises:
        OSError: it exists, or cannot be written.
    """
    size = crc = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with naming(path, needed=sum(len(part) for part in parts)):
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
        KnltrainError: it is missing, or does not match.
        OSError: it cannot be read now.
    """
    crc = 0
    try:
        with naming(path), open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.bytes:
                raise KnltrainError(f"{path.name} has {size:,} of {expected.bytes:,} bytes")
            while chunk := file.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
    except OSError as error:
        raise _damage(path, error) from None
    if f"{crc:08x}" != expected.crc32:
        raise KnltrainError(f"{path.name} does not match its checksum")


def seal(state: Mapping[str, object]) -> str:
    """Returns an object as JSON, with a checksum of itself."""
    return json.dumps({**state, "crc32": _crc32(state)}, indent=2) + "\n"


def unseal(path: Path) -> dict[str, object]:
    """Reads a file of :func:`seal`'s JSON, and checks its checksum.

    Raises:
        KnltrainError: it is missing, not JSON, or does not match its checksum.
        OSError: it cannot be read now.
    """
    try:
        with naming(path), open_regular(path) as file:
            state = json.load(file)
    except OSError as error:
        raise _damage(path, error) from None
    except (ValueError, RecursionError):
        raise KnltrainError(f"{path.name} is not JSON") from None
    if not isinstance(state, dict) or state.pop("crc32", None) != _crc32(state):
        raise KnltrainError(f"{path.name} does not match its checksum")
    return state


def _damage(path: Path, error: OSError) -> KnltrainError | OSError:
    """Returns what to raise for a file that could not be read: damage only where it is missing."""
    return KnltrainError(f"{path.name}: {error.strerror}") if says_absent(error) else error


def _crc32(state: Mapping[str, object]) -> str:
    return f"{zlib.crc32(json.dumps(state, sort_keys=True).encode()):08x}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        KnltrainError: it is missing or damaged.
        OSError: it cannot be read now.
    """
    try:
        open_regular(path).close()  # its errors are of the kind that they are, those of safetensors are not
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, OSError) and not says_absent(error):
            raise
        raise KnltrainError(f"{path} cannot be read: {error}") from None
