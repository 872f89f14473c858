"""``prepare.jsonl``: how far a folder that is being prepared is, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from knltrain.data.manifest import JOURNAL
from knltrain.errors import ConfigError


class Journal:
    """What is being prepared, then a line for each finished shard.

    Attributes:
        records: of the finished shards, by file: ``images``, ``bytes``, ``sha256``, and ``rejected``, pairs of a place
            in the shard and a reason.

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
        """Reads what is there, or starts anew; returns the number of images of a shard.

        Raises:
            ConfigError: something else is being prepared there.
        """
        lines = []
        if self._path.exists():
            # A line that was being written when the machine went down is no JSON.
            for text in self._path.read_text("utf-8").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    break
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
        """Shards that bad images are missing from are made again."""
        self.records = {file: record for file, record in self.records.items() if not record["rejected"]}

    def add(self, file: str, record: dict[str, Any]) -> None:
        """Notes that a shard is finished."""
        assert self._file is not None
        self.records[file] = {"file": file, **record}
        self._file.write(json.dumps(self.records[file]) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """The folder is whole."""
        self._path.unlink()

    def _rewrite(self, head: dict[str, Any]) -> None:
        aside = self._path.with_suffix(".part")
        aside.write_text("".join(json.dumps(line) + "\n" for line in (head, *self.records.values())), "utf-8")
        os.replace(aside, self._path)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
