#!/usr/bin/env bash
# From a fresh machine to a trained network: makes .venv, installs knltrain with its `intel` extra, trains the recipe
# `quickstart` on pictures that it draws itself. Needs Python 3.10 or newer and, to install from source, nothing else.
#
#   bash run/quickstart.sh
#
# Safe to run twice: the second run installs nothing, and trains into a folder of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
. run/environment.sh

make_environment .venv -e '.[intel]'

out=runs/quickstart
number=2
while [ -e "$out" ]; do
    out=runs/quickstart-$number
    number=$((number + 1))
done
echo "training recipe quickstart into $out"
.venv/bin/knltrain train --recipe quickstart --out "$out"
echo "the run folder is $PWD/$out: look at its curves.png and summary.json, or run"
echo "    .venv/bin/tensorboard --logdir $out/tensorboard"
