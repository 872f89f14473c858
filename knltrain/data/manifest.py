"""``meta.json`` of a prepared folder: what is in it, and how to tell that it is whole."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec

from knltrain.data.folder import DataError

NAME = "meta.json"
Format = Literal["raw", "tar"]


Count = Annotated[int, msgspec.Meta(ge=0)]
Part = Annotated[str, msgspec.Meta(pattern=r"^(train|val)\Z")]


class Shard(msgspec.Struct, forbid_unknown_fields=True):
    """A file of images.

    Attributes:
        file: its path in the folder.
        images: how many it holds.
        bytes: its size.
        sha256: its checksum.
    """

    file: str
    images: Count
    bytes: Count
    sha256: str


class Manifest(msgspec.Struct, kw_only=True):
    """What ``knltrain prepare`` wrote. It is written last: a folder without one is not whole.

    Attributes:
        format: raw or tar.
        size: of the short side, pixels; raw images are squares of it. 0: as they came.
        classes: names, in the order of their numbers.
        counts: images of each part.
        shards: files of each part.
        labels: raw: the checksum of each part's ``labels.npy``.
        source: tells one source from another: a hash of names and labels.
        rejected: how many images of the source are not here, see ``rejected.jsonl``.
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
        """Compares names and sizes of a part's files with what was written.

        Args:
            root: the folder.
            part: ``train`` or ``val``.
            found: the files that are there, if other files than those of the manifest would be read too.

        Raises:
            DataError: a file is missing, cut short, or one too many.
        """
        if part not in self.shards:
            raise DataError(f"{root}: it was prepared without {part}")
        for shard in self.shards[part]:
            path = root / shard.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}; copy it again, or run knltrain prepare again") from None
            if size != shard.bytes:
                raise DataError(
                    f"{path}: {size:,} bytes where {NAME} says {shard.bytes:,}; copy it again, or run knltrain prepare "
                    "again"
                )
        strangers = {path.relative_to(root).as_posix() for path in found or ()} - {s.file for s in self.shards[part]}
        if strangers:
            raise DataError(f"{root / min(strangers)}: not in {NAME}; move it elsewhere")


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a folder; None where ``knltrain prepare`` has not been.

    Raises:
        DataError: it is damaged, or preparing the folder has not finished.
    """
    if (root / JOURNAL).exists():
        raise DataError(f"{root}: knltrain prepare has not finished it; the same command goes on")
    path = root / NAME
    try:
        text = path.read_bytes()
        content = msgspec.json.decode(text)
        if not isinstance(content, dict) or not content.keys() & {"format", "shards"}:
            return None  # somebody else's: it is a common name
        manifest = msgspec.json.decode(text, type=Manifest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not what knltrain prepare writes ({error}); copy it again") from None
    outside = [shard.file for shards in manifest.shards.values() for shard in shards if not _is_inside(shard.file)]
    if outside:
        raise DataError(f"{path}: {outside[0]} is no file of this folder; prepare writes no such thing, do not use it")
    return manifest


def _is_inside(file: str) -> bool:
    """Whether a path stays in the folder that it is of, wherever that is."""
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in file


# What is finished while a folder is being prepared; gone when it is whole.
JOURNAL = "prepare.jsonl"


def encode_manifest(manifest: Manifest) -> bytes:
    """The file's text."""
    return json.dumps(msgspec.to_builtins(manifest), indent=1).encode() + b"\n"
