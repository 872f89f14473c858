"""What tests share: data that they make themselves, and a cache folder of their own."""

import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

TESTS = Path(__file__).parent
# Whole files and folders that a marker is on; CONTRIBUTING.md says what each is for. Single tests name theirs.
MARKED = {
    "cluster": ("cluster", "test_torture.py"),
    "version": (
        "checkpoint", "cluster/test_ranks_together.py", "comm/test_conformance.py", "comm/test_oneccl.py", "models",
        "ops", "optim", "training/test_engine.py", "weights",
    ),
    "slow": (
        "bench/test_tune.py", "comm/test_conformance.py", "comm/test_group.py", "comm/test_powersgd.py",
        "docs/test_readme.py", "fuzz/test_flips.py", "launch/test_mpiexec.py", "parity", "perf",
        "report/test_browser.py", "sweep/test_runner.py", "training/test_signals.py", "weights/test_export.py",
    ),
    "processor": ("bench/test_bench.py", "models", "ops/test_bf16.py", "ops/test_convgrad.py",
                  "training/test_changing_runs.py", "training/test_engine.py"),
}  # fmt: skip


def pytest_configure(config):
    """KNLTRAIN_ISA stands for a processor that has no more, for tests that ask the kernels in this process too."""
    asked = os.environ.get("KNLTRAIN_ISA")
    if asked:
        from knltrain import _kernels

        if asked not in _kernels.supported_isas():
            raise pytest.UsageError(f"KNLTRAIN_ISA={asked}: this processor does not run it")
        _kernels.supported_isas = lambda: [asked]


def _has(marker, path):
    """Whether a file has a marker as a whole."""
    path = path.relative_to(TESTS).as_posix()
    return any(path == place or path.startswith(f"{place}/") for place in MARKED[marker])


def pytest_ignore_collect(collection_path, config):
    """Does not import files that `-m "MARKER and …"` leaves out as a whole: that takes as long as some lanes."""
    marker, _, rest = config.option.markexpr.partition(" and ")
    whole_files = marker in ("cluster", "processor", "version") and " or " not in re.sub(r"\(.*?\)", "", rest)
    if whole_files and collection_path.name.startswith("test_") and collection_path.suffix == ".py":
        return not _has(marker, collection_path) or None
    return None


def pytest_collection_modifyitems(items):
    """Puts on the markers of whole files and folders."""
    for item in items:
        for marker in MARKED:
            if _has(marker, item.path):
                item.add_marker(marker)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keeps pictures drawn on first use out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("KNLTRAIN_CACHE")
    os.environ["KNLTRAIN_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["KNLTRAIN_CACHE"]
    else:
        os.environ["KNLTRAIN_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """A shell's background jobs are started with SIGINT ignored, and hand that on."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


_LAUNCHERS = (
    "PMI", "SLURM_", "OMPI_", "MPI_", "MV2_", "MVP_", "PALS_", "JSM_", "FLUX_", "ALPS_", "PBS_", "LSB_", "PE_HOSTFILE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_environment():
    """A test run inside a cluster job is not a rank of it, and what a test exports ends with the test."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(_LAUNCHERS) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_cpus():
    """A command that is called in this process takes its place in it."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


def write_jpeg(path, height, width, seed):
    """A smooth coloured picture, so that compression changes it little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    planes = [128 + 100 * np.sin(rng.uniform(1, 6) * x + rng.uniform(1, 6) * y + rng.uniform(0, 6)) for _ in range(3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(simplejpeg.encode_jpeg(np.stack(planes, -1).astype(np.uint8), quality=95))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three classes, 48 + 13 JPEGs of different sizes in ImageFolder layout."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, per_class in (("train", (16, 16, 16)), ("val", (5, 4, 4))):
        for label, count in enumerate(per_class):
            for index in range(count):
                height, width = rng.integers(40, 90, 2)
                write_jpeg(root / part / f"class{label}" / f"{index:03}.jpg", height, width, 1000 * label + index)
    return root


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, where one imports beside this torch; one built for another fails as it registers its operators."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision beside this torch: {error}")
    return torchvision


@pytest.fixture
def knltrain():
    """Runs the command in a process of its own, pinned to CPUs if told so, and returns it, finished."""

    def run(*arguments, timeout=240, cpus=None, **environment):
        return subprocess.run(
            [sys.executable, "-m", "knltrain", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **environment},
            preexec_fn=cpus and functools.partial(os.sched_setaffinity, 0, cpus),
        )

    return run
