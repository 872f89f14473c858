"""WebDataset's tar shards: an index is created once, then each sample is one read."""

from __future__ import annotations

import errno
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knltrain.data.decode import DecodeError, EncodedImage, is_bad, refuse_long
from knltrain.data.folder import SUFFIXES, DataError, check_some
from knltrain.data.manifest import NAME, read_manifest
from knltrain.files import cache_folder, open_regular, replacing

# Part of an index's file name: indexes of other versions are not read.
_VERSION = 2
MAX_CLASSES = 1 << 20
_MAX_LABEL_BYTES = 64  # of a .cls file


class Member(NamedTuple):
    """A file in a tar file: its name, and the location of its bytes."""

    name: str
    offset: int
    size: int


def members(file: IO[bytes], begin: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yields the regular files of the tar file in the bytes [begin, end) of ``file``.

    Raises:
        DataError: it is not a tar file, or truncated.
    """
    end = os.fstat(file.fileno()).st_size if end is None else end
    file.seek(begin)
    behind, last = begin, "its beginning"
    try:
        # Not "r:*": a compressed tar has no random access.
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all in memory
                size = info.size if info.isfile() else 0
                if size < 0 or info.offset_data < behind:
                    raise DataError(f"{file.name}: damaged at {info.name}; copy this file again")
                if info.offset_data + size > end:
                    raise DataError(f"{file.name}: cut short within {info.name}; copy this file again")
                if info.issparse():
                    raise DataError(f"{file.name}: {info.name} is stored with gaps (sparse); write it without")
                if info.isfile():
                    yield Member(info.name, info.offset_data, size)
                behind, last = info.offset_data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, info.name
    except RecursionError:
        raise DataError(f"{file.name}: a thousand headers without a file behind {last}; copy this file again") from None
    # ValueError: from malformed numbers in headers, which tarfile does not check.
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{file.name}: no tar file, or a damaged one ({error}); copy this file again") from None
    # tarfile ends at any invalid block. The true end is a block of zeros.
    file.seek(behind)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{file.name}: cut short or damaged behind {last}; copy this file again")


class TarIndex(NamedTuple):
    """Locations of images in tar files, with an entry for each image.

    Attributes:
        shard: number of the tar file.
        offset: offset of the image in it, bytes.
        size: size of the image, bytes.
        label: class number.
    """

    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]


def shards_of(root: Path, part: str) -> list[Path]:
    """Returns the tar files of a part by name: ``train-00000.tar``, ``train_0.tar`` or ``train/0.tar``."""
    named = [path for path in root.glob("*.tar") if re.match(rf"{part}\b|{part}_", path.name)]
    return sorted(path for path in [*named, *(root / part).glob("*.tar")] if not path.is_dir())


class Tar:
    """One part (``train`` or ``val``) of a folder of WebDataset shards: ``KEY.jpg`` beside ``KEY.cls``.

    Attributes:
        classes: names if ``knltrain prepare`` wrote the folder, otherwise numbers.
        labels: class number of every image.

    Args:
        root: the folder.
        part: ``train`` or ``val``.

    Raises:
        DataError: a shard is missing, damaged, or holds an image without its class, or two in one sample.
    """

    def __init__(self, root: Path, part: str) -> None:
        self._paths = shards_of(root, part)
        manifest = read_manifest(root)
        self._part, self._manifest = part, manifest
        if manifest is not None:
            manifest.check_shards(root, part, self._paths)
        elif not self._paths:
            raise DataError(f"{root}: no {part}-*.tar in it")
        self._index = _open_index(root, part, self._paths)
        self.labels = self._index.label
        if manifest is not None:
            self.classes = tuple(manifest.classes)
            images = sum(shard.images for shard in manifest.shards[part])
            if len(self) != images or (len(self) and self.labels.max() >= len(self.classes)):
                raise DataError(f"{root}: {part} does not hold what {NAME} says; copy it again")
        else:
            # Both parts have the number of classes that their largest label needs.
            others = [_open_index(root, other, shards_of(root, other)) for other in ("train", "val") if other != part]
            self.classes = _numbers_as_classes([self._index, *others])
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns shard and sample, for error messages."""
        path, offset = self._paths[self._index.shard[index]], int(self._index.offset[index])
        try:
            with open(path, "rb") as file:
                file.seek(offset - tarfile.BLOCKSIZE)
                inside = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape").name
        except (OSError, ValueError, tarfile.TarError):
            inside = f"sample {index}"
        return f"{path}: {inside}"

    def where(self, index: int) -> tuple[str, int, int]:
        """Returns the location of an image: path, offset, size."""
        at = int(self._index.shard[index])
        return str(self._paths[at]), int(self._index.offset[index]), int(self._index.size[index])

    def image(self, index: int) -> EncodedImage:
        """Reads an image.

        Raises:
            DecodeError: it is not an image, or the shard is truncated.
            OSError: the shard cannot be read, or the image is more than 1 GiB.
        """
        path, offset, size = self.where(index)
        refuse_long(size, path)
        data = self._pread(int(self._index.shard[index]), size, offset)
        if len(data) < size:
            raise DecodeError("the shard is cut short here")
        return EncodedImage(data)

    def check(self, count: int) -> None:
        """Decodes ``count`` images, evenly spread; raises DataError for a bad one."""
        check_some(self, count)

    def bad(self, index: int, error: DecodeError | OSError) -> DataError:
        """Returns the error for an image that cannot be used."""
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "copy the shard again, or pass --on-bad skip" if is_bad(error) else "see that the shard can be read"
        return DataError(f"{self.name(index)}: {reason}; {remedy}")

    def files_sha256(self) -> str:
        """Returns a hash of the manifest's checksums, or of the shards' names and their index."""
        if self._manifest is not None:
            return self._manifest.part_sha256(self._part)
        digest = sha256("\n".join(path.name for path in self._paths).encode(errors="surrogateescape"))
        for column in self._index:
            digest.update(column.tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Closes the shards."""
        with self._lock:
            self._close_files()

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        with self._lock:
            try:
                file = self._dup_open(shard)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._files:
                    raise
                self._close_files()  # more shards than a process may have open
                file = self._dup_open(shard)
        try:
            return os.pread(file, size, offset)
        finally:
            os.close(file)

    def _dup_open(self, shard: int) -> int:
        """Returns a descriptor of the shard for one read, valid even if another thread closes the shard."""
        if shard not in self._files:
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_NONBLOCK)
        return os.dup(self._files[shard])

    def _close_files(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def _numbers_as_classes(indexes: list[TarIndex]) -> tuple[str, ...]:
    count = 1 + max(int(index.label.max()) for index in indexes if len(index.label))
    return tuple(str(number) for number in range(count))


def _open_index(root: Path, part: str, shards: list[Path]) -> TarIndex:
    """Reads the index of shards, or creates it beside them, or in the cache folder if they are read-only."""
    if not shards:
        empty = np.empty(0, np.int64)
        return TarIndex(empty, empty, empty, empty)
    names = np.array([path.name for path in shards])
    states = [path.stat() for path in shards]
    stamp = np.array([(state.st_size, state.st_mtime_ns) for state in states])
    beside = root / f"{part}-index-v{_VERSION}.npz"
    elsewhere = cache_folder() / f"tar-{sha256(str(root.resolve()).encode()).hexdigest()[:16]}-{beside.name}"
    for path in (beside, elsewhere):
        index = _read_index(path, names, stamp)
        if index is not None:
            return index
    index = _make_index(shards)
    for path in (beside, elsewhere):
        if _write_index(path, names, stamp, index):
            break
    return index


def _read_index(path: Path, names: NDArray[np.str_], stamp: NDArray[np.int64]) -> TarIndex | None:
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            # A copied folder has other times; sizes must fit.
            if np.array_equal(arrays["names"], names) and np.array_equal(arrays["stamp"][:, 0], stamp[:, 0]):
                index = TarIndex(*(arrays[field].astype(np.int64, casting="safe") for field in TarIndex._fields))
                if not (stamp[:, 1] > arrays["made_ns"]).any() and _fits(index, stamp[:, 0]):
                    return index
    except FileNotFoundError:
        pass
    except Exception:  # NumPy and zipfile raise many types for damage; the index is created again
        pass
    return None


def _fits(index: TarIndex, sizes: NDArray[np.int64]) -> bool:
    """Whether an index, which is not trusted, is valid for shards of these sizes in bytes."""
    if not all(column.ndim == 1 and 0 < len(column) == len(index.label) and column.min() >= 0 for column in index):
        return False
    if index.shard.max() >= len(sizes) or index.label.max() >= MAX_CLASSES or index.offset.min() < tarfile.BLOCKSIZE:
        return False
    return bool((index.size <= sizes[index.shard] - index.offset).all())


def _write_index(path: Path, names: NDArray[np.str_], stamp: NDArray[np.int64], index: TarIndex) -> bool:
    made_ns = np.int64(max(stamp[:, 1].max(), 0))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, names=names, stamp=stamp, made_ns=made_ns, **index._asdict())
    except OSError:
        return False
    return True


def _make_index(shards: list[Path]) -> TarIndex:
    rows: list[tuple[int, int, int, int]] = []
    for number, path in enumerate(shards):
        try:
            with open_regular(path) as file:
                rows.extend((number, image.offset, image.size, label) for image, label in _samples(file))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
    if not rows:
        raise DataError(f"{shards[0].parent}: no images in its tar files ({', '.join(SUFFIXES)} are read)")
    table = np.array(rows, np.int64)
    return TarIndex(*(np.ascontiguousarray(column) for column in table.T))


def _samples(file: IO[bytes]) -> Iterator[tuple[Member, int]]:
    """Yields the images of a shard with their labels. Files of a sample have the same key and are consecutive."""
    key, image, label = "", None, None
    for member in (*members(file), Member("", 0, 0)):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if f"{folder}/{stem}" != key:
            if image is not None:
                if label is None:
                    raise DataError(f"{file.name}: {image.name} has no .cls beside it")
                yield image, label
            key, image, label = f"{folder}/{stem}", None, None
        if f".{extension.lower()}" in SUFFIXES:
            if image is not None:
                raise DataError(
                    f"{file.name}: {image.name} and {member.name} are two images of one sample; leave one out, or give "
                    "them names that differ before the first dot"
                )
            image = member
        elif extension == "cls":
            text = os.pread(file.fileno(), min(member.size, _MAX_LABEL_BYTES), member.offset)
            if not text.strip().isdigit() or int(text) >= MAX_CLASSES:
                raise DataError(
                    f"{file.name}: {member.name} holds {text[:20]!r}, no class number from 0 to {MAX_CLASSES - 1:,}"
                )
            label = int(text)
