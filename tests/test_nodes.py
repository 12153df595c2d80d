"""`scripts/slurm/train.sbatch` and `scripts/run_on_hosts.sh` with stand-ins for SLURM's programs and ssh."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

# Starts the command once for each node. As srun does, it answers SIGTERM with SIGKILL to its tasks, and gives them one
# CPU where it is told no other number.
SRUN = """#!/usr/bin/env bash
cpus=1
while [[ $1 == --* ]]; do
    [[ $1 == --cpus-per-task=* ]] && cpus=${1#*=}
    shift
done
tasks=()
for node in 0 1; do SLURM_NODEID=$node SLURM_CPUS_PER_TASK=$cpus "$@" & tasks+=($!); done
trap 'kill -KILL "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node-a\\nnode-b\\n'; else echo "$@" >>requeued; fi
"""
RUN = """#!/usr/bin/env bash
echo "$nnodes $node_rank $master_addr $master_port $exp_name $*" >>"node-$node_rank"
echo "${SLURM_CPUS_PER_TASK-}" >"cpus-$node_rank"
if [[ $exp_name == long ]]; then
    trap 'exit 143' TERM
    touch "started-$node_rank"
    while true; do sleep 0.05; done
fi
"""


@pytest.fixture
def job(tmp_path) -> tuple[list[str], dict[str, str]]:
    """A folder with the job's script and everything that it calls; the command and its environment."""
    (tmp_path / "scripts" / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "slurm" / "train.sbatch", tmp_path / "scripts" / "slurm")
    (tmp_path / "scripts" / "setup.sh").write_text("echo python\n")
    (tmp_path / "run_loramoe.sh").write_text(RUN)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "1234567",
        "SLURM_CPUS_PER_TASK": "32",
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    return ["bash", "scripts/slurm/train.sbatch", "--run_name", "two words"], os.environ | slurm


def test_each_node_gets_its_number_and_the_first_nodes_address(tmp_path, job):
    command, environment = job
    subprocess.run(command, cwd=tmp_path, env=environment | {"exp_name": "short"}, check=True, timeout=60)
    for rank in range(2):
        assert (tmp_path / f"node-{rank}").read_text() == f"2 {rank} node-a 24567 short --run_name two words\n"
        assert (tmp_path / f"cpus-{rank}").read_text() == "32\n"
    assert not (tmp_path / "requeued").exists()


def stop(job, folder: Path, number: signal.Signals, tasks: bool = False) -> None:
    """Start a long job, then send a signal to its script, or to its tasks."""
    command, environment = job
    with subprocess.Popen(command, cwd=folder, env=environment | {"exp_name": "long"}) as running:
        while not all((folder / f"started-{rank}").exists() for rank in range(2)):
            assert running.poll() is None
        processes = [int(file.read_text()) for file in folder.glob("*.pids/*")] if tasks else [running.pid]
        for process in processes:
            os.kill(process, number)
        assert running.wait(timeout=60) == 143
    assert not list(folder.glob("*.pids"))


def test_a_job_whose_time_is_up_goes_back_into_the_queue(tmp_path, job):
    stop(job, tmp_path, signal.SIGUSR1)
    assert (tmp_path / "requeued").read_text() == "requeue 1234567\n"


@pytest.mark.parametrize("tasks", [False, True], ids=["script", "tasks"])
def test_a_job_that_is_cancelled_does_not(tmp_path, job, tasks):
    """`scancel` sends SIGTERM to the tasks, and where it is told so to the script."""
    stop(job, tmp_path, signal.SIGTERM, tasks)
    assert not (tmp_path / "requeued").exists()


# Runs the command here, and writes down for which host.
SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
echo "$1" >>hosts
exec bash -c "$2"
"""


@pytest.fixture
def hosts(tmp_path) -> dict[str, str]:
    """A folder with the launcher and everything that it calls; the environment."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "run_on_hosts.sh", tmp_path / "scripts")
    script = (ROOT / "run_loramoe.sh").read_text()
    variables = "\n".join(line for line in script.splitlines() if line.startswith(("exp_name=", "master_addr=")))
    (tmp_path / "run_loramoe.sh").write_text(f"{variables}\nmaster_port=${{master_port:-29500}}\n{RUN}")
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def test_every_host_of_a_file_runs_with_the_settings_made_here(tmp_path, hosts):
    (tmp_path / "hostfile").write_text("# two of them\nnode-a slots=8\n\nnode-b\n")
    command = ["bash", "scripts/run_on_hosts.sh", "hostfile", "--run_name", "two $words"]
    subprocess.run(command, cwd=tmp_path, env=hosts | {"exp_name": "it's $HOME"}, check=True, timeout=60)
    assert sorted((tmp_path / "hosts").read_text().split()) == ["node-a", "node-b"]
    for rank in range(2):
        assert (tmp_path / f"node-{rank}").read_text() == f"2 {rank} node-a 29500 it's $HOME --run_name two $words\n"


@pytest.mark.parametrize(
    ("variables", "address"), [({}, "node-a"), ({"master_addr": "10.0.0.1"}, "10.0.0.1")], ids=["file", "variable"]
)
def test_the_first_nodes_address_has_no_user_and_can_be_set(tmp_path, hosts, variables, address):
    """From a file whose lines end as on Windows."""
    (tmp_path / "hostfile").write_bytes(b"me@node-a\r\n\r\nme@node-b\r\n")
    command = ["bash", "scripts/run_on_hosts.sh", "hostfile"]
    subprocess.run(command, cwd=tmp_path, env=hosts | {"exp_name": "x"} | variables, check=True, timeout=60)
    assert sorted((tmp_path / "hosts").read_text().split("\n")) == ["", "me@node-a", "me@node-b"]
    for rank in range(2):
        assert (tmp_path / f"node-{rank}").read_text() == f"2 {rank} {address} 29500 x \n"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "is not a readable file"), ("# none\n", "there are no hosts in hostfile")]
)
def test_a_host_file_without_hosts_is_named(tmp_path, hosts, text, message):
    if text:
        (tmp_path / "hostfile").write_text(text)
    command = ["bash", "scripts/run_on_hosts.sh", "hostfile"]
    outcome = subprocess.run(command, cwd=tmp_path, env=hosts, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 1
    assert message in outcome.stderr
