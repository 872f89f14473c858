"""What roofline.py --kernels measures: memory-bound kernels beside others' of the same purpose, and beside a copy."""

from __future__ import annotations

import contextlib
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from _common import take_turns
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import Tensor, nn

from knltrain.models import build_model
from knltrain.node.memory import keep_freed_memory
from knltrain.node.topology import read_node
from knltrain.ops.crops import MEAN, STD, crop_flip_normalize
from knltrain.ops.optimizers import lars_step
from knltrain.runlog.console import Console
from knltrain.runlog.provenance import provenance

_SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
_TRUST = 0.001
_OURS, _OTHERS = "#c1440e", "#8a99a8"
# What the LARS step cannot do without: weight, gradient and momentum read (12), the gradient once more for its norm
# (4), weight and momentum written (8), and the weight's bf16 copy (2).
LARS_BYTES = 26
_STEPS_A_TURN = 5
# A pixel value read and written as bf16.
CROP_BYTES = 3

Maker = Callable[[list[nn.Parameter]], Callable[[], object]]


class ForeachLars(torch.optim.Optimizer):
    """LARS as one writes it with torch's foreach calls."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, dict(_SETTINGS))
        self._buffers = [torch.zeros_like(param) for param in params]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        params, decay = group["params"], group["weight_decay"]
        grads = [param.grad for param in params]
        weights, slopes = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
        rates = (group["lr"] * _TRUST * weights / (slopes + decay * weights)).tolist()
        steps = torch._foreach_add(grads, params, alpha=decay)
        torch._foreach_mul_(steps, rates)
        torch._foreach_mul_(self._buffers, group["momentum"])
        torch._foreach_add_(self._buffers, steps)
        torch._foreach_sub_(params, self._buffers)


def _ours(params: list[nn.Parameter]) -> Callable[[], object]:
    """The engine ``fused`` has it so: with bf16 copies, and with the weights' norms as the step before left them."""
    weights = [parameter.detach() for parameter in params]
    grads = [parameter.grad for parameter in params if parameter.grad is not None]
    buffers = [torch.zeros_like(weight) for weight in weights]
    copies = [weight.bfloat16() for weight in weights]
    squares = torch.full((len(weights),), torch.nan, dtype=torch.float64)
    numbers: dict[str, Any] = {name: [value] * len(weights) for name, value in _SETTINGS.items()}
    numbers |= {"trust_coefficient": [_TRUST] * len(weights), "eps": [0.0] * len(weights)}
    numbers |= {"adapt": [True] * len(weights), "clip": [False] * len(weights), "nesterov": [False] * len(weights)}
    return lambda: lars_step(weights, grads, buffers, copies, squares, **numbers)


def _foreach(params: list[nn.Parameter]) -> Callable[[], object]:
    return ForeachLars(params).step


def _timm(params: list[nn.Parameter], *, foreach: bool) -> Callable[[], object]:
    from timm.optim.lars import Lars

    return Lars(params, **_SETTINGS, trust_coeff=_TRUST, foreach=foreach).step


