"""The index of tar files: where in them every image is, and its label. It is made once and kept beside them."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knltrain.data.folder import SUFFIXES
from knltrain.data.left_out import LeftOut, ignored_in
from knltrain.errors import DataError
from knltrain.files import cache_folder, open_regular, replacing

# Part of an index's file name: indexes of other versions are not read.
_VERSION = 3
MAX_CLASSES = 1 << 20
_MAX_LABEL_BYTES = 64  # of a .cls file
_MAX_JSON_BYTES = 1 << 20
# Where a .json beside an image has its class number: datasets of the Hugging Face hub, and those of others.
_JSON_KEYS = ("label", "cls")
# Shards are compared with their index in parallel: on a parallel file system each takes milliseconds.
_NUM_THREADS = 8
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


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
        if kind := _COMPRESSED.get(os.pread(file.fileno(), 2, begin)):
            raise DataError(
                f"{file.name}: compressed with {kind}; images are read from anywhere in it: decompress it"
            ) from None
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


class Index(NamedTuple):
    """Where the images of a part are, and what of its tar files is left out.

    Attributes:
        images: their locations.
        remarks: sentences for people.
    """

    images: TarIndex
    remarks: tuple[str, ...]


def open_index(root: Path, part: str, shards: Sequence[Path]) -> Index:
    """Reads the index of shards, or creates it beside them, or in the cache folder if they are read-only.

    An index is used only if the shards are as they were when it was made: size, both times, and a sample of their
    bytes. An older shard that is put back with its time has another time of the last change (ctime), which nobody sets.

    Raises:
        DataError: a shard cannot be read, is damaged, or holds an image without its class.
    """
    if not shards:
        empty = np.empty(0, np.int64)
        return Index(TarIndex(empty, empty, empty, empty), ())
    names = np.array([path.name for path in shards])
    stamps = _stamps(shards)
    beside = root / f"{part}-index-v{_VERSION}.npz"
    elsewhere = cache_folder() / f"tar-{sha256(str(root.resolve()).encode()).hexdigest()[:16]}-{beside.name}"
    for path in (beside, elsewhere):
        index = _read_index(path, shards, names, stamps)
        if index is not None:
            return index
    index = _make_index(part, shards)
    for path in (beside, elsewhere):
        if _write_index(path, shards, names, stamps, index):
            break
    return index


def _stamps(shards: Sequence[Path]) -> NDArray[np.int64]:
    def stamp(path: Path) -> tuple[int, int, int]:
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; see that it can be read") from None
        return state.st_size, state.st_mtime_ns, state.st_ctime_ns

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return np.array(list(pool.map(stamp, shards)))


def _probes(shards: Sequence[Path], index: TarIndex) -> NDArray[np.uint64]:
    """Hashes what is around one image of each shard: its header, and its label before or behind it."""
    first = np.searchsorted(index.shard, np.arange(len(shards)))
    last = np.searchsorted(index.shard, np.arange(len(shards)), "right")

    def probe(number: int) -> int:
        begin = end = 0
        if first[number] < last[number]:
            middle = (first[number] + last[number]) // 2
            begin = int(index.offset[middle])
            end = begin - -int(index.size[middle]) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        try:
            with open_regular(shards[number], buffering=0) as file:
                before = os.pread(file.fileno(), 3 * tarfile.BLOCKSIZE, max(0, begin - 3 * tarfile.BLOCKSIZE))
                behind = os.pread(file.fileno(), 2 * tarfile.BLOCKSIZE, end)
        except OSError as error:
            raise DataError(f"{shards[number]}: {error.strerror}; see that it can be read") from None
        return int.from_bytes(sha256(before + behind).digest()[:8], "little")

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return np.array(list(pool.map(probe, range(len(shards)))), np.uint64)


def _read_index(path: Path, shards: Sequence[Path], names: NDArray[np.str_], stamps: NDArray[np.int64]) -> Index | None:
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            if not np.array_equal(arrays["names"], names) or not np.array_equal(arrays["stamps"], stamps):
                return None
            images = TarIndex(*(arrays[field].astype(np.int64, casting="safe") for field in TarIndex._fields))
            if not _fits(images, stamps[:, 0]) or not np.array_equal(arrays["probes"], _probes(shards, images)):
                return None
            return Index(images, tuple(map(str, arrays["remarks"])))
    except DataError:  # a shard, not the index
        raise
    except Exception:  # NumPy and zipfile raise many types for damage; the index is created again
        return None


def _fits(index: TarIndex, sizes: NDArray[np.int64]) -> bool:
    """Whether an index, which is not trusted, is valid for shards of these sizes in bytes."""
    if not all(column.ndim == 1 and 0 < len(column) == len(index.label) and column.min() >= 0 for column in index):
        return False
    if index.shard.max() >= len(sizes) or index.label.max() >= MAX_CLASSES or index.offset.min() < tarfile.BLOCKSIZE:
        return False
    return bool((index.size <= sizes[index.shard] - index.offset).all())


def _write_index(
    path: Path, shards: Sequence[Path], names: NDArray[np.str_], stamps: NDArray[np.int64], index: Index
) -> bool:
    probes, remarks = _probes(shards, index.images), np.array(index.remarks, np.str_)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, names=names, stamps=stamps, probes=probes, remarks=remarks, **index.images._asdict())
    except OSError:
        return False
    return True


def _make_index(part: str, shards: Sequence[Path]) -> Index:
    rows: list[tuple[int, int, int, int]] = []
    left_out = LeftOut()
    for number, path in enumerate(shards):
        try:
            with open_regular(path) as file:
                rows.extend((number, image.offset, image.size, label) for image, label in _labelled(file, left_out))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; see that it can be read") from None
    if not rows:
        raise DataError(f"{shards[0].parent}: no images in its tar files ({', '.join(SUFFIXES)} are read)")
    table = np.array(rows, np.int64)
    images = TarIndex(*(np.ascontiguousarray(column) for column in table.T))
    return Index(images, left_out.remarks(f"{part} tar files in {shards[0].parent}"))


def _labelled(file: IO[bytes], left_out: LeftOut) -> Iterator[tuple[Member, int]]:
    """Yields the images of a shard with their labels."""
    for sample in _samples(file, left_out):
        images = [member for suffix, member in sample if f".{suffix}" in SUFFIXES]
        if len(images) > 1:
            raise DataError(
                f"{file.name}: {images[0].name} and {images[1].name} are two images of one sample; leave one out, or "
                "give them names that differ before the first dot"
            )
        if images:
            yield images[0], _label(file, images[0], sample)
        elif not any(left_out.see(f"x.{suffix}") for suffix, _ in sample):
            left_out.without_image += any(suffix in ("cls", "cls.txt") for suffix, _ in sample)


def _samples(file: IO[bytes], left_out: LeftOut) -> Iterator[list[tuple[str, Member]]]:
    """Yields the files of each sample, with what of their names is behind the first dot, in lower case.

    Files of a sample have the same key, the name before that dot, and are consecutive.
    """
    key, sample = "", list[tuple[str, Member]]()
    for member in members(file):
        if ignored := ignored_in(member.name):
            left_out.ignore(ignored)
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if f"{folder}/{stem}" != key and sample:
            yield sample
            sample = []
        key = f"{folder}/{stem}"
        sample.append((suffix.lower(), member))
    if sample:
        yield sample


def _label(file: IO[bytes], image: Member, sample: Sequence[tuple[str, Member]]) -> int:
    files = dict(sample)
    member = files.get("cls") or files.get("cls.txt")
    if member is not None:
        text = os.pread(file.fileno(), min(member.size, _MAX_LABEL_BYTES), member.offset)
        if not text.strip().isdigit() or int(text) >= MAX_CLASSES:
            raise DataError(
                f"{file.name}: {member.name} holds {text[:20]!r}, no class number from 0 to {MAX_CLASSES - 1:,}"
            )
        return int(text)
    if "json" in files and (label := _label_in_json(file, files["json"])) is not None:
        return label
    others = ", ".join(sorted(f".{suffix}" for suffix in files if f".{suffix}" not in SUFFIXES)) or "nothing"
    raise DataError(
        f"{file.name}: {image.name} has no .cls beside it, nor a .json with a class number as {_JSON_KEYS[0]!r}, but "
        f"{others}; a tar file of class folders is to be unpacked"
    )


def _label_in_json(file: IO[bytes], member: Member) -> int | None:
    try:
        content = json.loads(os.pread(file.fileno(), min(member.size, _MAX_JSON_BYTES), member.offset))
    except (ValueError, RecursionError):
        return None
    values = [content.get(key) for key in _JSON_KEYS] if isinstance(content, dict) else []
    return next((value for value in values if type(value) is int and 0 <= value < MAX_CLASSES), None)
