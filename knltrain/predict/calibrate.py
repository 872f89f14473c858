"""A system description from measurements of this machine."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knltrain.errors import ConfigError, KnltrainError
from knltrain.node.affinity import comm_cores
from knltrain.predict.systems import parse

# NumPy's measurement of ceilings: side of the matrices, bytes of the copy, repetitions.
_MATRIX = 1536
_COPY_BYTES = 256 * 2**20
_REPEATS = 5
# All-reduces up to the one size give the start, those from the other on the rate.
_MAX_LATENCY_BYTES, _MIN_RATE_BYTES = 4096, 2**24
_NORMAL_QUARTILES = 1.349  # their distance, in standard deviations


class _Line(NamedTuple):
    """Seconds of an all-reduce of so many bytes: ``start + size * per_byte``."""

    start: float
    per_byte: float


def calibrate(benches: Sequence[Path], allreduce: Path, name: str) -> str:
    """Writes a system description from the JSON of ``knltrain bench`` and of ``perf/allreduce.py``.

    The ceilings of arithmetic and memory are measured here, with NumPy, in a second or two; where a file of
    ``perf/roofline.py`` is among the benches, its ceilings are taken.

    Args:
        benches: files with one JSON object, or one a line: of ``knltrain bench --json``, of other runs of it, of
            ``perf/roofline.py``.
        allreduce: JSON of ``perf/allreduce.py`` between the ranks of this machine, or between several.
        name: of the system.

    Returns:
        TOML, as :func:`knltrain.predict.systems.load` reads it.

    Raises:
        ConfigError: a file is missing or is something else.
        KnltrainError: what was measured makes no sense.
    """
    objects = [(path, one) for path in benches for one in _objects(path)]
    timed = [(path, one) for path, one in objects if "images_per_s" in one and "step_s" in one]
    if not timed:
        raise ConfigError("calibrate: no --bench file holds what `knltrain bench --json` prints")
    try:
        nodes = {(one["cpu"], one["cores"]) for _, one in timed}
        if len(nodes) > 1:
            raise ConfigError(f"calibrate: the --bench files are of different machines: {sorted(nodes)}")
        ((cpu, cores),) = nodes
        spread = statistics.median(
            (one["step_s"]["quartile3"] - one["step_s"]["quartile1"]) / _NORMAL_QUARTILES / one["step_s"]["median"]
            for _, one in timed
        )
        rates = _rates(timed)
        line = _Measured(_objects(allreduce)[0], allreduce)
    except (KeyError, TypeError, ValueError):
        raise ConfigError("calibrate: a file is not what `knltrain bench --json` or perf/allreduce.py prints") from None
    fp32, bf16, memory, where = _ceilings([one for _, one in objects if "ceilings" in one], cores)
    guessed = "assumption: twice the float32 ceiling; perf/roofline.py measures it"
    if bf16 is None and any(one["precision"] == "bf16" for _, one in timed):
        bf16_line = [_number("bf16_gflop_per_s", 2 * fp32, guessed)]
    else:
        bf16_line = [_number("bf16_gflop_per_s", bf16, where)] if bf16 else []
    about = f"{cpu}, {cores} cores a node, as measured for knltrain predict --calibrate"
    text = "\n".join(
        [
            f"name = {json.dumps(name)}",
            f"about = {json.dumps(about)}",
            "",
            "[node]",
            _number("cores", cores, "the --bench files"),
            _number("ranks", line.ranks_per_node, f"{allreduce.name}: ranks a node"),
            _number(
                "comm_cores",
                comm_cores(cores // line.ranks_per_node, line.ranks) * line.ranks_per_node,
                "the trainer's rule, docs/clusters.md",
            ),
            _number("fp32_gflop_per_s", fp32, where),
            *bf16_line,
            _number("memory_gb_per_s", memory, where),
            "",
            "[network]",
            *line.network(),
            "",
            "[noise]",
            _number("spread", spread, f"median over {len(timed)} timings of their quartiles / {_NORMAL_QUARTILES}"),
            "",
            "[storage]",
            _number("write_gb_per_s", 0.5, "assumption: one writer; put what this machine has here"),
            *_input([one for one in timed if "input_images_per_s" in one[1]], cores),
            *(row for rate in rates for row in ("", "[[rate]]", *rate)),
            "",
        ]
    )
    try:
        parse(text, name)
    except ConfigError as error:
        raise KnltrainError(f"calibrate: what was measured makes no system: {error}") from None
    return text


def _number(field: str, value: float, source: str) -> str:
    number = str(value) if isinstance(value, int) else f"{value:.4g}"
    return f"{field} = {{value = {number}, source = {json.dumps(source)}}}"


def _objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file: one, or one a line."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not JSON") from None
    try:
        try:
            found = [json.loads(text)]
        except json.JSONDecodeError:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not found or not all(isinstance(one, dict) for one in found):
        raise ConfigError(f"{path}: not an object, nor one a line")
    return found


def _rates(timed: Sequence[tuple[Path, dict[str, Any]]]) -> list[list[str]]:
    """The fastest timing of each network and precision, as TOML."""
    best: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for path, one in timed:
        key = (str(one["model"]), str(one["precision"]))
        if key not in best or one["images_per_s"] > best[key][1]["images_per_s"]:
            best[key] = (path, one)
    return [
        [
            f"models = [{json.dumps(model)}]",
            f"precision = {json.dumps(precision)}",
            f"images_per_s = {float(one['images_per_s']):.4g}",
            f"batch = {int(one['batch'])}",
            f"image_size = {int(one['image_size'])}",
            f"source = {json.dumps('{}: engine {}, {} threads'.format(path.name, one['engine'], one['threads']))}",
        ]
        for (model, precision), (path, one) in best.items()
    ]


def _input(read: Sequence[tuple[Path, dict[str, Any]]], cores: int) -> list[str]:
    """The [input] table from the fastest bench that read images; empty without one."""
    if not read:
        return []
    path, one = max(read, key=lambda row: float(row[1]["input_images_per_s"]))
    source = f"{path.name}: the input alone, from {one['data']}, on {cores} cores"
    return ["", "[input]", _number("images_per_core_s", float(one["input_images_per_s"]) / cores, source)]


class _Measured:
    """Network parameters from a file of ``perf/allreduce.py``."""

    def __init__(self, result: dict[str, Any], path: Path) -> None:
        self.path = path
        self.ranks_per_node = int(result["ranks_per_node"])
        self.ranks = int(result["world_size"])
        if self.ranks < 2:
            raise ConfigError(
                f"{path}: measured with one rank, without communication; start perf/allreduce.py with several ranks"
            )
        backend = "ccl" if "ccl" in result["backends"] else "gloo"
        rows = [(float(row["bytes"]), float(row["median_s"])) for row in result["rows"]
                if row["backend"] == backend and row["dtype"] == "fp32"]  # fmt: skip
        if len(rows) < 2:
            raise ConfigError(f"{path}: needs float32 all-reduces of two sizes or more")
        self.backend, self.line = backend, _fit(rows)
        self.threads, self.beside = int(result.get("threads", 1)), result.get("beside_computing")

    def network(self) -> list[str]:
        """The lines of [network]."""
        file, ranks = self.path.name, self.ranks
        sent = 2 * (ranks - 1) / ranks  # bytes that a rank sends for each that is summed
        rate = sent / self.line.per_byte / 1e9
        fitted = f"{file}: {self.backend}, float32, between {ranks} ranks: start + size / rate"
        nothing = "in call_us"
        if self.ranks_per_node == ranks:
            missing = "not measured: all ranks were on one node; put the link's figure here"
            between = [_number("link_gb_per_s", rate, missing), _number("latency_us", 30.0, missing)]
            inside = fitted
        else:
            between = [
                _number("link_gb_per_s", rate * self.ranks_per_node, fitted),
                _number("latency_us", 0.0, nothing),
            ]
            inside = "not measured apart from the link"
        return [
            *between,
            _number("shared_gb_per_s", rate, inside),
            _number("shared_latency_us", 0.0, nothing),
            _number("sum_gb_per_s", 1000.0, "adding up is in the other rates"),
            _number("call_us", 1e6 * self.line.start, fitted),
            self._thread(sent),
            f"algorithm = {json.dumps('oneccl' if self.backend == 'ccl' else 'ring')}",
        ]

    def _thread(self, sent: float) -> str:
        """Bytes a second that a communication thread handles, in CPU time that computing loses."""
        if self.beside is None:
            rate = 2e-9 * sent / self.line.per_byte
            return _number("thread_gb_per_s", rate, "every byte sent and received keeps the thread busy: assumption")
        size, lost_s = float(self.beside["bytes"]), float(self.beside["computing_lost_s"])
        # At least a millionth of the all-reduce, so that the rate stays finite.
        busy_s = self.threads * max(lost_s, 1e-6 * float(self.beside["seconds"]))
        measured = f"{self.path.name}: what products of matrices lost beside an all-reduce of {size / 2**20:.3g} MiB"
        return _number("thread_gb_per_s", 2e-9 * sent * size / busy_s, measured)


def _fit(rows: Sequence[tuple[float, float]]) -> _Line:
    """Fits the start to small messages, and the rate to those larger than caches, or to the largest two."""
    rows = sorted(rows)
    start = statistics.median(seconds for size, seconds in rows if size <= max(_MAX_LATENCY_BYTES, rows[0][0]))
    large = [row for row in rows if row[0] >= _MIN_RATE_BYTES] or rows[-2:]
    per_byte = statistics.median((seconds - start) / size for size, seconds in large)
    if per_byte <= 0:
        raise KnltrainError("calibrate: large all-reduces took no longer than small ones; measure again")
    return _Line(start, per_byte)


def _ceilings(rooflines: Sequence[dict[str, Any]], cores: int) -> tuple[float, float | None, float, str]:
    """GFLOP/s in float32 and bf16, GB/s, and the source of these numbers."""
    if rooflines:
        ceilings = rooflines[-1]["ceilings"]
        flops = ceilings["gflop_per_s"]
        return (float(flops["float32"]), float(flops["bfloat16"]) if "bfloat16" in flops else None,
                float(ceilings["copy_gb_per_s"]), "perf/roofline.py")  # fmt: skip
    matrix = np.ones((_MATRIX, _MATRIX), dtype=np.float32)
    product = np.empty_like(matrix)
    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    product_s = _fastest(lambda: np.matmul(matrix, matrix, out=product))
    copy_s = _fastest(lambda: np.copyto(target, source))
    return 2e-9 * _MATRIX**3 / product_s, None, 2e-9 * _COPY_BYTES / copy_s, f"measured here with NumPy, {cores} cores"


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
