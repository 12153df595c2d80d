#!/usr/bin/env bash
# Every step of an experiment within minutes, on a model that trains in seconds:   bash workbench/experiments/smoke.sh
# The experiment runs twice; the second time every cell is finished, and only the table and figures are written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=$(bash scripts/setup.sh)
rm -rf outputs/smoke
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m workbench.pretrain_small --output outputs/smoke/model --facts 60 --epochs 4
for _ in first second; do
    "$python" -m workbench.experiment --config workbench/experiments/smoke.yaml --jobs 2
done
