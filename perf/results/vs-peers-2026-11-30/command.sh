#!/usr/bin/env bash
# knltrain with the convolutions that it measures to be faster, against PyTorch in both layouts and IPEX, in fp32.
set -euo pipefail
cd "$(dirname "$0")/../../.."
for pair in resnet50:32 alexnet_bn:128 torchvision:vgg16:16; do
    model=${pair%:*} batch=${pair##*:}
    python perf/vs_peers.py --models "$model" --batches "$batch" --precisions fp32 --rounds 3 --steps 2 \
        --contestants stock,stock+launcher,nchw+launcher,ipex+launcher,knltrain \
        --out "perf/results/vs-peers-2026-11-30/${model#torchvision:}"
done
for model in resnet18 mobilenet_v2 densenet121; do
    python perf/vs_peers.py --models "torchvision:$model" --batches 32 --precisions fp32 --rounds 3 --steps 2 \
        --contestants stock+launcher,nchw+launcher,ipex+launcher,knltrain \
        --out "perf/results/vs-peers-2026-11-30/$model"
done
