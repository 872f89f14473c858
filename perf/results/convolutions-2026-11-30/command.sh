#!/usr/bin/env bash
# ResNet-50's convolutions, and with the batch norms after them.
set -euo pipefail
cd "$(dirname "$0")/../../.."
python perf/convolutions.py --model resnet50 --batch 32 --out perf/results/convolutions-2026-11-30/resnet50
