#!/usr/bin/env bash
# Trains on all cores of this machine, one rank per NUMA domain. Takes the arguments of `knltrain train`.
#
#   bash run/single_node.sh --recipe resnet50-256 --data imagenet
#
# RANKS_PER_NODE sets another number. Started again, it goes on from the last checkpoint.
set -euo pipefail
PATH=$(dirname "$(readlink -f "$0")")/../.venv/bin:$PATH

plan=(knltrain plan ${RANKS_PER_NODE:+--ranks-per-node "$RANKS_PER_NODE"})
"${plan[@]}"
ranks=$("${plan[@]}" --format json | grep -c '"local_rank"')
if [ "$ranks" = 1 ]; then # needs no mpiexec
    exec knltrain train "$@"
fi
exec knltrain launch -n "$ranks" -- train "$@"
