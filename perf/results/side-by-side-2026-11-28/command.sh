#!/usr/bin/env bash
# Two runs at once with half of two cores' threads each, in turns of two revisions of this repository; cifar10-raw is
# what `knltrain prepare` makes of CIFAR-10 with --size 32. Leaves a folder for each run: side_by_side.sh CLONE
set -euo pipefail
export OMP_NUM_THREADS=1
for turn in 1 2; do
    for revision in c5d4645 e1d76c2; do
        git -C "$1" checkout --quiet "$revision"
        for run in a b; do
            knltrain train --recipe cifar-256 --data cifar10-raw --precision fp32 --max-steps 120 \
                --out "$revision-turn$turn-$run" &
        done
        wait
    done
done
