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


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = names[0] if names else platform.processor() or sys.platform
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB"
