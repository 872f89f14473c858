"""``meta.json``, the manifest of a prepared folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec

from knltrain.data.folder import DataError
from knltrain.files import open_regular

NAME = "meta.json"
Format = Literal["raw", "tar"]
# Blocks of a file that are compared at every start: few, and read in parallel, as a parallel file system likes it.
_NUM_SAMPLES = 5
_SAMPLE_BYTES = 4096
_NUM_THREADS = 8


Count = Annotated[int, msgspec.Meta(ge=0)]
Part = Annotated[str, msgspec.Meta(pattern=r"^(train|val)\Z")]


class Shard(msgspec.Struct, forbid_unknown_fields=True):
    """A file of images.

    Attributes:
        file: path in the folder.
        images: number of images.
        bytes: file size.
        sha256: checksum.
        sample: hash of a few blocks, which is compared whenever the file is used; empty in older manifests.
    """

    file: str
    images: Count
    bytes: Count
    sha256: str
    sample: str = ""


class Manifest(msgspec.Struct, kw_only=True):
    """Contents of a folder that ``knltrain prepare`` wrote. Written last: a folder without it is incomplete.

    Attributes:
        format: raw or tar.
        size: short side, pixels; raw images are squares. 0 if images were not resized.
        classes: names, in the order of their numbers.
        counts: images of each part.
        shards: files of each part.
        labels: raw: checksum of each part's ``labels.npy``.
        source: hash of the source's names and labels.
        rejected: number of images of the source that were left out, see ``rejected.jsonl``.
    """

    format: Format
    size: Annotated[int, msgspec.Meta(ge=0, le=16384)]
    classes: list[str]
    counts: dict[Part, Count]
    shards: dict[Part, list[Shard]]
    labels: dict[Part, str] = {}
    source: str = ""
    rejected: Count = 0

    def check_shards(self, root: Path, part: str, found: list[Path] | None = None) -> None:
        """Compares names, sizes and samples of a part's files with the manifest.

        Args:
            root: the folder.
            part: ``train`` or ``val``.
            found: the existing files, to find files that are not in the manifest.

        Raises:
            DataError: a file is missing, is another than that in the manifest, or is not in it.
        """
        if part not in self.shards:
            raise DataError(f"{root}: it was prepared without {part}")
        for shard in self.shards[part]:
            path = root / shard.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}; {remedy(error)}") from None
            if size != shard.bytes:
                raise DataError(
                    f"{path}: {size:,} bytes where {NAME} says {shard.bytes:,}; copy it again, or run knltrain prepare "
                    "again"
                )
        self._check_samples(root, part)
        strangers = {path.relative_to(root).as_posix() for path in found or ()} - {s.file for s in self.shards[part]}
        if strangers:
            raise DataError(f"{root / min(strangers)}: not in {NAME}; move it elsewhere")

    def _check_samples(self, root: Path, part: str) -> None:
        """Refuses files of the right size that are of another preparation."""
        shards = self.shards[part]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            fits = list(pool.map(lambda shard: has_sample(root / shard.file, shard.sample), shards))
        for shard, fit in zip(shards, fits, strict=True):
            if not fit:
                raise DataError(
                    f"{root / shard.file}: not the file that {NAME} lists, but of the same size; copy it again, or run "
                    "knltrain prepare again"
                )

    def part_sha256(self, part: str) -> str:
        """Returns a hash of a part's files, by their checksums; equal for a copy of the folder."""
        files = msgspec.json.encode((self.format, self.size, self.shards[part], self.labels.get(part)))
        return hashlib.sha256(files).hexdigest()


def sample_of(path: Path) -> str:
    """Returns a hash of a few blocks of a file, evenly spread.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path, buffering=0) as file:
            last = max(0, os.fstat(file.fileno()).st_size - _SAMPLE_BYTES)
            for number in range(_NUM_SAMPLES):
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, last * number // (_NUM_SAMPLES - 1)))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {remedy(error)}") from None
    return digest.hexdigest()


def has_sample(path: Path, sample: str) -> bool:
    """Whether a file is that of a sample, as far as that tells; an older manifest has none.

    Raises:
        DataError: it cannot be read.
    """
    return not sample or sample_of(path) == sample


def remedy(error: OSError) -> str:
    """Returns what to do about a file of a prepared folder that cannot be read."""
    if error.errno == errno.ENOENT:
        return "copy it again, or run knltrain prepare again"
    return "see that it can be read"


def read_manifest(root: Path) -> Manifest | None:
    """Reads the manifest of a folder; returns None if ``knltrain prepare`` did not write it.

    Raises:
        DataError: it is damaged, or ``knltrain prepare`` has not finished.
    """
    try:
        is_unfinished = (root / JOURNAL).exists()
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}; see that it can be read") from None
    if is_unfinished:
        raise DataError(f"{root}: knltrain prepare has not finished it; run the same command again to continue")
    path = root / NAME
    try:
        text = path.read_bytes()
        content = msgspec.json.decode(text)
        if not isinstance(content, dict) or not content.keys() & {"format", "shards"}:
            return None  # another program's: it is a common name
        manifest = msgspec.json.decode(text, type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; see that it can be read") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not what knltrain prepare writes ({error}); copy it again") from None
    outside = [shard.file for shards in manifest.shards.values() for shard in shards if not _is_inside(shard.file)]
    if outside:
        raise DataError(
            f"{path}: {outside[0]} is not a file of this folder; prepare does not write such paths, do not use it"
        )
    return manifest


def _is_inside(file: str) -> bool:
    """Whether a relative path stays inside its folder."""
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in file


# The journal of finished shards; removed when the folder is complete.
JOURNAL = "prepare.jsonl"


def encode_manifest(manifest: Manifest) -> bytes:
    """Returns the contents of the file."""
    return json.dumps(msgspec.to_builtins(manifest), indent=1).encode() + b"\n"
