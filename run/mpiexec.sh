#!/usr/bin/env bash
# Trains on several nodes over ssh, with no batch system. Takes the nodes, then the arguments of `knltrain train`.
#
#   bash run/mpiexec.sh node1,node2 --recipe resnet50-8k --data /shared/imagenet-raw --out /shared/runs/first
#
# All nodes must have the same Python environment at the same path, and see --data and --out. RANKS_PER_NODE sets how
# many ranks each has; by default it is what `knltrain plan` says here, so start it on a node like the others.
set -euo pipefail
PATH=$(dirname "$(readlink -f "$0")")/../.venv/bin:$PATH

hosts=${1:?give the nodes first, as in node1,node2}
shift
exec knltrain launch --hosts "$hosts" ${RANKS_PER_NODE:+--ppn "$RANKS_PER_NODE"} -- train "$@"
