"""Tests that need separate processes: several ranks, and `run_loramoe.sh`."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, deepspeed_file, filled_model, tiny_model
from safetensors.torch import load_file
from test_train import Runner

from data import InputError
from peft import LoraConfig, PeftModel
from training.checkpoint import checkpoint_problem

# Variables of run_loramoe.sh: the flag that each one sets, and a value that is no default and no other's.
TRAIN_VARIABLES = {
    "pretrained_model": ("--model_name_or_path", "models/my base"),
    "tokenizer_path": ("--tokenizer_name_or_path", "models/my tokenizer"),
    "peft_path": ("--peft_path", "outputs/my adapter"),
    "load_in_kbits": ("--load_in_kbits", "8"),
    "dataset_dir": ("--dataset_dir", "data/my rows"),
    "validation_file": ("--validation_file", "data/my test.json"),
    "max_seq_length": ("--max_seq_length", "101"),
    "packing": ("--packing", "yes"),
    "prompt_template": ("--prompt_template", "plain"),
    "knowledge_probe": ("--knowledge_probe", "data/my facts"),
    "tuning": ("--tuning", "full"),
    "lora_nums": ("--lora_nums", "102"),
    "lora_rank": ("--lora_rank", "103"),
    "lora_alpha": ("--lora_alpha", "104"),
    "lora_dropout": ("--lora_dropout", "0.105"),
    "lora_trainable": ("--trainable", "q_proj,v_proj"),
    "blc_alpha": ("--blc_alpha", "0.106"),
    "blc_weight": ("--blc_weight", "0.107"),
    "kl_weight": ("--kl_weight", "0.3"),
    "lr": ("--learning_rate", "0.108"),
    "num_train_epochs": ("--num_train_epochs", "109"),
    "max_steps": ("--max_steps", "110"),
    "seed": ("--seed", "111"),
    "per_device_train_batch_size": ("--per_device_train_batch_size", "112"),
    "per_device_eval_batch_size": ("--per_device_eval_batch_size", "113"),
    "gradient_accumulation_steps": ("--gradient_accumulation_steps", "114"),
    "gradient_checkpointing": ("--activation_checkpointing", "true"),
    "save_steps": ("--save_steps", "115"),
    "eval_steps": ("--eval_steps", "116"),
    "deepspeed_config_file": ("--deepspeed", "my zero.json"),
}
LAUNCHER_VARIABLES = {
    "num_processes": ("--nproc_per_node", "117"),
    "nnodes": ("--nnodes", "119"),
    "node_rank": ("--node_rank", "118"),
    "master_addr": ("--master_addr", "node.example"),
    "master_port": ("--master_port", "120"),
}
# SIGTERM is not among them: torchrun would end its workers.
SIGNALS = {"--signals_to_handle": "SIGINT,SIGHUP,SIGQUIT"}
SHELL_VARIABLES = ("output_dir", "exp_name", *TRAIN_VARIABLES, *LAUNCHER_VARIABLES)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**variables) -> dict[str, str]:
    """This process's environment, with this interpreter first on the PATH and the variables set."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **{name: str(value) for name, value in variables.items()},
    }


def call(command: list[str], **variables) -> subprocess.CompletedProcess:
    """Run a command at the root of the repository."""
    return subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=600)


