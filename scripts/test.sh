#!/usr/bin/env bash
# Set up if needed, check style and types, run the tests:   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash scripts/setup.sh)
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest --numprocesses 2 --dist worksteal "$@"
