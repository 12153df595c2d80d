#!/usr/bin/env bash
# Try every way of training on this node, with a tiny model, before a long run:   bash workbench/check_node.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash scripts/setup.sh)
exec "$python" -m workbench.check_node "$@"
