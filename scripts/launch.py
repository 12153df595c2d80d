"""Start the main job on this node. `run_loramoe.sh` ends with this call:

    python -m scripts.launch --output_dir=FOLDER --num_processes=2 ... -- FLAGS_OF_TRAIN_PY

Its steps: count the GPUs, fetch the small base model if it is the one asked for, check everything and encode the data
(`train.py --prepare_only`), train. Each is a child process in its own session, so SIGTERM, Ctrl-C, Ctrl-\\ and the
SIGHUP of a closed terminal reach this process only. It interrupts a step before training; in training it sends SIGTERM
to the processes that run train.py, which save a checkpoint and stop.

Exit code: that of the step that failed, 0 if the run is finished, 143 if a signal stopped it.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

SMALL_BASE_MODEL = "models/SmolLM2-135M-Instruct"
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
STOPPED = 128 + signal.SIGTERM  # exit code
SECONDS_FOR_OUTPUT = 10  # after training, for what is still in the pipe


def main(argv: list[str] | None = None) -> None:
    """Run all steps; ends with SystemExit."""
    args = parse_arguments(argv)
    # Blocked signals stay pending until `wait` asks for them: none is lost, and none interrupts anything else.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS | {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a caller that ignores it would cost us the exit codes
    os.environ |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    gpus, half = step("-m", "scripts.visible_gpus", stdout=subprocess.PIPE).split()[-2:]
    resolve(args, int(gpus))
    flags = train_flags(args, int(gpus), half)
    if SMALL_BASE_MODEL in flags:
        step("-m", "scripts.fetch_base_model")
    # Check everything and encode the data once, before any process group exists and any weight is read.
    step("train.py", *flags, "--prepare_only", "true")
    sys.exit(train(args, [*flags, "--restart", "false"], torchrun(args, int(gpus))))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the variables of `run_loramoe.sh` and, in `flags`, what is for train.py.

    Raises:
        SystemExit: a number cannot be used, or the folder is given among the flags as well.
    """
    parser = argparse.ArgumentParser(prog="python -m scripts.launch", description="Started by run_loramoe.sh.")
    for name in ("output_dir", "num_processes", "nnodes", "node_rank", "master_addr", "master_port"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--deepspeed_config_file", required=True, metavar="FILE")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    args = parser.parse_args(argv)
    if any(flag.partition("=")[0].replace("-", "_") == "__output_dir" for flag in args.flags):
        sys.exit("error: the run's folder is output_dir/exp_name: set these two variables instead of --output_dir")
    args.num_processes = args.num_processes and whole_number("num_processes", args.num_processes, least=1)
    args.nnodes = whole_number("nnodes", args.nnodes, least=1)
    args.node_rank = whole_number("node_rank", args.node_rank, least=0)
    if args.node_rank >= args.nnodes:
        sys.exit(
            f"error: node_rank is {args.node_rank}, but with nnodes={args.nnodes} the nodes have the numbers 0 to "
            f"{args.nnodes - 1}"
        )
    return args


def whole_number(name: str, value: str, least: int) -> int:
    """Convert the value of a variable; ends the program if it is not a whole number or too small."""
    if not re.fullmatch("[0-9]+", value) or int(value) < least:
        limit = f" of at least {least}" if least else ""
        sys.exit(f"error: {name} is '{value}', but has to be a whole number{limit}")
    return int(value)


def resolve(args: argparse.Namespace, gpus: int) -> None:
    """Fill in the variables that depend on the number of visible GPUs."""
    if gpus and (args.num_processes or 1) > gpus:
        sys.exit(
            f"error: num_processes is {args.num_processes}, but each process needs its own GPU, and {gpus} are visible"
        )
    args.num_processes = args.num_processes or max(gpus, 1)
    if args.deepspeed_config_file == "auto":
        args.deepspeed_config_file = "scripts/deepspeed/zero2.json" if gpus else ""
    if not gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
        with contextlib.suppress(OSError):  # nobody reads any more
            os.write(sys.stdout.fileno(), b"no GPU found, training on the CPU\n")


def train_flags(args: argparse.Namespace, gpus: int, half: str) -> list[str]:
    """Flags of train.py; those of the caller come last, so they win."""
    flags = ["--output_dir", args.output_dir, "--num_processes", str(args.num_processes * args.nnodes)]
    flags += [f"--{half}" if gpus else "--use_cpu", "true"]
    if args.deepspeed_config_file:
        flags += ["--deepspeed", args.deepspeed_config_file]
    return flags + args.flags


def torchrun(args: argparse.Namespace, gpus: int) -> list[str]:
    """Arguments of Python that start torchrun; empty for one process on a CPU without DeepSpeed."""
    if not (gpus or args.num_processes * args.nnodes > 1 or args.deepspeed_config_file):
        return []
    # Not SIGTERM, at which it would end its workers without waiting for their checkpoint.
    launcher = ["-m", "torch.distributed.run", "--signals_to_handle", "SIGINT,SIGHUP,SIGQUIT"]
    launcher += ["--nproc_per_node", str(args.num_processes)]
    if args.nnodes == 1 and not args.master_port:
        return [*launcher, "--standalone"]
    launcher += ["--nnodes", str(args.nnodes), "--node_rank", str(args.node_rank)]
    return [*launcher, "--master_addr", args.master_addr, "--master_port", args.master_port or "29500"]


def train(args: argparse.Namespace, flags: list[str], launcher: list[str]) -> int:
    """Train to the end or to a stop signal, with the output on the terminal and in train.log; returns the exit code."""
    folder = Path(args.output_dir)
    if launcher and not os.environ.get("OMP_NUM_THREADS"):
        # torchrun would give each process one thread, but offloading runs the optimizer on the CPU.
        os.environ["OMP_NUM_THREADS"] = str(max(len(os.sched_getaffinity(0)) // args.num_processes, 1))
    # tee goes on writing the log if the terminal closes or this process is killed.
    log = start(["tee", "-a", f"{folder}/train.log"], ignored=STOP_SIGNALS | {signal.SIGPIPE}, stdin=subprocess.PIPE)
    trainer = start(
        [sys.executable, *launcher, "train.py", *flags],
        ignored=STOP_SIGNALS,  # until train.py handles SIGTERM
        stdin=subprocess.DEVNULL,
        stdout=log.stdin,
        stderr=subprocess.STDOUT,
    )
    assert log.stdin is not None
    log.stdin.close()
    stopped = wait(trainer, stopper(trainer, by_torchrun=bool(launcher)))
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that outlives the trainer may keep the pipe open
        log.wait(SECONDS_FOR_OUTPUT)
    if stopped and trainer.returncode in (0, -signal.SIGUSR1):
        return 0 if (folder / "all_results.json").exists() else STOPPED
    return exit_code(trainer)


def step(*arguments: str, stdout: int | None = None) -> str:
    """Run Python to its end and return what it wrote to a piped stdout.

    Raises:
        SystemExit: it failed, or a stop signal came.
    """
    process = start([sys.executable, *arguments], stdout=stdout, text=True)
    # SIGINT, so that temporary files are removed.
    if wait(process, lambda: process.send_signal(signal.SIGINT)):
        sys.exit(STOPPED)
    if process.returncode:
        sys.exit(exit_code(process))
    return process.stdout.read() if process.stdout else ""


def start(command: list[str], ignored: Iterable[int] = (), **options) -> subprocess.Popen:
    """Start a program in its own session, with some signals ignored and none blocked; stop signals act by default."""

    def prepare_signals() -> None:
        # A shell has the programs that it runs in the background ignore SIGINT, but a step is to be interrupted by it.
        for number in STOP_SIGNALS.union(ignored):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS | {signal.SIGCHLD})

    return subprocess.Popen(command, start_new_session=True, preexec_fn=prepare_signals, **options)


def wait(process: subprocess.Popen, stop: Callable[[], None]) -> bool:
    """Wait for a child process to end; after a stop signal, call `stop` each second until then.

    Returns:
        Whether a stop signal came. Those that the caller has this process ignore, as nohup does, are not counted.
    """
    counted = {number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    stopped = False
    while process.poll() is None:
        received = signal.sigtimedwait({signal.SIGCHLD} if stopped else counted | {signal.SIGCHLD}, 1)
        stopped = stopped or (received is not None and received.si_signo in counted)
        if stopped:
            stop()
    return stopped


def stopper(trainer: subprocess.Popen, by_torchrun: bool) -> Callable[[], None]:
    """A function that asks the processes that run train.py to stop.

    It is called repeatedly, since a process that has only just been started misses the signal. torchrun without workers
    may be waiting for other nodes for long, so the second call in a row that finds none ends it; the first may come
    between two of the short-lived processes that it starts.
    """
    calls_without = 0

    def stop() -> None:
        nonlocal calls_without
        workers = children(trainer.pid) if by_torchrun else [trainer.pid]
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(worker, signal.SIGTERM)
        calls_without = 0 if workers else calls_without + 1
        if calls_without == 2:
            trainer.send_signal(signal.SIGUSR1)

    return stop


def children(process: int) -> list[int]:
    """Return the ids of a process's children."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # the process has just ended
            if f"\nPPid:\t{process}\n".encode() in status.read_bytes():
                found.append(int(status.parent.name))
    return found


def exit_code(process: subprocess.Popen) -> int:
    """Return a process's exit code as a shell does: 128 + the signal that ended it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    main()
