"""``prepare.jsonl``: the finished shards of a folder, from which an interrupted ``knltrain prepare`` resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec

from knltrain.data.manifest import JOURNAL, Count
from knltrain.errors import ConfigError
from knltrain.files import open_regular, replacing


def _is_valid(line: dict[str, Any], *, head: bool) -> bool:
    """Whether a line has its required fields: the first the settings, the others a shard."""
    if head:
        return isinstance(count := line.get("images_a_shard"), int) and count > 0
    try:
        msgspec.convert(line, _Record)
    except msgspec.ValidationError:
        return False
    return True


class _Record(msgspec.Struct):
    file: Annotated[str, msgspec.Meta(max_length=255)]
    images: Count
    bytes: Count
    sha256: str
    rejected: list[tuple[Count, str]]


class Journal:
    """A line with the settings, then a line for each finished shard.

    Attributes:
        records: finished shards by file: ``images``, ``bytes``, ``sha256``, and ``rejected``, pairs of an index in the
            shard and a reason.

    Args:
        dst: the folder.
    """

    def __init__(self, dst: Path) -> None:
        self._path = dst / JOURNAL
        self._file: IO[str] | None = None
        self.records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def begin(self, settings: dict[str, Any], images_a_shard: Callable[[], int]) -> int:
        """Reads an existing journal, or starts one; returns the number of images per shard.

        Raises:
            ConfigError: the folder was begun with other settings, or the journal is damaged.
        """
        lines: list[dict[str, Any]] = []
        if self._path.exists():
            with open_regular(self._path) as file:
                content = file.read()
            # A line that a crash truncated is not JSON.
            for text in content.splitlines():
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    break
                if not isinstance(line, dict) or not _is_valid(line, head=not lines):
                    raise ConfigError(f"{self._path} is damaged; give another folder, or delete this one")
                lines.append(line)
        if lines:
            begun = {key: lines[0].get(key) for key in settings}
            if begun != settings:
                changed = [key for key in settings if begun[key] != settings[key]]
                raise ConfigError(
                    f"{self._path.parent} was begun with another {' and '.join(changed)}; give another folder, or "
                    "delete this one"
                )
            count = int(lines[0]["images_a_shard"])
        else:
            count = int(images_a_shard())
        self.records = {line["file"]: line for line in lines[1:] if (self._path.parent / line["file"]).exists()}
        self._rewrite({**settings, "images_a_shard": count})
        return count

    def forget_rejected(self) -> None:
        """Drops the records of shards with rejected images, which are then made again."""
        self.records = {file: record for file, record in self.records.items() if not record["rejected"]}

    def forget(self, files: Iterable[str]) -> None:
        """Drops the records of shards, which are then made again."""
        for file in files:
            del self.records[file]

    def add(self, file: str, record: dict[str, Any]) -> None:
        """Records a finished shard, synced."""
        assert self._file is not None
        self.records[file] = {"file": file, **record}
        self._file.write(json.dumps(self.records[file]) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Removes the journal of a complete folder."""
        self._path.unlink()

    def _rewrite(self, head: dict[str, Any]) -> None:
        with replacing(self._path, aside=self._path.with_suffix(".part")) as file:
            file.write("".join(json.dumps(line) + "\n" for line in (head, *self.records.values())).encode())
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
