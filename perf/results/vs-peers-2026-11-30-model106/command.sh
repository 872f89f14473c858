#!/usr/bin/env bash
# knltrain against PyTorch 2.8 and IPEX with Intel's launcher, in fp32. `bash run/peers.sh` installs what they need.
set -euo pipefail
cd "$(dirname "$0")/../../.."
out=perf/results/vs-peers-2026-11-30-model106
race() {
    python perf/vs_peers.py --models "$1" --batches "$2" --precisions fp32 --rounds 3 --steps 2 --contestants "$3" \
        --out "$out/${1#torchvision:}"
}
race resnet50 32 stock+launcher,ipex+launcher,knltrain
race torchvision:vgg16 16 stock+launcher,nchw+launcher,ipex+launcher,knltrain
