"""oneDNN's verbose output: the primitives that it executed, and slow ones among them."""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import torch

_BYTES = {"f64": 8, "f32": 4, "s32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1}
# "src:bf16::blocked:acdb::f0" since 3.5, "src_bf16::blocked:acdb:f0" before, "in:f32_nchw" before 1.0.
_TYPE = re.compile(r"(?:^|[ _])(src|wei|dst|data|in|out)[:_](" + "|".join(_BYTES) + r")(?=[:_ ]|$)")
# Fallbacks for convolutions: reference loops, and im2col with GEMM.
_SLOW_IMPLEMENTATION = re.compile(r"(ref|gemm)\b")


@dataclass(frozen=True)
class Primitive:
    """One execution of a oneDNN primitive.

    Attributes:
        kind: convolution, matmul, reorder, ...
        direction: forward, data gradient, weight gradient, or oneDNN's name ("undef" if there is none).
        implementation: for example ``brgconv_1x1:avx512_core_bf16``.
        types: data types of source, weights and destination, as far as oneDNN prints them.
        shape: oneDNN's problem description, for example ``mb32_ic3oc64_ih224oh112kh7sh2dh0ph3_iw224...``.
        ms: time, milliseconds.
    """

    kind: str
    direction: str
    implementation: str
    types: tuple[str, ...]
    shape: str
    ms: float

    @property
    def gflop(self) -> float | None:
        """GFLOP, 2 FLOP per multiply-add, padding included; None if multiply-adds are not the main work."""
        if self.kind == "matmul":
            return _matmul_gflop(self.shape)
        size: dict[str, int] = defaultdict(
            lambda: 1, {name: int(value) for name, value in re.findall(r"([a-z]+)(\d+)", self.shape)}
        )
        kernel = size["kd"] * size["kh"] * size["kw"]
        # A convolution multiplies for each output pixel, a transposed one for each input pixel.
        pixels = {
            "convolution": size["od"] * size["oh"] * size["ow"] * kernel,
            "deconvolution": size["id"] * size["ih"] * size["iw"] * kernel,
            "inner_product": size["id"] * size["ih"] * size["iw"],
        }
        if self.kind not in pixels:
            return None
        return 2e-9 * size["mb"] * size["oc"] * size["ic"] / size["g"] * pixels[self.kind]

    @property
    def megabytes(self) -> float | None:
        """MB (10^6 bytes) that a reorder reads and writes, without padding of blocked layouts; None for others."""
        if self.kind != "reorder" or len(self.types) != 2 or not re.fullmatch(r"\d+(x\d+)*", self.shape):
            return None
        return 1e-6 * math.prod(map(int, self.shape.split("x"))) * sum(_BYTES[name] for name in self.types)


def _matmul_gflop(shape: str) -> float | None:
    """Returns the GFLOP of "MxK:KxN" with leading batch dimensions, which broadcast; before version 3 with ":MxN"."""
    operands = [
        [int(size) for size in part.split("x")] for part in shape.split(":") if re.fullmatch(r"\d+(x\d+)*", part)
    ]
    if len(operands) < 2 or len(operands[0]) < 2 or len(operands[0]) != len(operands[1]):
        return None
    (*left, rows, inner), (*right, _, columns) = operands[:2]
    return 2e-9 * math.prod(map(max, left, right)) * rows * inner * columns


def parse(lines: Iterable[str]) -> Iterator[Primitive]:
    """Yields the executed primitives in oneDNN's verbose output; other lines, and truncated ones, are skipped.

    Reads the formats of MKL-DNN 0.x (``mkldnn_verbose``), oneDNN 1.x (``dnnl_verbose``), 2.x and 3.x
    (``onednn_verbose``), with or without time stamps. Graph partitions are skipped: their primitives have lines too.
    """
    for line in lines:
        found = re.search(r"(?:one|mkl)?dnnl?_verbose,(.*)", line)
        fields = found[1].split(",") if found else []
        # Before "exec": optional version and time stamp, and the interface.
        if "exec" not in fields[:4] or "graph" in fields[:3]:
            continue
        fields = fields[fields.index("exec") + 1 :]
        if fields[:1] in (["cpu"], ["gpu"]):
            fields = fields[1:]
        try:
            kind, implementation, direction, memory = fields[:4]
            ms = float(fields[-1])
        except ValueError:
            continue
        directions = {"backward_data": "data gradient", "backward_weights": "weight gradient"}
        if direction.startswith("forward"):
            directions[direction] = "forward"
        types = tuple(kind_of_number for _, kind_of_number in _TYPE.findall(memory))
        yield Primitive(kind, directions.get(direction, direction), implementation, types, fields[-2], ms)


@contextmanager
def native_stdout(into: IO[bytes]) -> Iterator[None]:
    """Redirects file descriptor 1, and so also output of C++ code, to a file inside the block."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(into.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def record_primitives(function: Callable[[], object]) -> list[Primitive]:
    """Returns the oneDNN primitives that a call executes; empty if oneDNN was built without verbose mode."""
    with tempfile.TemporaryFile() as printed:
        with native_stdout(printed), torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            function()
        printed.seek(0)
        return list(parse(printed.read().decode(errors="replace").splitlines()))


def slow_convolutions(primitives: Iterable[Primitive]) -> str:
    """Returns a warning if oneDNN uses slow implementations of convolutions; otherwise an empty string."""
    convolutions = [one for one in primitives if one.kind == "convolution"]
    slow = [one for one in convolutions if _SLOW_IMPLEMENTATION.match(one.implementation)]
    if not slow:
        return ""
    names = ", ".join(sorted({one.implementation for one in slow}))
    worst = max(slow, key=lambda one: one.ms)
    return (
        f"oneDNN has no fast code here for {len(slow)} of {len(convolutions)} convolutions ({names}); the slowest, "
        f"{worst.direction} of {worst.shape}, took {worst.ms:.1f} ms. Another release of PyTorch may be faster: "
        f"this is torch {torch.__version__} with oneDNN {onednn_version()}"
    )


def onednn_version() -> str:
    """Returns the version of PyTorch's oneDNN, or "unknown"."""
    found = re.search(r"(?:oneDNN|MKL-DNN) v([\d.]+)", torch.__config__.show())
    return found[1] if found else "unknown"
