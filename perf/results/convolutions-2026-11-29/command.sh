#!/usr/bin/env bash
# Every convolution that Winograd's algorithm computes, both ways in turns: with the processor's own instructions, and as
# on one with AVX2 alone.
set -euo pipefail
cd "$(dirname "$0")/../../.."
for pair in resnet50:32 alexnet_bn:128 torchvision:vgg16:16; do
    model=${pair%:*} batch=${pair##*:}
    folder=perf/results/convolutions-2026-11-29/${model#torchvision:}
    python perf/convolutions.py --model "$model" --batch "$batch" --out "$folder-avx512"
    KNLTRAIN_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
        python perf/convolutions.py --model "$model" --batch "$batch" --out "$folder-avx2"
done
