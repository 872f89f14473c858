"""``knltrain prepare``: converts a data set to few large files, decoded and checked once.

A journal in the folder lists finished shards, so that an interrupted run can resume. The manifest is written last, and
the journal removed after it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from knltrain.data.classes import ALL_CLASSES, ClassChoice
from knltrain.data.convert import Encoded, checksum, exit_with_parent, finish_squares, jpegs, short_sides, squares_into
from knltrain.data.folder import DataError
from knltrain.data.journal import Journal
from knltrain.data.manifest import (
    JOURNAL,
    NAME,
    Format,
    Manifest,
    Shard,
    encode_manifest,
    read_manifest,
    sample_of,
)
from knltrain.data.order import permutation
from knltrain.data.parts import NAMES, instead
from knltrain.data.sources import Source, find_sources
from knltrain.errors import ConfigError, KnltrainError
from knltrain.files import replacing
from knltrain.launch.signals import run_before_end
from knltrain.runlog.console import Console, ImageProgress

REJECTED = "rejected.jsonl"
# Parallel file systems are efficient with few large files.
_SHARD_BYTES = 1 << 30
# Images per task of a worker.
_CHUNK_IMAGES = 32
# Files whose times are compared: threads wait for the file server, each for some files at a time.
_CHUNK_FILES = 256
_NUM_THREADS = 8
# Images sampled to estimate encoded sizes.
_NUM_SAMPLED = 64


@dataclass(frozen=True)
class _Job:
    """One shard: images [first, stop) of a part, in stored order."""

    part: str
    number: int
    first: int
    stop: int
    file: str


class _Plan:
    """The shards of a folder and the order of their images, the same in every run."""

    def __init__(self, sources: dict[str, Source], format: Format, images_a_shard: int) -> None:
        self.sources, self.format = sources, format
        # Shuffled, for readers that read shards sequentially.
        self.orders = {part: permutation(0, 0, len(source.labels)) for part, source in sources.items()}
        self.jobs = [
            _Job(part, number, first, min(first + images_a_shard, len(order)), _shard_name(part, number, format))
            for part, order in self.orders.items()
            for number, first in enumerate(range(0, len(order), images_a_shard))
        ]

    def where(self, job: _Job, first: int, stop: int) -> list[tuple[str, int, int]]:
        source = self.sources[job.part]
        return [source.where(sample) for sample in self.orders[job.part][first:stop].tolist()]

    def name(self, job: _Job, place: int) -> str:
        return self.sources[job.part].name(int(self.orders[job.part][job.first + place]))

    def labels(self, job: _Job) -> NDArray[np.int64]:
        return self.sources[job.part].labels[self.orders[job.part][job.first : job.stop]]


def _shard_name(part: str, number: int, format: Format) -> str:
    return f"{part}/images-{number:05}.npy" if format == "raw" else f"{part}-{number:05}.tar"


def prepare(
    src: Path, dst: Path, console: Console, *, format: Format, size: int, workers: int | None, on_bad: str,
    choice: ClassChoice = ALL_CLASSES,
) -> dict[str, Any]:  # fmt: skip
    """Converts ``src`` to ``dst``; resumes an interrupted earlier call.

    Args:
        src: a folder of images, of tar shards, or of ImageNet's archives; see :mod:`knltrain.data.sources`.
        dst: a folder that does not exist, is empty, or was begun by the same call.
        console: for messages and progress.
        format: ``raw``, squares of pixels, or ``tar``, JPEGs.
        size: short side, pixels; 0 with ``tar`` keeps images as they are.
        workers: processes; by default one for each CPU that this process may use.
        on_bad: ``fail`` or ``skip``, for images that cannot be decoded.
        choice: which classes are used, and their order.

    Returns:
        The manifest's counts and ``rejected``, with ``bytes``, ``seconds`` and ``images_per_s`` of this call.

    Raises:
        ConfigError: the arguments contradict each other, or ``dst`` has other contents.
        DataError: ``src`` cannot be read; with ``fail``, images of it cannot be decoded.
        KnltrainError: a disk, or this machine's memory, failed; the same call resumes.
    """
    if format == "raw" and size == 0:
        raise ConfigError("--size 0 with --format raw: raw images need one size; use --format tar, or give a size")
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    _refuse_nested(src, dst)
    done = _finished_manifest(dst, format, size)
    sources = find_sources(src, choice)
    _say_what_is_left_out(src, sources, console)
    settings: dict[str, Any] = {"format": format, "size": size, "source": _fingerprint(sources)}
    if done is not None:
        if done.source != settings["source"]:
            raise ConfigError(f"{dst} was made from other images than {src}; give another folder")
        _refuse_changed(src, dst, sources, console)
        without = f" without {done.rejected:,} images that {REJECTED} lists" if done.rejected else ""
        console.line(f"{dst} is complete{without}; knltrain prepare --verify {dst} compares its checksums")
        return _summary(done, dst, 0, 0.0)
    dst.mkdir(parents=True, exist_ok=True)
    with _explain_errors(dst, console), _pool(workers) as pool, Journal(dst) as journal:
        images_a_shard = journal.begin(settings, lambda: _images_per_shard(pool, sources, format, size))
        plan = _Plan(sources, format, images_a_shard)
        if on_bad == "fail":
            journal.forget_rejected()  # they may have been replaced
        _forget_outdated(plan, journal, dst, console)
        _refuse_full_disk(dst, plan, journal, size)
        sides = pool.submit(short_sides, _sample(sources)).result()
        if format == "raw" and sides and (usual := int(np.median(sides))) < size:
            console.warn(
                f"most images have a short side of {usual} pixels or less and are enlarged to {size}; --size {usual} "
                "avoids that"
            )
        left = [job for job in plan.jobs if job.file not in journal.records]
        total = sum(len(order) for order in plan.orders.values())
        before = total - sum(job.stop - job.first for job in left)
        if before:
            console.line(f"resuming after {before:,} of {total:,} images")
        with ImageProgress(console, first=before, total=total) as progress:
            writer = _write_squares if format == "raw" else _write_tars
            for job, record in writer(plan, left, dst, size, pool, workers, progress):
                journal.add(job.file, record)
        rejected = _list_rejected(plan, journal, dst)
        if rejected and on_bad == "fail":
            raise DataError(
                f"{rejected} of {total:,} images cannot be decoded; {dst / REJECTED} lists them. Replace them, or "
                "leave them out with --on-bad skip, and run the same command again"
            )
        manifest = _finish(plan, journal, dst, size, settings["source"], rejected)
        return _summary(manifest, dst, total - before, progress.seconds)


def verify(dst: Path, console: Console, *, workers: int | None = None) -> dict[str, Any]:
    """Compares every file of a prepared folder with its checksum.

    Raises:
        DataError: the folder is incomplete, or a file does not match its checksum.
    """
    manifest = read_manifest(dst)
    if manifest is None:
        raise DataError(f"{dst}: no {NAME}; not a folder by knltrain prepare")
    files = {shard.file: shard.sha256 for part in manifest.shards.values() for shard in part}
    files |= {f"{part}/labels.npy": digest for part, digest in manifest.labels.items()}
    for part in manifest.shards:
        manifest.check_shards(dst, part)
    bad = []
    with _pool(workers or len(os.sched_getaffinity(0))) as pool:
        futures = {file: pool.submit(checksum, str(dst / file)) for file in files}
        with ImageProgress(console, first=0, total=len(files), unit="files") as progress:
            for file, future in futures.items():
                if future.result() != files[file]:
                    bad.append(file)
                progress.add(1)
    if bad:
        raise DataError(
            f"{dst / bad[0]}: does not match its checksum{f', nor do {len(bad) - 1} other files' if bad[1:] else ''}; "
            "copy it again, or delete the folder and run knltrain prepare again"
        )
    console.line(f"{dst}: {len(files)} files, {sum(manifest.counts.values()):,} images, all checksums match")
    return _summary(manifest, dst, 0, progress.seconds)


def _refuse_nested(src: Path, dst: Path) -> None:
    inner, outer = dst.resolve(), src.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ConfigError(f"{dst} and {src}: one lies within the other; give a folder elsewhere")


def _finished_manifest(dst: Path, format: Format, size: int) -> Manifest | None:
    """Returns the manifest of a complete folder; None if there is work to do."""
    if not dst.exists() or (dst / JOURNAL).exists():
        return None
    if not dst.is_dir():
        raise ConfigError(f"{dst}: a file; give a folder")
    manifest = read_manifest(dst)
    if manifest is None:
        if any(dst.iterdir()):
            raise ConfigError(f"{dst}: not empty, and not a folder by knltrain prepare; give another folder")
        return None
    if (manifest.format, manifest.size) != (format, size):
        raise ConfigError(
            f"{dst} holds format {manifest.format} of size {manifest.size}; give another folder, or delete this one"
        )
    return manifest


def _fingerprint(sources: dict[str, Source]) -> str:
    """Returns a hash of names and labels, which determine the order of images."""
    digest = sha256()
    for part, source in sorted(sources.items()):
        digest.update(json.dumps([part, source.classes]).encode())
        digest.update(np.ascontiguousarray(source.labels).tobytes())
        for index in range(len(source.labels)):
            path, offset, _ = source.where(index)
            digest.update(f"{Path(path).name}:{offset}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _say_what_is_left_out(src: Path, sources: dict[str, Source], console: Console) -> None:
    for remark in dict.fromkeys(remark for source in sources.values() for remark in source.remarks):
        console.warn(remark)
    for part in NAMES.keys() - sources.keys():
        console.warn(
            f"{src} has no {part} part, which training needs: only {' and '.join(sources)} is prepared"
            f"{instead(src, part)}"
        )


def _refuse_changed(src: Path, dst: Path, sources: dict[str, Source], console: Console) -> None:
    """Compares the times of the source's files with that of a complete folder.

    Raises:
        ConfigError: files were written after it.
    """
    made_ns = (dst / NAME).stat().st_mtime_ns
    files = {source.where(index)[0] for source in sources.values() for index in range(len(source.labels))}
    changed = changed_since(sorted(files), made_ns)
    if not changed:
        return
    path, written = max(changed, key=lambda one: one[1])
    count, remedy = f"{len(changed):,} in all", "give another folder, or delete this one to make it again"
    if written:
        raise ConfigError(f"{path} was written after {dst} was made ({count}); {remedy}")
    console.warn(
        f"{path} was put there, renamed or given other rights after {dst} was made ({count}); if it is another image "
        f"than before, {remedy}"
    )


def _forget_outdated(plan: _Plan, journal: Journal, dst: Path, console: Console) -> None:
    """Has the finished shards made again of which images have changed since."""
    outdated = []
    for job in plan.jobs:
        if job.file in journal.records:
            files = {path for path, _, _ in plan.where(job, job.first, job.stop)}
            if changed_since(sorted(files), (dst / job.file).stat().st_mtime_ns):
                outdated.append(job.file)
    if outdated:
        journal.forget(outdated)
        console.line(f"shards that are made again, because images of them have changed: {len(outdated):,}")


def changed_since(paths: Sequence[str], since_ns: int) -> list[tuple[str, bool]]:
    """Returns the files that have changed since a time, each with whether it was written since.

    The time of the last change (ctime) decides, which nobody sets: an older file that is put back keeps its time of
    writing (mtime), and images may bring one that lies in the future.

    Raises:
        OSError: a file cannot be looked at.
    """

    def look(some: Sequence[str]) -> list[tuple[str, bool]]:
        states = [(path, os.stat(path)) for path in some]
        return [(path, state.st_mtime_ns > since_ns) for path, state in states if state.st_ctime_ns > since_ns]

    chunks = [paths[first : first + _CHUNK_FILES] for first in range(0, len(paths), _CHUNK_FILES)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return [one for found in pool.map(look, chunks) for one in found]


def _sample(sources: dict[str, Source]) -> list[tuple[str, int, int]]:
    """Returns the locations of a sample of images."""
    source = max(sources.values(), key=lambda source: len(source.labels))
    chosen = np.unique(np.linspace(0, len(source.labels) - 1, _NUM_SAMPLED).astype(int)).tolist()
    return [source.where(sample) for sample in chosen]


@contextlib.contextmanager
def _explain_errors(dst: Path, console: Console) -> Iterator[None]:
    """Says how to resume: where a signal ends it, and in the KnltrainErrors that errors of disks and workers become."""
    unfinished = [f"{dst} is not finished; the same command goes on from there"]

    def say() -> None:
        while unfinished:
            console.line(unfinished.pop())

    run_before_end(say)  # for SIGTERM, which raises nothing here
    try:
        yield
    except KeyboardInterrupt:
        say()
        raise
    except BrokenProcessPool:
        raise KnltrainError(
            "a worker process was killed, perhaps for lack of memory; run the same command again to resume"
        ) from None
    except OSError as error:
        raise KnltrainError(
            f"{error.filename or dst}: {error.strerror or error}; run the same command again to resume"
        ) from None
    finally:
        unfinished.clear()


def _images_per_shard(pool: ProcessPoolExecutor, sources: dict[str, Source], format: Format, size: int) -> int:
    if format == "raw":
        return max(1, _SHARD_BYTES // (size * size * 3))
    encoded = pool.submit(jpegs, _sample(sources), size).result()
    sizes = [len(one.data) + 4 * tarfile.BLOCKSIZE for one in encoded if isinstance(one, Encoded)]
    return max(1, _SHARD_BYTES * len(sizes) // sum(sizes)) if sizes else 1 << 14


def _refuse_full_disk(dst: Path, plan: _Plan, journal: Journal, size: int) -> None:
    """Checks the free space for raw files, whose size is known in advance."""
    if plan.format != "raw":
        return
    needed = sum(job.stop - job.first for job in plan.jobs if job.file not in journal.records) * size * size * 3
    # Shards that an interrupted run has left unfinished will be overwritten.
    free = shutil.disk_usage(dst).free + sum(path.stat().st_blocks * 512 for path in dst.glob("*/*.part"))
    if needed > free:
        raise KnltrainError(
            f"{dst}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; --format tar takes a seventh"
        )


def _write_squares(
    plan: _Plan,
    jobs: list[_Job],
    dst: Path,
    size: int,
    pool: ProcessPoolExecutor,
    workers: int,
    progress: ImageProgress,
) -> Iterator[tuple[_Job, dict[str, Any]]]:
    """Workers write their images into the shard's file, and one of them closes the gaps of rejected images."""
    waiting: deque[tuple[_Job, Future[Any], bool]] = deque()
    reasons: dict[str, list[str | None]] = {job.file: [] for job in jobs}

    def pop_result() -> Iterator[tuple[_Job, dict[str, Any]]]:
        job, future, last = waiting.popleft()
        if last:
            size_bytes, digest = future.result()
            yield job, _record(size_bytes, digest, reasons.pop(job.file))
            return
        found = future.result()
        reasons[job.file] += found
        progress.add(len(found))

    for job in jobs:
        path = dst / f"{job.file}.part"
        path.parent.mkdir(exist_ok=True)
        count = job.stop - job.first
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, _HEADER_BYTES + count * size * size * 3)
        for first in range(job.first, job.stop, _CHUNK_IMAGES):
            images = plan.where(job, first, min(first + _CHUNK_IMAGES, job.stop))
            at = _HEADER_BYTES + (first - job.first) * size * size * 3
            waiting.append((job, pool.submit(squares_into, str(path), at, images, size), False))
            while len(waiting) > 4 * workers:
                yield from pop_result()
        while any(one is job for one, _, _ in waiting):
            yield from pop_result()
        gaps = [place for place, reason in enumerate(reasons[job.file]) if reason]
        waiting.append((job, pool.submit(finish_squares, str(path), str(dst / job.file), count, gaps, size), True))
    while waiting:
        yield from pop_result()


