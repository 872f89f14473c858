"""``--stage``: a copy of a prepared folder on each node's own disk or in its memory, made once and kept."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from knltrain.data.convert import checksum
from knltrain.data.folder import DataError
from knltrain.data.manifest import NAME, has_sample, read_manifest
from knltrain.errors import ConfigError, KnltrainError
from knltrain.files import replacing

_BLOCK_BYTES = 1 << 24
# How often ranks check whether all nodes are ready, and report progress.
_POLL_INTERVAL_S = 0.5
_PROGRESS_INTERVAL_S = 10.0


def stage(root: Path, into: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Copies the missing files of a prepared folder, and checks each against the manifest.

    Args:
        root: the prepared folder.
        into: a folder of this node; the copy is a folder in it, named after ``root`` and a hash of its manifest.
        progress: called with bytes copied and total bytes.

    Returns:
        The copy. Its manifest is written last, so that an incomplete copy has none.

    Raises:
        ConfigError: ``root`` was not prepared.
        DataError: a file does not match the manifest.
        KnltrainError: ``into`` has too little space, or cannot be written.
    """
    manifest = read_manifest(root)
    if manifest is None:
        raise ConfigError(f"--stage copies a folder by knltrain prepare, which {root} is not; prepare it first")
    text = (root / NAME).read_bytes()
    target = into / f"{root.resolve().name}-{hashlib.sha256(text).hexdigest()[:12]}"
    files = {shard.file: (shard.bytes, shard.sha256) for part in manifest.shards.values() for shard in part}
    files |= {
        f"{part}/labels.npy": ((root / part / "labels.npy").stat().st_size, digest)
        for part, digest in manifest.labels.items()
    }
    samples = {shard.file: shard.sample for part in manifest.shards.values() for shard in part}
    try:
        target.mkdir(parents=True, exist_ok=True)
        missing = [file for file, (size, digest) in files.items()
                   if not _is_there(target / file, size, digest, samples.get(file))]  # fmt: skip
        total = sum(files[file][0] for file in missing)
        free = shutil.disk_usage(target).free
        if total > free:
            raise KnltrainError(
                f"--stage {into}: {total / 1e9:.1f} GB are to be copied and {free / 1e9:.1f} GB are free; prepare the "
                "data as tar or in a smaller size, or omit --stage"
            )
        done = 0
        for file in missing:
            (target / file).parent.mkdir(exist_ok=True)
            done = _copy(root / file, target / file, files[file][1], done, lambda at: progress(at, total))
        # The other ranks of the node call this when the copy is complete: a manifest that they read is not rewritten.
        if not (target / NAME).exists() or (target / NAME).read_bytes() != text:
            with replacing(target / NAME) as meta:
                meta.write(text)
    except OSError as error:
        raise KnltrainError(f"--stage {into}: {error.filename or target}: {error.strerror}") from None
    return target


def _is_there(path: Path, size: int, digest: str, sample: str | None) -> bool:
    """Whether a file is what the manifest lists: by its sample, or by its checksum if it has none, as labels."""
    if not path.exists() or path.stat().st_size != size:
        return False
    return checksum(str(path)) == digest if sample is None else has_sample(path, sample)


def _copy(source: Path, target: Path, digest: str, done: int, progress: Callable[[int], None]) -> int:
    found = hashlib.sha256()
    # Not synced: the node's disk would delay the start, and what a crash takes is copied again.
    with (
        open(source, "rb", buffering=0) as read,
        replacing(target, aside=target.with_name(f"{target.name}.part"), sync=False) as write,
    ):
        while block := read.read(_BLOCK_BYTES):
            write.write(block)
            found.update(block)
            done += len(block)
            progress(done)
        if found.hexdigest() != digest:
            raise DataError(f"{source}: does not match {NAME}; copy it again, or run knltrain prepare again")
    return done


def stage_on_every_node(
    root: Path,
    into: Path,
    total: Callable[..., list[float]],
    say: Callable[[str], None],
    *,
    local_rank: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Copies on one rank of each node; all ranks wait until every node is ready, or fail together.

    Args:
        root: as for :func:`stage`.
        into: as for :func:`stage`.
        total: sums values over all ranks, as ``Group.sum``; called repeatedly, so that no collective times out.
        say: called with messages about the progress on this node.
        local_rank: this process on its node; rank 0 copies.
        stop_requested: whether this rank was asked to stop.

    Returns:
        The copy on this node; None if a rank was asked to stop before all were ready.

    Raises:
        ConfigError: as :func:`stage`.
        KnltrainError: as :func:`stage`, or another node failed.
    """
    said, aborted = time.monotonic(), threading.Event()

    def progress(done: int, all_bytes: int) -> None:
        nonlocal said
        if aborted.is_set():
            raise KnltrainError(f"--stage {into}: aborted")
        if time.monotonic() - said > _PROGRESS_INTERVAL_S:
            said = time.monotonic()
            say(f"staging: {done / 1e9:.1f} of {all_bytes / 1e9:.1f} GB")

    with ThreadPoolExecutor(1) as pool:
        copying: Future[Path] | None = pool.submit(stage, root, into, progress) if local_rank == 0 else None
        try:
            while True:
                ready = copying is None or copying.done()
                failed = copying is not None and copying.done() and copying.exception() is not None
                waiting, failures, stops = total(not ready, failed, stop_requested())
                if failures and ready and not waiting:
                    if copying is not None:
                        copying.result()
                    raise KnltrainError("another node could not stage the data; see its messages for the cause")
                if not waiting:
                    break
                if stops:
                    return None
                time.sleep(_POLL_INTERVAL_S)
        finally:
            aborted.set()  # the pool waits for its thread
    # On a rank that did not copy, this finds the existing copy.
    return copying.result() if copying else stage(root, into)