def launch(processes: int, program: list[str]) -> None:
    """Run a program on several ranks, or without a launcher on one; fails the test if it fails."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    outcome = call([sys.executable, *(launcher if processes > 1 else []), *program])
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-6000:]


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return Runner(tmp_path, model_dir)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("zero2", {"deepspeed": "zero2.json", "blc_weight": 0}),
        ("zero3", {"deepspeed": "zero3_offload.json", "blc_weight": 0.5}),
        ("ddp", {"blc_weight": 0.5, "activation_checkpointing": True}),
    ],
)
def test_two_processes_train_as_one(run, tmp_path, name, settings):
    """Same rows in every global batch, dropout 0, from non-zero A, B and routers."""
    filled_model().save_pretrained(tmp_path / "adapter")
    if "deepspeed" in settings:
        settings = settings | {"deepspeed": deepspeed_file(tmp_path, settings["deepspeed"])}
    common = {
        "peft_path": tmp_path / "adapter",
        "lora_rank": 2,
        "lora_alpha": 4,
        "lora_dropout": 0,
        "max_steps": 3,
        "blc_weight": settings["blc_weight"],
    }
    run(**common)
    one = [entry for entry in run.log() if "lm_loss" in entry]
    alone = load_file(run.output / "adapter_model.safetensors")
    first, run.output = run.output, tmp_path / name
    launch(2, ["train.py", *run.arguments(**common | settings, per_device_train_batch_size=2, output_dir=run.output)])
    two = [entry for entry in run.log() if "lm_loss" in entry]
    assert len(one) == len(two) == 3
    for before, after in zip(one, two, strict=True):
        for value in ("loss", "lm_loss", "balance_loss", "routing_cv", "routing_entropy", "group_share_type_1"):
            assert after[value] == pytest.approx(before[value], rel=1e-5)
    routing = [json.loads((folder / "routing.json").read_text()) for folder in (first, run.output)]
    for field in ("expert_share_by_task", "expert_share_by_task_type"):
        for kind, shares in routing[0][field].items():
            assert routing[1][field][kind] == pytest.approx(shares, abs=1e-5)
    together = load_file(run.output / "adapter_model.safetensors")
    start = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert together.keys() == alone.keys()
    for key, tensor in alone.items():
        assert (tensor - start[key]).norm() > 1e-2 * start[key].norm()
        assert (together[key] - tensor).norm() <= 1e-4 * tensor.norm()


def test_a_run_goes_on_with_another_number_of_processes(run):
    """Without DeepSpeed and dropout: the same rows in every step, so the same adapter."""
    settings = {"lora_dropout": 0, "num_train_epochs": 1, "save_steps": 1}
    run(**settings)
    expected = load_file(run.output / "adapter_model.safetensors")
    for name in ("checkpoint-3", "all_results.json", "adapter_model.safetensors"):
        path = run.output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    flags = run.arguments(**settings, per_device_train_batch_size=2)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    outcome = call([sys.executable, *launcher, "train.py", *flags])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "checkpoint-2\nprocesses were 1, now 2: dropout masks will differ" in outcome.stdout
    found = load_file(run.output / "adapter_model.safetensors")
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= 1e-4 * tensor.norm()
    with pytest.raises(InputError, match="another configuration:\n  num_processes: 2 there, 1 now"):
        run(**settings, per_device_train_batch_size=2)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_resuming_under_deepspeed_ends_the_same(run, stage):
    """Dropout on. The last checkpoint and the results are taken away after the run, and the same command goes on."""
    settings = {
        "deepspeed": deepspeed_file(run.folder, f"{stage}.json"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
    }
    flags = run.arguments(**settings, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    program = run.folder / "commands.json"
    program.write_text(json.dumps([flags]))
    launch(2, ["tests/regimes.py", str(program)])
    expected = load_file(run.output / "adapter_model.safetensors")
    assert checkpoint_problem(run.output / "checkpoint-6") is None
    shutil.rmtree(run.output / "checkpoint-6")
    for name in ("all_results.json", "adapter_model.safetensors"):
        (run.output / name).unlink()
    launch(2, ["tests/regimes.py", str(program)])
    found = load_file(run.output / "adapter_model.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    PeftModel.from_pretrained(tiny_model(), run.output)


def shell_variables(run: Runner) -> dict:
    """Settings of run_loramoe.sh for the tiny model."""
    return {
        "pretrained_model": run.flags["model_name_or_path"],
        "dataset_dir": run.flags["dataset_dir"],
        "validation_file": run.flags["validation_file"],
        "output_dir": run.folder / "outputs",
        "knowledge_probe": "none",
    }


@pytest.fixture
def shell(run):
    """Calls run_loramoe.sh on the tiny model; keyword arguments are shell variables."""

    def call_script(*flags: str, **variables) -> subprocess.CompletedProcess:
        cache = ["--data_cache_dir", str(run.flags["data_cache_dir"])]
        return call(["bash", "run_loramoe.sh", *cache, *flags], **shell_variables(run) | variables)

    return call_script


def test_the_shell_script_trains_with_variables_and_flags(run, shell):
    outcome = shell("--max_steps", "3", lora_rank=8, lora_nums=4, exp_name="x")
    assert outcome.returncode == 0, outcome.stderr
    folder = run.folder / "outputs" / "x"
    config = LoraConfig.from_pretrained(folder)
    assert (config.r, config.lora_nums, config.lora_alpha, config.blc_weight) == (8, 4, 32, 0.1)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3
    assert "held-out LM loss" in outcome.stdout
    assert "held-out LM loss" in (folder / "train.log").read_text()


def test_two_nodes_train_as_two_processes_of_one(run):
    """Both nodes are this machine; from filled tensors, dropout on."""
    start = run.folder / "start"
    filled_model().save_pretrained(start)
    same = {"lora_rank": 2, "lora_alpha": 4, "lora_nums": 4, "peft_path": start, "per_device_train_batch_size": 2}
    variables = shell_variables(run) | same | {"nnodes": 2, "num_processes": 1, "master_port": free_port()}
    command = ["bash", "run_loramoe.sh", "--data_cache_dir", str(run.flags["data_cache_dir"]), "--max_steps", "3"]
    both = [
        subprocess.Popen(command, cwd=ROOT, env=environment(**variables, node_rank=rank), stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [node.communicate(timeout=600)[0].decode() for node in both]
    assert [node.returncode for node in both] == [0, 0], said
    folder = run.folder / "outputs" / "default"
    assert [text.count(f"LoRAMoE run finished: {folder}") for text in said] == [1, 0]
    configuration = json.loads((folder / "run_config.json").read_text())
    flags = {name: configuration[name] for name in ("learning_rate", "warmup_steps", "seed")}
    launch(2, ["train.py", *run.arguments(**same | flags, num_train_epochs=2, max_steps=3)])
    nodes, processes = (load_file(place / "adapter_model.safetensors") for place in (folder, run.output))
    before = load_file(start / "adapter_model.safetensors")
    assert nodes.keys() == processes.keys()
    assert all(torch.equal(nodes[key], processes[key]) for key in nodes)
    assert not any(torch.equal(nodes[key], before[key]) for key in nodes)


BAD_INPUT = {
    "one process": ({"lora_rank": 0}, "error: --lora_rank is 0, but has to be a whole number of at least 1"),
    "two processes": ({"num_processes": 2, "dataset_dir": "none.json"}, "error: none.json: no such file or folder"),
    "no number": (
        {"num_processes": "two"},
        "error: num_processes is 'two', but has to be a whole number of at least 1",
    ),
}


@pytest.mark.parametrize(("variables", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gives_one_message_and_exit_code_1(run, shell, variables, message):
    outcome = shell(**variables)
    said = outcome.stdout + outcome.stderr
    assert outcome.returncode == 1
    assert said.count(message) == 1
    assert "Traceback" not in said
    assert not (run.folder / "outputs").exists()


def test_gpus_that_cuda_does_not_start_on_are_named(run, shell):
    """As with a driver that is too old: it counts its GPUs, but CUDA finds none."""
    (run.folder / "sitecustomize.py").write_text(
        "import torch.cuda\ntorch.cuda.device_count = lambda: 2\ntorch.cuda.is_available = lambda: False\n"
    )
    outcome = shell(PYTHONPATH=run.folder)
    assert outcome.returncode == 1
    assert outcome.stderr.count("error: ") == 1
    assert "error: there are GPUs (2), but CUDA does not start" in outcome.stderr
    assert "CUDA_VISIBLE_DEVICES= bash run_loramoe.sh trains on the CPU" in outcome.stderr
    assert not (run.folder / "outputs").exists()


@pytest.mark.parametrize(
    ("processes", "number", "send"),
    [
        (1, signal.SIGTERM, os.kill),
        (2, signal.SIGTERM, os.kill),
        (1, signal.SIGHUP, os.killpg),
        (1, signal.SIGINT, os.killpg),
        (2, signal.SIGHUP, os.killpg),
        (2, signal.SIGINT, os.killpg),
    ],
)
def test_a_signal_saves_a_checkpoint_and_ends_the_run_cleanly(run, processes, number, send):
    """SLURM sends SIGTERM to the script; Ctrl-C and a terminal that closes go to all processes of its group."""
    command = ["bash", "run_loramoe.sh", "--data_cache_dir", str(run.flags["data_cache_dir"]), "--max_steps", "100000"]
    variables = shell_variables(run) | {"num_processes": processes, "save_steps": 100000}
    folder = run.folder / "outputs" / "default"
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As in a terminal: tests that run under nohup have been told to ignore SIGHUP.
        preexec_fn=partial(signal.signal, number, signal.SIG_DFL),
    ) as script:
        for line in script.stdout:
            if "'lm_loss'" in line:
                break
        send(script.pid, number)
        said = script.stdout.read()
        assert script.wait(timeout=120) == 143
    (checkpoint,) = folder.glob("checkpoint-*")
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert said.count(f"stopped by a signal; step {step} is saved") == 1
    assert checkpoint_problem(checkpoint) is None
    assert not (folder / "all_results.json").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ahead_of_training_ends_the_run_without_a_program_of_procps(run, tmp_path, processes):
    """One process gets it while it imports; torchrun, told here to be one of two nodes, before it has any process."""
    pkill = tmp_path / "bin" / "pkill"
    pkill.parent.mkdir()
    pkill.symlink_to("/bin/false")
    command = ["bash", "run_loramoe.sh", "--data_cache_dir", str(run.flags["data_cache_dir"]), "--max_steps", "100000"]
    path = f"{pkill.parent}{os.pathsep}{environment()['PATH']}"
    variables = shell_variables(run) | {"nnodes": processes, "master_port": free_port(), "PATH": path}
    log = run.folder / "outputs" / "default" / "train.log"
    with subprocess.Popen(command, cwd=ROOT, env=environment(**variables)) as script:
        while not log.exists():
            assert script.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        script.terminate()
        assert script.wait(timeout=120) == 143
    assert not (log.parent / "all_results.json").exists()


def test_the_exit_code_is_the_trainers(run, shell):
    (run.folder / "outputs" / "default").mkdir(parents=True)
    (run.folder / "outputs" / "default" / "tensorboard").write_text("a file where a folder has to be")
    outcome = shell("--max_steps", "1")
    assert outcome.returncode == 1
    assert "Traceback" in outcome.stdout


def test_accelerate_launch_that_starts_one_process_for_two_is_refused(run):
    """`accelerate launch --cpu` takes --num_processes for a wish: it starts a single process, without a group."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    outcome = call([*launcher, "train.py", *run.arguments(num_processes=2)])
    assert outcome.returncode == 1
    assert outcome.stderr.count("error: --num_processes is 2, but the launcher started 1") == 1
    assert not run.output.exists()


