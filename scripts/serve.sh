#!/usr/bin/env bash
# Serve a trained mixture over HTTP, with the API of OpenAI:   bash scripts/serve.sh outputs/default [--port 8000]
set -euo pipefail
export LORAMOE_CALLER=$PWD # a relative path may be meant from here
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash scripts/setup.sh)
exec "$python" -m scripts.serve "$@"
