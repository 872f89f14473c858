"""What other tests are skipped without is here, where all of them have to run."""

import shutil

from cluster.hosts import without
from cluster.runs import ccl_is_here

from knltrain.ops.native import load_error


def test_kernels_oneccl_and_programs_are_here():
    missing = [f"native kernels ({load_error()})"] if load_error() else []
    missing += [] if ccl_is_here() else ["oneCCL"]
    missing += [name for name in ("g++", "mpiexec", "shellcheck") if shutil.which(name) is None]
    if missing:
        without(f"not here: {', '.join(missing)}")
