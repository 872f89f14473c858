"""What tests share: data that they make themselves, and a cache folder of their own."""

import functools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg


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


@pytest.fixture(autouse=True)
def own_environment():
    """A test run inside a cluster job is not a rank of it, and what a test exports ends with the test."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("PMI", "SLURM_", "OMPI_", "MPI_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
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
