#!/usr/bin/env bash
# Fifty steps from the same weights, with each way of computing convolutions.
set -euo pipefail
cd "$(dirname "$0")/../../.."
python perf/first_steps.py --model resnet50 --batch 16 --image-size 96 --lr 0.001 --out perf/results/first-steps-2026-11-30/resnet50
python perf/first_steps.py --model alexnet_bn --batch 16 --seeds 2 --out perf/results/first-steps-2026-11-30/alexnet_bn
