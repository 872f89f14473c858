#!/usr/bin/env bash
# knltrain against PyTorch 2.8 and 2.14 in both layouts and IPEX, in fp32. `bash run/test.sh --torch 2.14.1 --version` makes
# the second environment; intel-openmp is to be installed in it.
set -euo pipefail
cd "$(dirname "$0")/../../.."
out=perf/results/vs-peers-2026-11-30-avx512
for model in mobilenet_v2 densenet121; do
    python perf/vs_peers.py --models "torchvision:$model" --batches 32 --precisions fp32 --rounds 3 --steps 2 \
        --contestants stock+launcher,nchw+launcher,ipex+launcher,knltrain --out "$out/$model"
done
python perf/vs_peers.py --models alexnet_bn --batches 128 --precisions fp32 --rounds 3 --steps 2 \
    --contestants stock,stock+launcher,nchw+launcher,ipex+launcher,knltrain \
    --python .venv-torch-2.14.1/bin/python --out "$out/alexnet_bn"
# Fewer, for all of them are in memory at once.
python perf/vs_peers.py --models resnet50 --batches 32 --precisions fp32 --rounds 3 --steps 2 \
    --contestants stock+launcher,ipex+launcher,knltrain \
    --python .venv-torch-2.14.1/bin/python --out "$out/resnet50"
