#!/usr/bin/env bash
# Try and measure everything on one GPU and write one report, to keep or to send:   bash workbench/gpu_report.sh
#
# The set-up, the small base model and PyPI's peft come first; without a network, what is missing of them is left out.
# In an environment that is not to be changed:   python -m workbench.gpu_report
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash scripts/setup.sh)
"$python" -m scripts.fetch_base_model || echo "a random model takes the place of the small base model" >&2
[[ -x .cache/peers/bin/python ]] || bash workbench/benchmark_peers.sh || echo "PyPI's peft is left out" >&2
exec "$python" -m workbench.gpu_report "$@"
