#!/usr/bin/env bash
# Finds or makes the Python environment of this repository; see scripts/setup_environment.py.
#
#   python_path="$(bash scripts/setup.sh)"
#
# stdout: one line, the absolute path of the Python interpreter to use. stderr: everything else.
# With LORAMOE_PYTHON, an interpreter, that one is used as it is: nothing is checked or installed.
# Exit status 1, with one message, if none is found and none can be made.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

if [[ -n ${LORAMOE_PYTHON:-} ]]; then
  exec "$LORAMOE_PYTHON" -c 'import sys; print(sys.executable)'
fi

describe='import sys; print("%d.%d.%d" % sys.version_info[:3], sys.executable); sys.exit(sys.version_info < (3, 11))'
too_old=""
for candidate in python python3 python3.13 python3.12 python3.11 .venv/bin/python; do
  # The path that Python itself reports, so that a version manager's wrapper runs only once.
  if found="$("$candidate" -ESc "$describe" 2>/dev/null </dev/null)"; then
    exec "${found#* }" -m scripts.setup_environment
  fi
  too_old+="${found:+${too_old:+, }${found#* } (version ${found%% *})}"
done

cat >&2 <<MESSAGE
[setup] No Python 3.11 or newer was found. Looked for python, python3, python3.13, python3.12 and python3.11 on the \
PATH and for .venv/bin/python in $PWD; found ${too_old:-no working Python}. Install Python 3.11 (for example with \
conda create --name loramoe python=3.11, or your system's python3.11 and python3.11-venv packages), activate it or put \
it on the PATH, and run this again.
MESSAGE
exit 1