# Size of the header of a .npy file, padded, for any number and size of images.
_HEADER_BYTES = 128


def _write_tars(
    plan: _Plan,
    jobs: list[_Job],
    dst: Path,
    size: int,
    pool: ProcessPoolExecutor,
    workers: int,
    progress: ImageProgress,
) -> Iterator[tuple[_Job, dict[str, Any]]]:
    """Workers encode images, this process writes them."""

    def chunks() -> Iterator[tuple[_Job, int, Future[list[Encoded | str]]]]:
        for job in jobs:
            for first in range(job.first, job.stop, _CHUNK_IMAGES):
                images = plan.where(job, first, min(first + _CHUNK_IMAGES, job.stop))
                yield job, first, pool.submit(jpegs, images, size)

    ahead: deque[tuple[_Job, int, Future[list[Encoded | str]]]] = deque()
    source = chunks()

    def next_chunk() -> tuple[_Job, int, Future[list[Encoded | str]]]:
        while len(ahead) < 4 * workers and (one := next(source, None)) is not None:
            ahead.append(one)
        return ahead.popleft()

    for job in jobs:
        labels = plan.labels(job)
        reasons: list[str | None] = []
        with replacing(dst / job.file, aside=dst / f"{job.file}.part") as file:
            tar = _TarWriter(file)
            for _ in range(job.first, job.stop, _CHUNK_IMAGES):
                _, first, future = next_chunk()
                for place, encoded in enumerate(future.result(), first - job.first):
                    if isinstance(encoded, str):
                        reasons.append(encoded)
                        continue
                    reasons.append(None)
                    key = f"{job.part}-{job.first + place:08}"
                    tar.add(f"{key}.{encoded.suffix}", encoded.data)
                    tar.add(f"{key}.cls", str(labels[place]).encode())
                progress.add(min(_CHUNK_IMAGES, job.stop - first))
            tar.end()
            record = _record(file.tell(), tar.digest.hexdigest(), reasons)
        yield job, record


