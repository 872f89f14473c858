#!/usr/bin/env bash
# What perf/vs_peers.py needs: the reference environment with IPEX, torchvision and timm, Intel's OpenMP runtime, and
# tcmalloc, which comes with the system and not with Python.
#
#   bash run/peers.sh
#   .venv/bin/python perf/vs_peers.py --quick
#
# Safe to run twice: the second run installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
. run/environment.sh

make_environment .venv -e '.[intel,parity]' intel-openmp

.venv/bin/python - <<'END'
import sys

sys.path.insert(0, "perf")
from peers.launcher import find_library

from knltrain.errors import KnltrainError

for name in ("libiomp5", "libtcmalloc"):
    try:
        print(f"{name}: {find_library(name)}")
    except KnltrainError as error:
        sys.exit(f"{error}; contestants with +launcher will be listed as not running")
END
command -v g++ >/dev/null || command -v clang++ >/dev/null || echo "no g++ or clang++: torch.compile will not run" >&2
