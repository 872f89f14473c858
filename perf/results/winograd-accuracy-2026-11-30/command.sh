#!/usr/bin/env bash
# What networks reach in float32 with convolutions summed directly and by Winograd's algorithm, from the same seeds: on a
# core each, which change places with every seed. Writes a line of JSON for each run.
#
#   command.sh RECIPE "SEEDS" OUT [more of knltrain train]
set -euo pipefail
recipe=$1 seeds=$2 out=$3
shift 3

train() { # way, seed, more
    knltrain train --recipe "$recipe" --precision fp32 --engine fused --conv "$1" --seed "$2" --checkpoint.keep 1 \
        --out "$out/$1-$2" "${@:3}" >"$out/$1-$2.log" 2>&1
    python - "$out/$1-$2/summary.json" "$1" "$2" <<'PYTHON' >>"$out/$recipe.jsonl"
import json, sys
summary = json.load(open(sys.argv[1]))
keys = ("recipe", "top1", "epochs", "steps", "images_per_s", "train_s", "engine", "precision")
print(json.dumps({"conv": sys.argv[2], "seed": int(sys.argv[3]), **{key: summary[key] for key in keys}}))
PYTHON
}

on_core() { # core, what comes first, what then, more
    local first=$2 then=$3 seed
    taskset -cp "$1" $BASHPID >/dev/null
    for seed in $seeds; do
        train "$first" "$seed" "${@:4}"
        read -r first then <<<"$then $first"
    done
}

mkdir -p "$out"
on_core 0 direct winograd "$@" &
on_core 1 winograd direct "$@" &
wait