class _TarWriter:
    """Writes a reproducible tar file, and computes its checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = sha256()

    def add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))

    def end(self) -> None:
        self._write(bytes(2 * tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)


def _record(num_bytes: int, digest: str, reasons: list[str | None]) -> dict[str, Any]:
    rejected = [[place, reason] for place, reason in enumerate(reasons) if reason is not None]
    return {"images": len(reasons) - len(rejected), "bytes": num_bytes, "sha256": digest, "rejected": rejected}


def _list_rejected(plan: _Plan, journal: Journal, dst: Path) -> int:
    """Writes ``rejected.jsonl``, or removes it if no image was rejected; returns their number."""
    lines = [
        json.dumps({"path": plan.name(job, place), "reason": reason})
        for job in plan.jobs
        for place, reason in journal.records[job.file]["rejected"]
    ]
    if lines:
        (dst / REJECTED).write_text("\n".join(lines) + "\n", "utf-8")
    else:
        (dst / REJECTED).unlink(missing_ok=True)
    return len(lines)


def _finish(plan: _Plan, journal: Journal, dst: Path, size: int, source: str, rejected: int) -> Manifest:
    shards: dict[str, list[Shard]] = {part: [] for part in plan.sources}
    labels: dict[str, list[NDArray[np.int64]]] = {part: [] for part in plan.sources}
    for job in plan.jobs:
        record = journal.records[job.file]
        sample = sample_of(dst / job.file)
        shards[job.part].append(Shard(job.file, record["images"], record["bytes"], record["sha256"], sample))
        labels[job.part].append(np.delete(plan.labels(job), [place for place, _ in record["rejected"]]))
    digests = {}
    if plan.format == "raw":
        for part, arrays in labels.items():
            path = dst / part / "labels.npy"
            with replacing(path, aside=path.with_suffix(".part")) as file:
                np.save(file, np.concatenate(arrays))
            digests[part] = checksum(str(path))
    manifest = Manifest(
        format=plan.format,
        size=size,
        classes=list(next(iter(plan.sources.values())).classes),
        counts={part: sum(shard.images for shard in of_part) for part, of_part in shards.items()},
        shards=shards,
        labels=digests,
        source=source,
        rejected=rejected,
    )
    with replacing(dst / NAME, aside=dst / f"{NAME}.part") as file:
        file.write(encode_manifest(manifest))
    journal.remove()
    return manifest


_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class _Pool(ProcessPoolExecutor):
    """Worker processes that ignore Ctrl-C and SIGTERM, which terminals and Slurm send to all: this one handles them."""

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        # submit() starts processes, which inherit blocked signals. A signal here is deferred until the task is written
        # to them; Python would otherwise handle it at once, whichever thread receives it.
        deferred: list[int] = []
        handlers = {one: signal.signal(one, lambda number, _: deferred.append(number)) for one in _SIGNALS}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            future = super().submit(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for one, handler in handlers.items():
                signal.signal(one, handler)
        for number in deferred:
            signal.raise_signal(number)
        return future


def _pool(workers: int) -> _Pool:
    return _Pool(workers, multiprocessing.get_context("spawn"), exit_with_parent, (os.getpid(),))


def _summary(manifest: Manifest, dst: Path, images: int, seconds: float) -> dict[str, Any]:
    return {
        "out": str(dst),
        "format": manifest.format,
        "size": manifest.size,
        "classes": len(manifest.classes),
        "counts": manifest.counts,
        "rejected": manifest.rejected,
        "bytes": sum(shard.bytes for part in manifest.shards.values() for shard in part),
        "seconds": seconds,
        "images_per_s": images / seconds if images else None,
    }
