"""Checks with torch: kernels, engines, OpenMP, two ranks, a data folder."""

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
from knltrain.comm.probe import DTYPES, ELEMENTS, run_two_rank_all_reduce
from knltrain.config import EngineName, RunConfig
from knltrain.data.datasets import open_folder
from knltrain.data.decode import DecodeError
from knltrain.data.folder import DataError, Folder
from knltrain.data.inspect import rate_per_core
from knltrain.data.packed import Packed
from knltrain.data.tar import Tar
from knltrain.doctor.finding import Finding
from knltrain.errors import ConfigError
from knltrain.launch.placement import RankPlacement, binding_drift
from knltrain.launch.world import Ranks
from knltrain.node.affinity import threads_per_rank
from knltrain.node.mounts import file_system, is_network
from knltrain.node.topology import read_node
from knltrain.node.tuning_cache import measured_rates
from knltrain.ops import native
from knltrain.training.engine import choose_precision, refuse_missing_parts

_PROBE_TIMEOUT_S = 45.0
# Images read one by one, and images decoded to measure the rate of one core.
_NUM_READ, _NUM_DECODED = 64, 192
# Fractions of the cores' decoding rate that a model consumes, above which the finding is a note or a warning.
_NOTE_FRACTION, _WARN_FRACTION = 0.1, 0.5

# Findings for time-outs of checks that say something about the machine.
ON_TIMEOUT = {
    "data": Finding(
        "data",
        "error",
        "time-out while opening the folder, and reading and decoding a few hundred images",
        "training waits as long before its first step, and in every step",
        "see whether the file server answers (ls, df); knltrain prepare packs many small files into few",
    )
}


def checks_of(placement: RankPlacement | None, data: Path) -> dict[str, Callable[[], Finding]]:
    """Returns the checks by name.

    Args:
        placement: this process's placement before torch was loaded; None if there is none.
        data: the folder to check.
    """
    return {
        "torch": functools.partial(torch_itself, placement),
        "kernels": kernels,
        "engines": engines,
        "openmp": lambda: openmp(Path("/proc/self/maps").read_text("utf-8", "replace"), _preloaded()),
        "all-reduce": all_reduce,
        "oneccl": oneccl,
        "data": functools.partial(data_folder, data),
    }


def torch_itself(placement: RankPlacement | None) -> Finding:
    """Checks version and threads, and whether loading torch changed the CPU mask."""
    found = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    if placement is None:
        return Finding("torch", "ok", found)
    if moved := binding_drift(placement):
        return Finding(
            "torch",
            "warning",
            f"{moved}: importing torch changed it",
            "threads share fewer cores than planned",
            "unset what binds threads (KMP_AFFINITY, GOMP_CPU_AFFINITY), or the package that brings another "
            "OpenMP runtime",
        )
    if torch.get_num_threads() != placement.plan.threads:
        return Finding(
            "torch",
            "warning",
            f"{found}, and the plan has {placement.plan.threads}",
            "cores stay idle, or threads wait for each other",
            "unset MKL_NUM_THREADS and OMP_THREAD_LIMIT",
        )
    return Finding("torch", "ok", found)


