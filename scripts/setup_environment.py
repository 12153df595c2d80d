"""Find or make the Python environment of this repository and print the path of its interpreter.

Started by scripts/setup.sh from the repository root as ``python -m scripts.setup_environment``. It uses the standard
library only, since it runs before anything is installed. The environment that runs it is used if it satisfies
requirements.txt, and is never changed; otherwise ``.venv`` in the repository root is used, and made if need be.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TextIO

MINIMUM_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements.txt"
VIRTUAL_ENVIRONMENT = ROOT / ".venv"
VIRTUAL_PYTHON = VIRTUAL_ENVIRONMENT / "bin" / "python"
INSTALL_LOG = VIRTUAL_ENVIRONMENT / "setup.log"
LOCK_FILE = ROOT / ".setup.lock"

# Passed on by pip to the pips that it starts itself. pip's own number of retries makes an unreachable index take
# minutes to be noticed.
PIP_ENVIRONMENT = {"PIP_RETRIES": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
LAST_RETRY = "Retry(total=0,"
CONNECTION_ERRORS = ("ConnectionPool(", "ConnectionError", "Max retries exceeded", "Read timed out", "SSLError(")
LONGEST_QUOTE = 300


def say(message: str) -> None:
    """Print a message for the user, to stderr: stdout is for the interpreter's path alone."""
    print(f"[setup] {message}", file=sys.stderr, flush=True)


def read_pins(path: Path) -> dict[str, str]:
    """Return the version of each package that a requirements file pins.

    Raises SystemExit if a line is not of the form ``name==version``.
    """
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        name, separator, version = requirement.partition("==")
        if separator:
            pins[name.strip()] = version.strip()
        elif requirement:
            raise SystemExit(f"[setup] {path} must pin each package as name==version, but has the line: {line}")
    return pins


def in_virtual_environment() -> bool:
    """Tell whether this interpreter is the one of ``.venv``."""
    return Path(sys.prefix).resolve() == VIRTUAL_ENVIRONMENT.resolve()


def installed_version(name: str) -> str:
    """Return the version of a package in this interpreter, "" if it is missing or only half installed."""
    try:
        distribution = metadata.distribution(name)
        # pip writes INSTALLER once all files of a package are in place. Environments that others made may lack it.
        complete = distribution.read_text("INSTALLER") is not None or not in_virtual_environment()
        return (distribution.version or "") if complete else ""
    except (metadata.PackageNotFoundError, KeyError):
        return ""


def unmet_pins(pins: dict[str, str]) -> list[str]:
    """Return a description of each pin that this interpreter's packages do not satisfy.

    A local version suffix does not count: 2.13.0+cpu satisfies 2.13.0.
    """
    installed = {name: installed_version(name) for name in pins}
    return [
        f"{name} {installed[name] or 'missing'} (needed: {version})"
        for name, version in pins.items()
        if installed[name].split("+")[0] != version
    ]


def unmet_in_virtual_environment() -> list[str] | None:
    """Return the pins that ``.venv`` does not satisfy, None if it has no usable interpreter."""
    command = [VIRTUAL_PYTHON, "-m", "scripts.setup_environment", "--report-unmet"]
    try:
        outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return json.loads(outcome.stdout) if outcome.returncode == 0 else None


def report_unmet() -> None:
    """Print the unmet pins of this interpreter as JSON, for the process that asks about ``.venv``.

    Raises SystemExit if this is not the interpreter of ``.venv``: a ``.venv`` whose making was cut short can start its
    base interpreter, into which nothing must be installed.
    """
    if not in_virtual_environment():
        raise SystemExit(f"[setup] {sys.executable} does not belong to {VIRTUAL_ENVIRONMENT}")
    print(json.dumps(unmet_pins(read_pins(REQUIREMENTS))))