def _ipex(params: list[nn.Parameter]) -> Callable[[], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from intel_extension_for_pytorch.optim._lars import Lars
        from intel_extension_for_pytorch.optim._optimizer_utils import optimizer_fusion

    logging.getLogger("IPEX").setLevel(logging.ERROR)
    # As ipex.optimize does it: a step of native code in the place of the one in Python.
    step: Callable[[], object] = optimizer_fusion(Lars(params, **_SETTINGS, eeta=_TRUST), "cpu", True).step
    return step


MAKERS: dict[str, Maker] = {
    "knltrain": _ours,
    "torch foreach": _foreach,
    "timm": lambda params: _timm(params, foreach=False),
    "timm foreach": lambda params: _timm(params, foreach=True),
    "ipex": _ipex,
}


def _serve(pipe: Connection, name: str, model: str, threads: int) -> None:
    """One implementation's process: says ``None`` or why it does not run, then times steps whenever it is asked."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in _shapes(model)]
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape)
    try:
        step = MAKERS[name](params)
        step()
    except (ImportError, RuntimeError) as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            steps = pipe.recv()
            step()  # brings caches and threads back
            pipe.send([_seconds(step) for _ in range(steps)])


def _shapes(model: str) -> list[torch.Size]:
    return [parameter.shape for parameter in build_model(model, num_classes=1000, image_size=227).parameters()]


def measure_lars(model: str, copy_gb_per_s: float, console: Console, *, rounds: int) -> list[dict[str, Any]]:
    """Times LARS steps of a network's parameters, of all implementations in turn.

    Each has a process of its own: IPEX, once imported, puts itself in the place of some of torch's operators, and where
    parameters lie in memory depends on who allocated before.

    Returns:
        For each its ``name`` and ``seconds`` (median), ``gb_per_s`` of the bytes that the step needs and their
        ``copy_fraction``; or the ``reason`` why it does not run.
    """
    num_bytes = LARS_BYTES * sum(shape.numel() for shape in _shapes(model))
    kernel = f"LARS step, {model}"
    contestants = {name: (name, model, torch.get_num_threads()) for name in MAKERS}
    answers, reasons = take_turns(_serve, contestants, console, rounds=rounds, count=_STEPS_A_TURN)
    rows = [
        _row(kernel, name, statistics.median(itertools.chain(*times)), num_bytes, copy_gb_per_s)
        for name, times in answers.items()
    ]
    return rows + [{"kernel": kernel, "name": name, "reason": reason} for name, reason in reasons.items()]


def measure_crops(copy_gb_per_s: float, *, batch: int, image_size: int, rounds: int) -> list[dict[str, Any]]:
    """Times a batch of pixels made into the network's bf16 input; rows as of :func:`measure_lars`.

    Crops at random places, half of them mirrored, of images an eighth wider and higher. torch's has no crop to make.
    """
    border = image_size // 8
    pixels = torch.randint(256, (batch, image_size + border, image_size + border, 3), dtype=torch.uint8)
    boxes = torch.cat([torch.randint(border + 1, (batch, 2)), torch.full((batch, 2), image_size)], dim=1).float()
    flips = torch.arange(batch) % 2 == 0
    out = torch.empty(batch, 3, image_size, image_size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    cut = pixels[:, :image_size, :image_size].contiguous()
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def in_torch() -> Tensor:
        images = (cut.float() / 255 - mean) / std
        return images.permute(0, 3, 1, 2).to(torch.bfloat16, memory_format=torch.channels_last)

    seconds = _in_turn({"knltrain": lambda: crop_flip_normalize(pixels, boxes, flips, out), "torch": in_torch}, rounds)
    num_bytes = CROP_BYTES * out.numel()
    what = f"crop, flip, normalize, {batch} x {image_size} px"
    return [_row(what, name, s, num_bytes, copy_gb_per_s) for name, s in seconds.items()]


def measure_kernels(copy_gb_per_s: float, console: Console, *, rounds: int, quick: bool) -> dict[str, Any]:
    """Times the memory-bound kernels beside others' of the same purpose."""
    models = ("alexnet_bn_small",) if quick else ("resnet50", "alexnet")
    rows = measure_crops(copy_gb_per_s, batch=128, image_size=32 if quick else 224, rounds=rounds)
    for model in models:
        rows += measure_lars(model, copy_gb_per_s, console, rounds=rounds)
    return {"kernels": rows, "threads": torch.get_num_threads(), **provenance(read_node())}


def table_of_kernels(result: dict[str, Any]) -> Table:
    """Bandwidths, for people."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("kernel", "of"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "GB/s", "of copy bandwidth"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["kernels"]:
        if "reason" in row:
            table.add_row(row["kernel"], row["name"], "does not run", style="dim")
        else:
            table.add_row(row["kernel"], row["name"], f"{1e3 * row['seconds']:.2f}", f"{row['gb_per_s']:.1f}",
                          f"{row['copy_fraction']:.0%}")  # fmt: skip
    return table


def draw_kernels(result: dict[str, Any]) -> Figure:
    """The same as bars, copy bandwidth as a line."""
    rows = [row for row in result["kernels"] if "reason" not in row]
    figure = Figure(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.barh([f"{row['kernel']}: {row['name']}" for row in rows], [row["copy_fraction"] for row in rows],
              color=[_OURS if row["name"] == "knltrain" else _OTHERS for row in rows])  # fmt: skip
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("needed bytes a second, as a fraction of a copy's")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _in_turn(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, all of them once in every round; a first round is not timed."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, work in contestants.items():
            times[name].append(_seconds(work))
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _row(kernel: str, name: str, seconds: float, num_bytes: int, copy_gb_per_s: float) -> dict[str, Any]:
    rate = num_bytes / seconds / 1e9
    return {
        "kernel": kernel,
        "name": name,
        "seconds": seconds,
        "gb_per_s": rate,
        "copy_fraction": rate / copy_gb_per_s,
    }
