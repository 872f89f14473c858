#!/usr/bin/env bash
# The tests, in an environment that this script makes. CONTRIBUTING.md says what each lane is for.
#
#   bash run/test.sh                        ruff, mypy, and what shows within minutes that an install can be trusted
#   bash run/test.sh [pytest arguments]     those tests instead: bash run/test.sh tests/optim -k lars
#   bash run/test.sh --all                  all that CI runs: every test, as on other processors too, with another
#                                           PyTorch and kernels of clang++, and the quickstart
#   bash run/test.sh --torch 2.14.1 [...]   with that PyTorch, in .venv-torch-2.14.1
#   bash run/test.sh --as avx2 [...]        as on a processor with AVX2 alone; avx512f: as on Xeon Phi
#
# .venv is the reference environment: torch 2.8 with IPEX and torchvision, timm, optax, ONNX. Safe to run twice: the
# second run installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
. run/environment.sh

NEWER=2.13.0 # the other PyTorch of --all
# Threads that spin while they wait take the cores from the tests, ranks and readers beside them.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

reference() { make_environment .venv -e '.[intel,export,test,parity]'; }
# torchvision of the same release comes along where there is one that imports: not beside 2.13.0's build for CPUs.
with_torch() {
    local requirements=("torch==$1" -e '.[ccl,export,test]')
    [ "$1" = 2.14.1 ] && requirements+=(torchvision==0.29.1)
    make_environment ".venv-torch-$1" "${requirements[@]}"
}

lint() {
    echo "== ruff and mypy"
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
}

# tests ENVIRONMENT TITLE [pytest arguments]: in a subshell, for the PATH is another in each environment.
tests() (
    export PATH=$PWD/$1/bin:$PATH
    echo "== $2, $(python -c 'import torch; print("torch", torch.__version__)')"
    shift 2
    exec python -m pytest --durations=15 "$@"
)

# as_if avx2|avx512f [pytest arguments]. PyTorch and oneDNN have no code for AVX-512F alone: Xeon Phi runs their AVX2.
as_if() (
    case $1 in
    avx2 | avx512f) ;;
    *)
        echo "--as $1: give avx2 or avx512f" >&2
        return 2
        ;;
    esac
    if ! .venv/bin/python -c 'import sys; from knltrain import _kernels; sys.exit(sys.argv[1] not in _kernels.supported_isas())' "$1"; then
        echo "== as on $1: SKIPPED, this processor does not run it"
        return 0
    fi
    export KNLTRAIN_ISA=$1 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
    # What torch.compile has kept for oneDNN's other instruction sets ends the process here, and the other way round.
    export TORCHINDUCTOR_CACHE_DIR=$PWD/build/inductor-$1
    shift
    tests .venv "as on a processor with $KNLTRAIN_ISA alone" "$@"
)

all() {
    export KNLTRAIN_TEST_ALL=1 # what a test needs and is not there is an error, and no reason to skip it
    export PIP_NO_COMPILE=1    # what is imported is compiled then; the rest is most of it
    local log waiting=(tests/cluster/test_hosts.py tests/cluster/test_slurm.py)
    log=$(mktemp)
    # Each environment has kernels of its own compiler. Installing takes one core: the tests of the one that is ready
    # first run beside it.
    newer >"$log.newer" 2>&1 &
    local newer=$!
    reference
    lint
    # Ranks wait for each other half of the time, and those of hosts and of Slurm nearly all of it: the other tests run
    # beside them. What has a time limit needs its share of a core, so the ranks wait for the other environment's tests.
    (
        ends=0
        tests .venv "hosts and Slurm" -m "cluster and not hand" "${waiting[@]}" || ends=1
        tail --pid=$newer -f /dev/null
        tests .venv "several ranks" -m "cluster and not hand" "${waiting[@]/#/--ignore=}" || ends=1
        exit $ends
    ) >"$log.ranks" 2>&1 &
    local ranks=$! failed=0
    tests .venv "every other test" -n 2 --dist loadfile -m "not (cluster or hand)" || failed=1
    if .venv/bin/python -c 'import sys; from knltrain import _kernels; sys.exit(_kernels.supported_isas() == ["avx2"])'; then
        as_if avx2 -n 2 --dist loadfile -m "processor and not compile" || failed=1
    else
        echo "== as on avx2: this processor has AVX2 alone, so the tests above were"
    fi
    # Of PyTorch's and oneDNN's code nothing is different from that; of the kernels all is.
    as_if avx512f -n 2 --dist loadfile -m "processor and not compile" tests/ops tests/models/test_fused.py || failed=1
    wait $newer || failed=1
    wait $ranks || failed=1
    cat "$log.newer" "$log.ranks"
    quickstart || failed=1
    return $failed
}

# What depends on PyTorch, with the other one.
newer() {
    CXX=clang++ SKBUILD_BUILD_DIR=build/clang with_torch "$NEWER"
    local failed=0
    # A third rank of oneCCL's is no other to PyTorch than the second, and of what trains for long one network will do.
    tests ".venv-torch-$NEWER" "what depends on PyTorch" -m "version and not (cluster or hand)" \
        -k "not (ccl-ofi-3 or band_of_bf16)" || failed=1
    tests ".venv-torch-$NEWER" "several ranks" -m "version and cluster" \
        -k '(two_ranks_are_one and mpiexec) or outlives or loopback' || failed=1
    return $failed
}

quickstart() {
    bash run/quickstart.sh
    local newest
    newest=$(find runs -maxdepth 1 -name 'quickstart*' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2)
    .venv/bin/python - "$newest" <<'PYTHON'
import json, sys
summary = json.load(open(f"{sys.argv[1]}/summary.json"))
print(f"quickstart: top-1 {summary['top1']:.2f} % after {summary['train_s']:.0f} s of training")
sys.exit(summary["top1"] < 95)
PYTHON
}

case ${1:-} in
--all)
    all
    ;;
--torch)
    with_torch "$2"
    tests ".venv-torch-$2" "PyTorch $2" "${@:3}"
    ;;
--as)
    reference
    as_if "$2" "${@:3}"
    ;;
"")
    reference
    lint
    tests .venv "what an install is trusted by" -n 2 --dist loadfile -m "not (cluster or compile or slow or hand)"
    ;;
*)
    reference
    tests .venv "these tests" "$@"
    ;;
esac
