#!/usr/bin/env bash
# The whole test suite, in the reference environment or against another PyTorch.
#
#   bash run/test.sh [pytest arguments]                     .venv: torch 2.8 with IPEX and torchvision, timm, optax, ONNX
#   bash run/test.sh --torch 2.13.0 [pytest arguments]      .venv-torch-2.13.0: that torch, oneCCL and ONNX
#   KNLTRAIN_TEST_LINT=0 bash run/test.sh ...               without ruff and mypy
#
# Safe to run twice: the second run installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
. run/environment.sh

if [ "${1:-}" = --torch ]; then
    environment=.venv-torch-$2
    requirements=("torch==$2" -e '.[ccl,export,test]')
    shift 2
else
    environment=.venv
    requirements=(-e '.[intel,export,test,parity]')
fi
make_environment "$environment" "${requirements[@]}"
export PATH=$PWD/$environment/bin:$PATH
# Threads that spin while they wait take the cores from the tests, ranks and readers beside them.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

if [ "${KNLTRAIN_TEST_LINT:-1}" != 0 ]; then
    echo "== ruff and mypy"
    ruff check .
    ruff format --check .
    mypy
fi
echo "== pytest, with $(python -c 'import torch; print("torch", torch.__version__)')"
exec python -m pytest --durations=15 "$@"
