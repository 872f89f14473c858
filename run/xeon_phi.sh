#!/usr/bin/env bash
# Trains on Xeon Phi (Knights Landing): AVX-512F kernels, float32, MCDRAM. Takes the arguments of `knltrain train`.
#
#   bash run/xeon_phi.sh --recipe alexnet-bn-32k --data imagenet-raw
#   HOSTS=phi1,phi2 RANKS_PER_NODE=4 bash run/xeon_phi.sh --recipe alexnet-bn-32k --data /shared/imagenet-raw
#
# In cache mode MCDRAM is used by itself; in flat mode ranks prefer it where the plan says so.
set -euo pipefail
PATH=$(dirname "$(readlink -f "$0")")/../.venv/bin:$PATH

if [ -z "${HOSTS:-}" ] && ! grep -qm 1 avx512er /proc/cpuinfo; then
    echo "this is no Xeon Phi: run/single_node.sh is the script for it" >&2
    exit 2
fi
knltrain plan ${RANKS_PER_NODE:+--ranks-per-node "$RANKS_PER_NODE"}
exec knltrain launch ${HOSTS:+--hosts "$HOSTS"} ${RANKS_PER_NODE:+--ppn "$RANKS_PER_NODE"} -- \
    train --precision fp32 "$@"
