"""The origin of a measurement: commit, command, machine, versions."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def provenance(program: str, argv: list[str]) -> dict:
    """Everything needed to repeat a measurement, as plain JSON values."""
    return {
        "commit": _commit(),
        "command": shlex.join(["python", "-m", program, *argv]),
        "machine": _machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
    }


def provenance_line(record: dict) -> str:
    """A record of `provenance` as one line of text."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"commit {record['commit']}, `{record['command']}`, {record['machine']}, {versions}"


def _commit() -> str:
    """Short hash of the commit, with a plus sign if tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """What computes here, and rounds in its own way: the GPU, else the CPU with family and model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    family, model = (_cpu(field) for field in ("cpu family", "model"))
    return f"{_cpu_name()} (family {family}, model {model})" if family and model else _cpu_name()


def _cpu(field: str) -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found and found[1]


def _cpu_name() -> str:
    return _cpu("model name") or platform.processor() or sys.platform


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = _cpu_name()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB"
