"""The published CIFAR-10 archive (``cifar-10-python.tar.gz``) as a folder of images.

The archive holds pickles, which can run code when they are loaded. Here nothing of them does: an array is rebuilt from
the bytes in its pickle, and every other class or function that a pickle names is refused.
"""

from __future__ import annotations

import gzip
import io
import pickle
import secrets
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knltrain.data.folder import DataError
from knltrain.errors import ConfigError, KnltrainError
from knltrain.files import open_regular

_ROOT = "cifar-10-batches-py/"
_PARTS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
_META = "batches.meta"
_CHANNELS, _SIDE = 3, 32
_MAX_CLASSES = 1000
# The published batches have 31 MB each.
_MAX_FILE_BYTES = 1 << 26


def unpack_cifar10(archive: Path, out: Path) -> dict[str, Any]:
    """Writes the images of the archive as OUT/train/CLASS/NNNNN.png and OUT/val/CLASS/NNNNN.png.

    NNNNN counts the images of a part in the order of the archive. OUT appears when it is whole.

    Args:
        archive: ``cifar-10-python.tar.gz``.
        out: a folder that does not exist.

    Returns:
        ``out``, ``classes`` (their names) and ``counts`` (images of ``train`` and of ``val``).

    Raises:
        ConfigError: OUT exists.
        DataError: the archive cannot be read, is damaged, or is another one.
        KnltrainError: OUT cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already; give another name, or delete it")
    files = _read(archive)
    classes = _class_names(archive, files.pop(_META))
    aside = out.with_name(f"{out.name}-{secrets.token_hex(8)}.part")
    counts = {}
    try:
        for part, names in _PARTS.items():
            counts[part] = 0
            for name in classes:
                (aside / part / name).mkdir(parents=True)
            for batch in names:
                images, labels = _images(archive, batch, files.pop(batch), len(classes))
                for image, label in zip(images, labels, strict=True):
                    path = aside / part / classes[label] / f"{counts[part]:05}.png"
                    Image.fromarray(image).save(path)
                    counts[part] += 1
        aside.rename(out)
    except OSError as error:
        raise KnltrainError(f"{out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {"out": str(out), "classes": classes, "counts": counts}


def _read(archive: Path) -> dict[str, bytes]:
    """The files of the archive that are needed, by their names without the folder.

    Raises:
        DataError: it cannot be read, or lacks one of them.
    """
    wanted = {_ROOT + name: name for name in (_META, *_PARTS["train"], *_PARTS["val"])}
    found: dict[str, bytes] = {}
    try:
        with (
            open_regular(archive) as file,
            gzip.open(file) as plain,
            tarfile.open(fileobj=plain, mode="r:") as tar,
        ):
            for member in tar:
                if member.name in wanted and member.isreg():
                    if member.size > _MAX_FILE_BYTES:
                        raise DataError(f"{archive}: {member.name} has {member.size:,} bytes; not CIFAR-10's archive")
                    content = tar.extractfile(member)
                    found[wanted[member.name]] = content.read() if content else b""
            while plain.read(1 << 20):  # the checksum of all is behind the last byte
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise _damaged(archive, f"no gzipped tar file, or a damaged one ({error})") from None
    except OSError as error:
        raise DataError(f"{archive}: {error.strerror or error}") from None
    if missing := [name for name, short in wanted.items() if short not in found]:
        raise _damaged(archive, f"no {missing[0]} in it")
    return found


def _damaged(archive: Path, what: str) -> DataError:
    return DataError(f"{archive}: {what}; it takes cifar-10-python.tar.gz as it is published")


def _class_names(archive: Path, content: bytes) -> list[str]:
    found = _unpickle(archive, _META, content).get("label_names")
    names = [str(_text(name)) for name in found] if isinstance(found, list) else []
    if not 0 < len(names) <= _MAX_CLASSES or len(set(names)) < len(names) or not all(map(_is_file_name, names)):
        raise _damaged(archive, f"{_META} has no list of class names")
    return names


def _is_file_name(name: str) -> bool:
    return name.isprintable() and "/" not in name and name not in ("", ".", "..")


def _images(archive: Path, name: str, content: bytes, num_classes: int) -> tuple[NDArray[np.uint8], Sequence[int]]:
    """Images of a batch, N x 32 x 32 x 3, and their N classes."""
    batch = _unpickle(archive, name, content)
    data, labels = batch.get("data"), batch.get("labels")
    pixels = data.pixels if isinstance(data, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != _CHANNELS * _SIDE * _SIDE:
        raise _damaged(archive, f"data of {name} are not N x {_CHANNELS * _SIDE * _SIDE} bytes")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise _damaged(archive, f"{name} has not as many labels as images")
    if not all(type(label) is int and 0 <= label < num_classes for label in labels):
        raise _damaged(archive, f"a label of {name} is not one of 0 to {num_classes - 1}")
    planes = pixels.reshape(-1, _CHANNELS, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _unpickle(archive: Path, name: str, content: bytes) -> dict[Any, Any]:
    """Loads a pickled dictionary; its keys, bytes in the published files, as strings."""
    try:
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(value, dict):
            raise pickle.UnpicklingError(f"a {type(value).__name__}")
        return {_text(key): item for key, item in value.items()}
    except Exception as error:  # what a crafted pickle raises is anybody's choice
        raise _damaged(archive, f"{name} is not a batch of CIFAR-10 ({error})") from None


def _text(value: object) -> object:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


class _Dtype:
    """Stands for ``numpy.dtype`` in a pickle: of unsigned bytes, or refused."""

    def __init__(self, name: object, *_: object) -> None:
        if _text(name) not in ("u1", "|u1"):
            raise pickle.UnpicklingError(f"an array of {_text(name)}, not of unsigned bytes")

    def __setstate__(self, state: object) -> None:
        """The byte order, which bytes have none of."""


class _Array:
    """Stands for ``numpy.ndarray`` in a pickle, and for the function that makes an empty one."""

    pixels: NDArray[np.uint8] | None = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, is_fortran, raw = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a type")
        self.pixels = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C")


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Unpickler(pickle.Unpickler):
    """Loads numbers, strings, lists, dictionaries and arrays of bytes, and nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _STAND_INS[module, name]
