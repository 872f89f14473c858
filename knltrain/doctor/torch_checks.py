"""What has to be tried with torch loaded: kernels, engines, OpenMP, two ranks, a data folder."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import time
import typing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from knltrain.comm.backend import choose_backend
from knltrain.comm.probe import DTYPES, ELEMENTS, all_reduce_of_two
from knltrain.config import EngineName, RunConfig
from knltrain.data.datasets import open_folder
from knltrain.data.decode import DecodeError
from knltrain.data.folder import DataError, Folder
from knltrain.data.inspect import rate_per_core
from knltrain.data.packed import Packed
from knltrain.data.tar import Tar
from knltrain.doctor.finding import Finding
from knltrain.errors import ConfigError
from knltrain.launch.placement import RankPlacement, drift
from knltrain.launch.world import Ranks
from knltrain.node.affinity import threads_per_rank
from knltrain.node.mounts import file_system, is_network
from knltrain.node.topology import read_node
from knltrain.node.tuning_cache import measured_rates
from knltrain.ops import native
from knltrain.training.engine import choose_precision, refuse_missing_parts

_PROBE_LIMIT_S = 45.0
# Read one by one, through which the rate of one core is measured.
_READ, _DECODED = 64, 192
# What of the cores' time decoding may take before it is what a step waits for.
_SOME, _MUCH = 0.1, 0.5

# What it means that a check took too long, where that says something about the machine.
LATE = {
    "data": Finding(
        "data",
        "error",
        "the folder could not be opened, and a few hundred images be read and decoded, in the time for it",
        "training waits as long before its first step, and for every step",
        "see whether the file server answers (ls, df); knltrain prepare packs many small files into few",
    )
}


def checks_of(place: RankPlacement | None, data: Path) -> dict[str, Callable[[], Finding]]:
    """The checks by name.

    Args:
        place: where this process was put before torch was loaded; None where it has none.
        data: the folder to be tried.
    """
    return {
        "torch": functools.partial(torch_itself, place),
        "kernels": kernels,
        "engines": engines,
        "openmp": lambda: openmp(Path("/proc/self/maps").read_text("utf-8", "replace"), _preloaded()),
        "all-reduce": all_reduce,
        "oneccl": oneccl,
        "data": functools.partial(data_folder, data),
    }


def torch_itself(place: RankPlacement | None) -> Finding:
    """Version, threads, and whether loading it moved this process."""
    found = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    if place is None:
        return Finding("torch", "ok", found)
    if moved := drift(place):
        return Finding(
            "torch",
            "warning",
            f"{moved}: importing torch moved it",
            "threads share fewer cores than planned",
            "unset what binds threads (KMP_AFFINITY, GOMP_CPU_AFFINITY), or the package that brings another "
            "OpenMP runtime",
        )
    if torch.get_num_threads() != place.plan.threads:
        return Finding(
            "torch",
            "warning",
            f"{found}, and the plan has {place.plan.threads}",
            "cores stay idle, or threads wait for each other",
            "unset MKL_NUM_THREADS and OMP_THREAD_LIMIT",
        )
    return Finding("torch", "ok", found)


def kernels() -> Finding:
    """Whether the native kernels run, and in which variant."""
    if reason := native.load_error():
        cause, _, remedy = reason.partition("; ")
        return Finding(
            "kernels",
            "warning",
            cause,
            "training runs without knltrain's kernels, more slowly",
            f"{remedy or 'another node'}; until then --engine auto takes eager",
        )
    try:
        variant = native.isa()
    except ConfigError as error:
        return Finding("kernels", "error", str(error), "training refuses to start", "unset KNLTRAIN_ISA")
    best = native.best_isa()
    if variant != best:
        return Finding(
            "kernels",
            "note",
            f"KNLTRAIN_ISA={variant}; this processor runs {best}",
            "kernels use narrower instructions than they could",
            "unset KNLTRAIN_ISA, unless it was measured to be faster",
        )
    if not native.has_openmp():
        return Finding(
            "kernels",
            "warning",
            f"variant {variant}; torch's OpenMP runtime was not found",
            "the kernels run on one thread",
            "a torch of the registry, or libgomp in LD_PRELOAD",
        )
    return Finding("kernels", "ok", f"variant {variant}, on torch's threads")


def engines() -> Finding:
    """Which engines run, and what the others lack."""
    runs, lacking = [], {}
    for name in typing.get_args(EngineName):
        if name != "auto":
            try:
                refuse_missing_parts(name, "fp32")
                runs.append(name)
            except ConfigError as error:
                lacking[name] = str(error).removeprefix(f"engine {name}: ")
    found = f"{', '.join(runs)} run"
    if not lacking:
        compiler = shutil.which("g++") or shutil.which("clang++")
        return Finding("engines", "ok", f"{found}; compiler {compiler}")
    causes, remedies = zip(*(reason.partition("; ")[::2] for reason in lacking.values()), strict=True)
    cause = f"{found}; " + "; ".join(f"{name}: {cause}" for name, cause in zip(lacking, causes, strict=True))
    mismatched = "ipex" in lacking and importlib.util.find_spec("intel_extension_for_pytorch") is not None
    symptom = f"--engine {' and '.join(lacking)} will be refused"
    if mismatched:
        symptom += "; programs that import Intel's extension beside this torch end with an error"
    return Finding(
        "engines",
        "warning" if mismatched else "note",
        cause,
        symptom,
        "none needed for the others; " + "; ".join(dict.fromkeys(remedies)),
    )


def _preloaded() -> str:
    return Path("/proc/self/environ").read_bytes().decode("utf-8", "replace").partition("LD_PRELOAD=")[2].split("\0")[0]


def openmp(maps: str, preloaded: str) -> Finding:
    """Which OpenMP runtimes a process has loaded.

    Args:
        maps: its /proc/PID/maps.
        preloaded: its LD_PRELOAD.
    """
    paths = dict.fromkeys(re.findall(r"(/\S*/(lib(?:gomp|iomp5|omp)(?:-[\w.]+)?\.so[\d.]*))$", maps, re.MULTILINE))
    shown = ", ".join(path for path, _ in paths) or "none"
    if len(paths) < 2 or any(name.split(".so")[0] in preloaded for _, name in paths):
        # A preloaded one stands before the others, which are then loaded and not used.
        return Finding("openmp", "ok", shown + (" (one is preloaded and serves all)" if len(paths) > 1 else ""))
    return Finding(
        "openmp",
        "warning",
        f"{len(paths)} OpenMP runtimes in one process: {shown}",
        "more threads than cores, which wait for each other; or an end with `OMP: Error #15`",
        f"LD_PRELOAD={next(iter(paths))[0]}, or an environment in which all packages use one",
    )


def all_reduce() -> Finding:
    """Two ranks of this node, over gloo, in every type that gradients travel in."""
    results = all_reduce_of_two(_PROBE_LIMIT_S)
    failed = [one for one in results if one.reason]
    shown = ", ".join(f"{one.dtype} {1e3 * one.seconds:.1f} ms" for one in results if not one.reason)
    if not failed:
        return Finding("all-reduce", "ok", f"gloo, 2 ranks on this node, {ELEMENTS:,} elements: {shown}")
    cause = f"gloo, 2 ranks on this node: {'; '.join(f'{one.dtype}: {one.reason}' for one in failed)}"
    works = next((one.dtype for one in results if not one.reason), "")
    if works:
        return Finding(
            "all-reduce",
            "warning",
            f"{cause}; {shown}",
            f"--comm.dtype {failed[0].dtype} fails",
            f"--comm.dtype {works}",
        )
    return Finding(
        "all-reduce",
        "error",
        cause,
        f"no run with several ranks starts ({' and '.join(DTYPES)})",
        "unset GLOO_SOCKET_IFNAME or name another interface; a line in /etc/hosts for this host; see to "
        "firewalls on loopback",
    )


def oneccl() -> Finding:
    """Whether training with several ranks takes oneCCL, what it goes over, and two ranks of this node over it."""
    chosen = choose_backend("auto", Ranks("none", 0, 2, 0, 2))
    if chosen.name != "ccl":
        return Finding(
            "oneccl",
            "note",
            chosen.note,
            "several ranks wait longer for each other",
            "pip install 'knltrain[ccl]', or CCL_ROOT for a oneCCL of your site",
        )
    about = f"{chosen.version} over {chosen.transport}{f'; {chosen.note}' if chosen.note else ''}"
    results = all_reduce_of_two(_PROBE_LIMIT_S, "ccl")
    failed = [one for one in results if one.reason]
    if failed:
        return Finding(
            "oneccl",
            "error",
            f"{about}, 2 ranks on this node: {'; '.join(f'{one.dtype}: {one.reason}' for one in failed)}",
            "a run with several ranks fails as it starts",
            "--comm.backend gloo; CCL_LOG_LEVEL=info shows what oneCCL tries; unset CCL_* and FI_* that are not needed",
        )
    shown = ", ".join(f"{one.dtype} {1e3 * one.seconds:.1f} ms" for one in results)
    return Finding("oneccl", "ok", f"{about}, 2 ranks on this node, {ELEMENTS:,} elements: {shown}")


def data_folder(folder: Path) -> Finding:
    """How fast a data folder opens, reads and decodes, against what models were measured to take here."""
    system = file_system(folder.resolve())
    try:
        start = time.perf_counter()
        dataset = open_folder(folder, "train")
        open_s = time.perf_counter() - start
        read_s = _seconds_an_image(dataset)
        rate = rate_per_core(dataset, RunConfig(), _DECODED)
    except (DataError, OSError) as error:
        return Finding(
            "data",
            "error",
            str(error),
            "training refuses this folder, or stops at this image",
            "what the cause names; --on-bad skip goes on without single images",
        )
    node = read_node()
    cores = len(node.cores)
    cause = (
        f"{folder}, {system or 'unknown file system'}: opened in {open_s:.2f} s, {1e3 * read_s:.1f} ms an image read "
        f"alone, {rate:,.0f} img/s decoded on one core"
    )
    if is_network(system) and isinstance(dataset, Folder):
        return Finding(
            "data",
            "warning",
            f"{cause}; every image is a file of its own on {system}, a network file system",
            "steps wait for the file server, the more nodes the longer",
            f"knltrain prepare {folder} DST --format tar, then --data DST, with --stage DIR for a copy on each node",
        )
    threads = threads_per_rank(node, local_size=1, environ={})
    eaten = measured_rates(choose_precision("auto", node, force=False), node, threads)
    if not eaten:
        return Finding("data", "ok", f"{cause}; no model was measured here (knltrain tune --model M)")
    model = max(eaten, key=eaten.__getitem__)
    share = eaten[model] / (rate * cores)
    cause += f"; {model} takes {eaten[model]:,.0f} img/s here, {share:.0%} of what {cores} cores decode"
    if share <= _SOME:
        return Finding("data", "ok", cause)
    return Finding(
        "data",
        "warning" if share > _MUCH else "note",
        cause,
        "decoding takes its share of the cores from training; steps wait for images",
        f"knltrain prepare {folder} DST, then --data DST",
    )


def _seconds_an_image(dataset: Folder | Packed | Tar) -> float:
    """How long it takes to read one image after the other, spread over the data set; from memory what is there."""
    spread = np.unique(np.linspace(0, len(dataset) - 1, _READ).astype(int)).tolist()
    start = time.perf_counter()
    for index in spread:
        try:
            image = dataset.image(index)
            if isinstance(dataset, Packed):  # mapped: read when it is touched
                image.pixels()
        except (DecodeError, OSError) as error:
            raise dataset.bad(index, error) from None
    return (time.perf_counter() - start) / len(spread)