def test_every_hyperparameter_is_explained_and_overridable():
    script = (ROOT / "run_loramoe.sh").read_text()
    overridable = re.findall(r"^(\w+)=\$\{\1:?-.*\}\s+# \S", script, re.MULTILINE)
    assert sorted(overridable) == sorted(SHELL_VARIABLES)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_scripts_own_and_starts_nothing(tmp_path, flag):
    shutil.copy(ROOT / "run_loramoe.sh", tmp_path)
    outcome = subprocess.run(["bash", "run_loramoe.sh", flag], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert sorted(re.findall(r"^(\w+)=.*  \S", outcome.stdout, re.MULTILINE)) == sorted(SHELL_VARIABLES)
    assert "python train.py --help" in outcome.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["run_loramoe.sh"]


# Stands in for a program: appends the arguments of Python to a file.
RECORDER = """import sys
with open("calls", "a") as calls:
    print(*sys.orig_argv[1:], sep="\\t", file=calls)
"""


def stand_in_repository(root: Path, train: str = RECORDER, gpus: str = "0 fp16") -> None:
    """Make a copy of run_loramoe.sh and its launcher, with stand-ins for all programs that they start."""
    programs = {
        "scripts/setup.sh": f"echo '{sys.executable}'\n",
        "scripts/visible_gpus.py": f"print('{gpus}')\n",
        "scripts/fetch_base_model.py": RECORDER,
        "train.py": train,
        "torch/__init__.py": "",
        "torch/distributed/run.py": RECORDER,
    }
    for name, text in programs.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in ("run_loramoe.sh", "scripts/launch.py"):
        shutil.copy(ROOT / name, root / name)


def dry_run_in(root: Path, caller: Path, *flags: str, **variables: str) -> list[list[str]]:
    """Call the run_loramoe.sh of `root` from `caller`; return the arguments of every Python program it starts."""
    subprocess.run(
        ["bash", str(root / "run_loramoe.sh"), *flags],
        cwd=caller,
        env={name: value for name, value in environment().items() if name not in SHELL_VARIABLES} | variables,
        check=True,
        timeout=60,
        stderr=subprocess.PIPE,
        text=True,
    )
    return [line.split("\t") for line in (root / "calls").read_text().splitlines()]


@pytest.fixture
def dry_run(tmp_path):
    """Calls run_loramoe.sh on as many GPUs as are named; the folder of the run, which train.py would make, is there."""

    def run_script(*flags: str, gpus: str = "0 fp16", **variables: str) -> list[list[str]]:
        stand_in_repository(tmp_path, gpus=gpus)
        (tmp_path / variables.get("output_dir", "outputs") / variables.get("exp_name", "default")).mkdir(parents=True)
        return dry_run_in(tmp_path, tmp_path, *flags, **variables)

    return run_script


def flag_values(arguments: list[str]) -> dict[str, str]:
    """Flags and their values; fails the test where one is given twice."""
    names, values = arguments[::2], arguments[1::2]
    assert len(set(names)) == len(names) == len(values)
    assert all(name.startswith("--") for name in names)
    return dict(zip(names, values, strict=True))


def test_every_hyperparameter_reaches_its_flag(dry_run):
    table = TRAIN_VARIABLES | LAUNCHER_VARIABLES
    variables = {name: value for name, (_, value) in table.items()}
    assert len({*variables.values()}) == len(variables)
    more = ["--weight_decay", "0.121"]
    prepare, train = dry_run(*more, **variables, output_dir="my runs", exp_name="my run")
    shared = prepare[1:-2]
    assert prepare == ["train.py", *shared, "--prepare_only", "true"]
    assert shared[-2:] == more
    assert flag_values(shared) == dict(TRAIN_VARIABLES.values()) | {
        "--output_dir": "my runs/my run",
        "--num_processes": str(117 * 119),
        "--eval_strategy": "steps",
        "--use_cpu": "true",
        "--weight_decay": "0.121",
    }
    program = train.index("train.py")
    assert train[:2] == ["-m", "torch.distributed.run"]
    assert flag_values(train[2:program]) == SIGNALS | dict(LAUNCHER_VARIABLES.values())
    assert train[program:] == ["train.py", *shared, "--restart", "false"]


def test_without_variables_one_process_trains_on_the_fetched_model(dry_run, capfd):
    fetch, prepare, train = dry_run()
    assert capfd.readouterr().out == "no GPU found, training on the CPU\n"
    assert fetch == ["-m", "scripts.fetch_base_model"]
    flags = flag_values(prepare[1:])
    assert flags["--model_name_or_path"] == "models/SmolLM2-135M-Instruct"
    assert flags["--output_dir"] == "outputs/default"
    assert not {"--deepspeed", "--peft_path", "--tokenizer_name_or_path"} & {*flags}
    assert train[0] == "train.py"


def test_the_tiny_data_alone_brings_its_held_out_rows(dry_run):
    _, prepare, _ = dry_run()
    assert flag_values(prepare[1:])["--validation_file"] == "data/tiny_data/test.json"
    *_, prepare, _ = dry_run(dataset_dir="mine", exp_name="mine")
    assert not {"--validation_file", "--eval_strategy", "--eval_steps"} & {*flag_values(prepare[1:])}


@pytest.mark.parametrize(
    ("mix", "is_evaluated"),
    [
        ("held_out: 0.1\nsources: []", True),
        ("sources:\n  - {path: a.json, held_out: .05}", True),
        ('{"held_out": 1e-3}', True),
        ("sources: []", False),
        ("held_out: 0.0 # not 0.1", False),
        ("# held_out: 0.1", False),
    ],
)
def test_a_mix_brings_the_rows_that_it_holds_out(dry_run, tmp_path, mix, is_evaluated):
    (tmp_path / "mix.yaml").write_text(mix)
    *_, prepare, _ = dry_run(dataset_dir="mix.yaml")
    assert flag_values(prepare[1:]).get("--validation_file") == ("mix.yaml" if is_evaluated else None)
    assert ("--eval_steps" in prepare) == is_evaluated


def test_a_slash_behind_a_folder_changes_nothing(dry_run):
    fetch, prepare, _ = dry_run(pretrained_model="models/SmolLM2-135M-Instruct/", dataset_dir="data/tiny_data/train/")
    assert fetch == ["-m", "scripts.fetch_base_model"]
    flags = flag_values(prepare[1:])
    assert flags["--model_name_or_path"] == "models/SmolLM2-135M-Instruct"
    assert flags["--dataset_dir"] == "data/tiny_data/train"
    assert flags["--validation_file"] == "data/tiny_data/test.json"


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_on_gpus_there_is_a_process_for_each_with_zero2_and_half_precision(dry_run, half):
    *_, prepare, train = dry_run(gpus=f"3 {half}", validation_file="")
    flags = flag_values(prepare[1:])
    assert flags[f"--{half}"] == "true"
    assert flags["--deepspeed"] == "scripts/deepspeed/zero2.json"
    assert not {"--use_cpu", "--validation_file", "--eval_strategy", "--eval_steps"} & {*flags}
    assert flags["--num_processes"] == "3"
    launcher = train[2 : train.index("train.py")]
    assert launcher.pop() == "--standalone"
    assert flag_values(launcher) == SIGNALS | {"--nproc_per_node": "3"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"nnodes": "2", "node_rank": "2"}, "node_rank is 2, but with nnodes=2 the nodes have the numbers 0 to 1"),
        ({"num_processes": "4"}, "num_processes is 4, but each process needs its own GPU, and 3 are visible"),
    ],
    ids=["node", "GPU"],
)
def test_nodes_and_gpus_that_there_are_not_are_refused(dry_run, variables, message):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        dry_run(gpus="3 bf16", **variables)
    assert caught.value.returncode == 1
    assert caught.value.stderr == f"error: {message}\n"