@contextlib.contextmanager
def exclusive_lock() -> Iterator[TextIO]:
    """Let one set-up at a time change ``.venv``; yields the open lock file."""
    with LOCK_FILE.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is running, waiting for it to end.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def run_with_output(command: list[str | Path], lock: TextIO, *copies: TextIO) -> tuple[int, list[str]]:
    """Run a command, copy its output line by line to the given files, and return its exit code and output.

    The command inherits the lock, so that a command which outlives this process still keeps other set-ups waiting.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | PIP_ENVIRONMENT,
        pass_fds=[lock.fileno()],
    ) as process:
        try:
            output = list(copy_lines(process.stdout, copies))
        except BaseException:
            process.terminate()
            raise
    return process.returncode, output


def copy_lines(lines: Iterable[str], copies: tuple[TextIO, ...]) -> Iterator[str]:
    """Yield lines without their ends, each after it was written to the given files."""
    for line in lines:
        for copy in copies:
            copy.write(line)
            copy.flush()
        yield line.rstrip()


def shorten(text: str) -> str:
    """Return a text cut to the length at which a message can still be read."""
    return text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "..."


def most_telling_line(output: list[str]) -> str:
    """Return the line of a program's output that says best why it failed."""
    lines = [line.strip() for line in output if line.strip()]
    # The last of these is pip's conclusion. Its link to a manual is not, nor is the head of a traceback, which ends
    # with what matters.
    errors = [line for line in lines if line.startswith(("ERROR:", "×", "Error:")) and "for help visit" not in line]
    if errors and errors[-1] == "ERROR: Exception:":
        errors = []
    return shorten((errors or lines or ["no output"])[-1].removeprefix("ERROR: ").removeprefix("× "))


def explain_pip_failure(output: list[str]) -> str:
    """Return what to tell the user after pip failed, judged by its output; an unreachable index is told apart."""
    reason = most_telling_line(output)
    last_retries = [line for line in output if LAST_RETRY in line]
    if last_retries or any(sign in reason for sign in CONNECTION_ERRORS):
        # pip's own conclusion is misleading here: that no version of the package was found.
        cause = shorten(last_retries[-1].partition("connection broken by ")[2]) if last_retries else reason
        return (
            f"The package index cannot be reached: {cause.rstrip('.')}. "
            "Check the network connection, and the proxy and index settings of pip, then run this again."
        )
    return f"pip failed: {reason.rstrip('.')}."


def create_virtual_environment(lock: TextIO) -> None:
    """Make ``.venv``, in place of one that does not work.

    Raises SystemExit if this Python cannot make virtual environments.
    """
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SystemExit(
            f"[setup] {sys.executable} cannot make a virtual environment, since its venv or ensurepip module is "
            f"missing. Install it (on Debian and Ubuntu: apt-get install python{version}-venv), or activate an "
            "environment with another Python, then run this again."
        )
    if VIRTUAL_ENVIRONMENT.exists():
        say(f"{VIRTUAL_ENVIRONMENT} does not work or was not completed; it is made anew.")
    status, output = run_with_output([sys.executable, "-m", "venv", "--clear", VIRTUAL_ENVIRONMENT], lock)
    if status != 0:
        raise SystemExit(f"[setup] {VIRTUAL_ENVIRONMENT} could not be made: {most_telling_line(output)}")


def forget_half_installed_packages() -> None:
    """Remove the metadata of the packages in ``.venv`` whose installation was cut short.

    pip takes such a package for installed, so it would never add the missing files.
    """
    for folder in VIRTUAL_ENVIRONMENT.glob("lib/python3*/site-packages/*.dist-info"):
        if not (folder / "INSTALLER").exists():
            shutil.rmtree(folder)


def has_pip(lock: TextIO) -> bool:
    """Tell whether pip runs in ``.venv``."""
    return run_with_output([VIRTUAL_PYTHON, "-m", "pip", "--version"], lock)[0] == 0


