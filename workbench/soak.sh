#!/usr/bin/env bash
# Kill a training run again and again and check that its adapter is intact; or, with --launches 200, end runs in every
# possible way and check that each exits within seconds with its message:   bash workbench/soak.sh [flags; see --help]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash scripts/setup.sh)
exec "$python" -m workbench.soak "$@"