def test_several_nodes_meet_at_the_first_one(dry_run):
    *_, prepare, train = dry_run(nnodes="2", node_rank="1", num_processes="4", master_addr="node.example")
    assert flag_values(prepare[1:])["--num_processes"] == "8"
    assert flag_values(train[2 : train.index("train.py")]) == SIGNALS | {
        "--nproc_per_node": "4",
        "--nnodes": "2",
        "--node_rank": "1",
        "--master_addr": "node.example",
        "--master_port": "29500",
    }


def test_the_gradients_of_two_ranks_with_uneven_batches(tmp_path):
    """The term over ranks against the same samples on one process: three on rank 0, one on rank 1; then all on rank 0
    and a padding example on rank 1."""
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    outcome = call([*launcher, "--master_port", str(free_port()), str(program), str(tmp_path)], PYTHONPATH=ROOT)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    one, *ranks = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "rank0", "rank1"))
    for case in range(2):
        # Data parallelism averages over the ranks.
        gathered = torch.cat([rank[case][0] for rank in ranks], dim=1)[:, :4] / 2
        torch.testing.assert_close(gathered, one[0])
        for rank in ranks:
            torch.testing.assert_close(rank[case][1], one[1])
    assert not ranks[1][1][0].any()


RANKS = """
import sys
import torch
import torch.distributed as dist
from peft import balance_coefficients, localized_balance_term

def gradient_and_term(shares, types, *args):
    shares = shares.clone().requires_grad_()
    term = localized_balance_term(shares, balance_coefficients([2, 2], 0.1)[types], *args)
    term.backward()
    return shares.grad, term.detach()

torch.manual_seed(0)
shares = torch.softmax(torch.randn(2, 4, 4), dim=-1)
types = torch.tensor([0, 1, -1, 1])
dist.init_process_group("gloo")
first = dist.get_rank() == 0
mine = slice(0, 3) if first else slice(3, 4)
uneven = gradient_and_term(shares[:, mine], types[mine], None, True)
mine = slice(0, 4) if first else slice(0, 1)
padded = gradient_and_term(shares[:, mine], types[mine], torch.full(types[mine].shape, int(first)), True)
torch.save((uneven, padded), f"{sys.argv[1]}/rank{dist.get_rank()}.pt")
if first:
    torch.save(gradient_and_term(shares, types), f"{sys.argv[1]}/one.pt")
dist.destroy_process_group()
"""