def kernels() -> Finding:
    """Checks whether the native kernels run, and in which variant."""
    if reason := native.load_error():
        cause, _, remedy = reason.partition("; ")
        return Finding(
            "kernels",
            "warning",
            cause,
            "training runs without knltrain's kernels, more slowly",
            f"{remedy or 'another node'}; until then --engine auto uses eager",
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
    """Checks which engines run, and what is missing for the others."""
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
    """Checks for several OpenMP runtimes in a process.

    Args:
        maps: contents of its /proc/PID/maps.
        preloaded: its LD_PRELOAD.
    """
    paths = dict.fromkeys(re.findall(r"(/\S*/(lib(?:gomp|iomp5|omp)(?:-[\w.]+)?\.so[\d.]*))$", maps, re.MULTILINE))
    shown = ", ".join(path for path, _ in paths) or "none"
    if len(paths) < 2 or any(name.split(".so")[0] in preloaded for _, name in paths):
        # A preloaded runtime takes precedence: the others are loaded and not used.
        return Finding("openmp", "ok", shown + (" (one is preloaded and used by all)" if len(paths) > 1 else ""))
    return Finding(
        "openmp",
        "warning",
        f"{len(paths)} OpenMP runtimes in one process: {shown}",
        "more threads than cores, which wait for each other; or an end with `OMP: Error #15`",
        f"LD_PRELOAD={next(iter(paths))[0]}, or an environment in which all packages use one",
    )


def all_reduce() -> Finding:
    """Checks an all-reduce of two ranks on this node over gloo, in every data type of gradients."""
    results = run_two_rank_all_reduce(_PROBE_TIMEOUT_S)
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
        "unset GLOO_SOCKET_IFNAME or name another interface; a line in /etc/hosts for this host; check "
        "for firewalls on loopback",
    )


def oneccl() -> Finding:
    """Checks whether oneCCL is available, its transport, and an all-reduce of two ranks on this node."""
    chosen = choose_backend("auto", Ranks("none", 0, 2, 0, 2))
    if chosen.name != "ccl":
        return Finding(
            "oneccl",
            "note",
            chosen.note,
            "communication between ranks is slower",
            "pip install 'knltrain[ccl]', or CCL_ROOT for a oneCCL of your site",
        )
    about = f"{chosen.version} over {chosen.transport}{f'; {chosen.note}' if chosen.note else ''}"
    results = run_two_rank_all_reduce(_PROBE_TIMEOUT_S, "ccl")
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
    """Compares how fast a data folder is read and decoded with the measured training rates of models."""
    system = file_system(folder.resolve())
    try:
        start = time.perf_counter()
        dataset = open_folder(folder, "train")
        open_s = time.perf_counter() - start
        read_s = _seconds_per_image(dataset)
        rate = rate_per_core(dataset, RunConfig(), _NUM_DECODED)
    except (DataError, OSError) as error:
        return Finding(
            "data",
            "error",
            str(error),
            "training refuses this folder, or stops at this image",
            "see the cause; --on-bad skip skips single images",
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
            f"{cause}; every image is a separate file on {system}, a network file system",
            "steps wait for the file server, longer with more nodes",
            f"knltrain prepare {folder} DST --format tar, then --data DST, with --stage DIR for a copy on each node",
        )
    threads = threads_per_rank(node, local_size=1, environ={})
    rates = measured_rates(choose_precision("auto", node, force=False), node, threads)
    if not rates:
        return Finding("data", "ok", f"{cause}; no model was measured here (knltrain tune --model M)")
    model = max(rates, key=rates.__getitem__)
    share = rates[model] / (rate * cores)
    cause += f"; {model} trains on {rates[model]:,.0f} img/s here, {share:.0%} of what {cores} cores decode"
    if share <= _NOTE_FRACTION:
        return Finding("data", "ok", cause)
    return Finding(
        "data",
        "warning" if share > _WARN_FRACTION else "note",
        cause,
        "decoding competes with training for cores; steps wait for images",
        f"knltrain prepare {folder} DST, then --data DST",
    )


def _seconds_per_image(dataset: Folder | Packed | Tar) -> float:
    """Returns the time to read an image, sequentially and spread over the data set; cached pages are fast."""
    spread = np.unique(np.linspace(0, len(dataset) - 1, _NUM_READ).astype(int)).tolist()
    start = time.perf_counter()
    for index in spread:
        try:
            image = dataset.image(index)
            if isinstance(dataset, Packed):  # mapped: pages are read on access
                image.pixels()
        except (DecodeError, OSError) as error:
            raise dataset.bad(index, error) from None
    return (time.perf_counter() - start) / len(spread)
