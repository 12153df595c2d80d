#!/usr/bin/env bash
# Make .cache/peers, the environment in which the benchmark runs PyPI's `peft`, since this repository has a package of
# the same name:   bash workbench/benchmark_peers.sh
#
# The environment holds only peft. Everything else, torch and transformers above all, comes from the project's
# environment through a path file, so both sides run on the same code.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash scripts/setup.sh)
peers=.cache/peers
version=0.21.2

"$python" -m venv "$peers"
own=$("$peers/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$own/project_environment.pth"
"$peers/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "peft==$version"

found=$("$peers/bin/python" -P -c 'import peft; print(peft.__version__, peft.__file__)')
if [[ $found != "$version $own/"* ]]; then
    echo "error: $peers imports peft $found, not $version from $own; remove $peers and run this again" >&2
    exit 1
fi
echo "$peers is ready: peft $version"