def ensure_pip(lock: TextIO) -> None:
    """Add pip to ``.venv`` if it does not run there; if that does not help, make ``.venv`` anew."""
    if has_pip(lock):
        return
    say(f"pip does not run in {VIRTUAL_ENVIRONMENT} and is added.")
    run_with_output([VIRTUAL_PYTHON, "-m", "ensurepip", "--upgrade", "--default-pip"], lock)
    # ensurepip takes a damaged pip for a good one if its metadata are there.
    if not has_pip(lock):
        create_virtual_environment(lock)


def install_requirements(lock: TextIO) -> None:
    """Install requirements.txt into ``.venv`` with one pip command; its output goes to stderr and to a log.

    Raises SystemExit if pip fails or the requirements are not satisfied afterwards.
    """
    # --no-user: a user's pip setting to install into the home folder makes pip refuse to work in a .venv.
    command = [VIRTUAL_PYTHON, "-m", "pip", "install", "--no-user", "--no-input", "--requirement", REQUIREMENTS]
    with INSTALL_LOG.open("w", encoding="utf-8") as log:
        status, output = run_with_output(command, lock, sys.stderr, log)
    if status != 0:
        raise SystemExit(f"[setup] {explain_pip_failure(output)} All of pip's output is in {INSTALL_LOG}")
    unmet = unmet_in_virtual_environment()
    if unmet is None or unmet:
        missing = ", ".join(unmet or ["its interpreter does not run"])
        raise SystemExit(f"[setup] pip succeeded, yet {VIRTUAL_ENVIRONMENT} is not complete: {missing}")


def announce_installation(unmet_here: list[str]) -> None:
    """Say what is going to be installed, where and why, and what it costs."""
    lacks = "; ".join(unmet_here[:3]) + (f"; and {len(unmet_here) - 3} more" if len(unmet_here) > 3 else "")
    untouched = "" if in_virtual_environment() else " and is left as it is"
    say(f"{sys.executable} does not satisfy requirements.txt{untouched}: {lacks}.")
    say(
        f"The packages of requirements.txt are now installed into {VIRTUAL_ENVIRONMENT}. This is needed once. With "
        "PyTorch for the CPU it takes 2 to 4 minutes on a fast network and 2 GB of disk, with PyTorch for CUDA, which "
        "pip chooses on most Linux machines, longer and several GB more."
    )


def complete_virtual_environment(lock: TextIO) -> None:
    """Make ``.venv``, or complete what an earlier run left, so that it satisfies requirements.txt.

    Raises SystemExit if that fails.
    """
    if unmet_in_virtual_environment() is None:
        create_virtual_environment(lock)
    forget_half_installed_packages()
    ensure_pip(lock)
    install_requirements(lock)
    say("The environment is complete.")


def find_or_make_interpreter() -> Path:
    """Return the path of an interpreter that satisfies requirements.txt.

    Raises SystemExit if there is none and none can be made.
    """
    unmet_here = unmet_pins(read_pins(REQUIREMENTS))
    if not unmet_here:
        return Path(sys.executable)
    if unmet_in_virtual_environment() != []:
        with exclusive_lock() as lock:
            # Another set-up may have completed it in the meantime.
            if unmet_in_virtual_environment() != []:
                announce_installation(unmet_here)
                complete_virtual_environment(lock)
    return VIRTUAL_PYTHON


def main() -> None:
    """Print the interpreter's path; with ``--report-unmet`` print what this interpreter lacks.

    Raises SystemExit with the message for the user if that is not possible.
    """
    parser = argparse.ArgumentParser(description="Find or make the Python environment of this repository.")
    parser.add_argument("--report-unmet", action="store_true", help="print what .venv lacks; for internal use")
    arguments = parser.parse_args()
    if sys.version_info < MINIMUM_PYTHON:
        raise SystemExit(f"[setup] Python 3.11 or newer is needed, but {sys.executable} is {sys.version.split()[0]}.")
    if arguments.report_unmet:
        report_unmet()
    else:
        print(find_or_make_interpreter())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("[setup] Interrupted. Run it again to go on.") from None
    except OSError as error:
        raise SystemExit(f"[setup] The set-up failed: {error}") from None
