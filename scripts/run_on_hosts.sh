#!/usr/bin/env bash
# Several nodes without a scheduler: start run_loramoe.sh over ssh on every host of a file and wait for all.
#
#   exp_name=llama2 pretrained_model=MODEL bash scripts/run_on_hosts.sh hostfile --weight_decay 0.01
#
# The file has one host per line; the first is node 0. Anything after the name (DeepSpeed's "slots=8") is ignored. The
# others reach node 0 by that name, without user@, or by master_addr. This folder needs the same path on every host.
# Hyperparameters that are set here apply to all hosts. Ctrl-C and SIGTERM reach scripts/launch.py on every host, and the
# runs save a checkpoint. The exit code is 0 if all ended with 0, else the first nonzero one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! -r ${1:-} ]]; then
    echo "error: '${1:-}' is not a readable file; give a file with one host per line: bash scripts/run_on_hosts.sh HOSTFILE" >&2
    exit 1
fi
mapfile -t hosts < <(awk '{ sub(/\r$/, "") } !/^[[:space:]]*(#|$)/ { print $1 }' "$1")
if ((${#hosts[@]} == 0)); then
    echo "error: there are no hosts in $1" >&2
    exit 1
fi
shift
master_addr=${master_addr:-${hosts[0]##*@}}

# The variables of run_loramoe.sh that are set, quoted for the remote shell.
settings=()
for name in $(sed -n 's/^\([a-z_]*\)=\${\1:\{0,1\}-.*/\1/p' run_loramoe.sh); do
    [[ -v $name ]] && settings+=("$name=$(printf %q "${!name}")")
done
flags=$(printf ' %q' "$@")

sessions=()
for rank in "${!hosts[@]}"; do
    launch="nnodes=${#hosts[@]} node_rank=$rank"
    # With a remote terminal, the run gets SIGHUP when this session ends.
    ssh -tt -o BatchMode=yes "${hosts[rank]}" \
        "cd $(printf %q "$PWD") && ${settings[*]} $launch exec bash run_loramoe.sh${*:+$flags}" </dev/null &
    sessions+=($!)
done
trap 'kill -TERM "${sessions[@]}" 2>/dev/null || true' TERM INT
status=0
for session in "${sessions[@]}"; do
    code=0
    wait "$session" || code=$?
    while kill -0 "$session" 2>/dev/null; do code=0; wait "$session" || code=$?; done
    ((status)) || status=$code
done
exit "$status"
