"""Find or make the Python environment of this repository and print the path of its interpreter.

Started by scripts/setup.sh as ``python -m scripts.setup_environment``; standard library only, since it runs before
anything is installed. An active environment that satisfies requirements.txt is used as it is; otherwise uv makes or
completes ``.venv`` with the versions and hashes of requirements.lock.
"""

import ast
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS, LOCKED = ROOT / "requirements.txt", ROOT / "requirements.lock"
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
INSTALLED = ENVIRONMENT / "installed.lock"  # a copy of requirements.lock, written once everything is installed
# pip's own number of retries makes an unreachable index take minutes to be noticed.
PIP_ENVIRONMENT = {"PIP_RETRIES": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
# uv does not read pip's settings: its name for each, and what separates the parts of a list.
UV_NAMES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}
NO_CONNECTION = ("ConnectionPool(", "ConnectionError", "Max retries exceeded", "timed out", "SSLError(", "to fetch:")


def say(message: str) -> None:
    """Print a message for the user, to stderr: stdout is for the interpreter's path alone."""
    print(f"[setup] {message}", file=sys.stderr, flush=True)


def read_pins(path: Path) -> dict[str, str]:
    """Return the version of each package in a file of lines ``name==version``; raises SystemExit for other lines."""
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if wrong := [line for line in lines if line and "==" not in line]:
        raise SystemExit(f"[setup] {path} must pin each package as name==version, but has the line: {wrong[0]}")
    return dict(re.split(r"\s*==\s*", line) for line in lines if line)


def unmet_pins(pins: dict[str, str], folders: list[str]) -> list[str]:
    """Describe the pins that the packages in some folders do not satisfy; 2.13.0+cpu satisfies 2.13.0."""
    packages = {name: next(iter(metadata.distributions(name=name, path=folders)), None) for name in pins}
    found = {name: (package and package.version) or "missing" for name, package in packages.items()}
    unmet = [name for name, version in pins.items() if found[name].split("+")[0] != version]
    return [f"{name} {found[name]} (needed: {pins[name]})" for name in unmet]


def is_complete(pins: dict[str, str]) -> bool:
    """Tell whether ``.venv`` holds what requirements.lock names, and nobody has changed a pinned package since."""
    folders = [str(folder) for folder in ENVIRONMENT.glob("lib/python3*/site-packages")]
    finished = os.access(PYTHON, os.X_OK) and INSTALLED.is_file() and INSTALLED.read_bytes() == LOCKED.read_bytes()
    return finished and not unmet_pins(pins, folders)


def explain_failure(program: str, output: list[str]) -> str:
    """Return what to tell the user after pip or uv failed, judged by its output."""
    lines = [line.strip() for line in output if line.strip()] or ["no output"]
    # After these, pip's conclusion is misleading: that no version of the package was found.
    retries = [line.partition("connection broken by ")[2] for line in lines if "Retry(total=0," in line]
    errors = [line for line in lines if re.match(r"(error|cause): (?!Exception:)|×", line, re.IGNORECASE)]
    reason = re.sub(r"^(error:|cause:|×) *", "", (retries or errors or lines)[-1], flags=re.IGNORECASE)
    reason = reason[:300].rstrip(".")
    if retries or any(sign in line for sign in NO_CONNECTION for line in errors):
        return (
            f"The package index cannot be reached: {reason}. "
            "Check the network connection, and the proxy and index settings of pip, then run this again."
        )
    return f"{program} failed: {reason}."


def run(program: str, command: list, lock: int, variables: dict[str, str]) -> None:
    """Run a command with its output on stderr; raises SystemExit with the reason if it fails.

    The command inherits the lock: if it outlives this process, other set-ups still wait for it.
    """
    options: dict = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, errors="replace", env=variables | os.environ, pass_fds=[lock], **options) as process:
        output = []
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            output.append(line)
    if process.returncode:
        raise SystemExit(f"[setup] {explain_failure(program, output)}")


@contextmanager
def installation_lock(path: Path) -> Iterator[int]:
    """Hold a lock file, after waiting for another set-up that holds it; yields its file descriptor."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is running, waiting for it to end.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def make_environment(lock: int) -> None:
    """Make ``.venv`` with pip in it, unless one is there that works."""
    # Without its pyvenv.cfg, .venv/bin/python is the system's Python, into which nothing must be installed.
    probe: list = [PYTHON, "-c", "import sys, pip; sys.exit(sys.prefix == sys.base_prefix)"]
    if os.access(PYTHON, os.X_OK) and subprocess.run(probe, capture_output=True).returncode == 0:
        return
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise SystemExit(
            f"[setup] {sys.executable} cannot make a virtual environment, since its venv or ensurepip module is "
            f"missing. Install it (on Debian and Ubuntu: apt-get install python{sys.version_info[0]}."
            f"{sys.version_info[1]}-venv), or activate an environment with another Python, then run this again."
        )
    run("venv", [sys.executable, "-m", "venv", "--clear", ENVIRONMENT], lock, {})


def uv_environment(python: Path) -> dict[str, str]:
    """Return the variables that give uv the index, proxy and certificate settings of an interpreter's pip."""
    listed = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout.splitlines()
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_PYTHON_DOWNLOADS": "never"}
    for line in sorted(listed, key=lambda line: line.startswith(":env:")):  # the environment has the last word
        found = re.match(r"(?:global|install|:env:)\.([a-z-]+)=(.*)", line)
        if found and found[1] in UV_NAMES:
            name, separator = UV_NAMES[found[1]]
            variables[name] = separator.join(ast.literal_eval(found[2]).split())
    cache = os.environ.get("UV_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home()
    linked = os.path.exists(cache) and os.stat(cache).st_dev == os.stat(ROOT).st_dev
    variables["UV_LINK_MODE"] = "hardlink" if linked else "copy"  # uv warns where it finds out by itself
    return {name: value for name, value in variables.items() if value}


def install(lock: int) -> None:
    """Install the locked packages into ``.venv``: uv by pip, the others by uv."""
    INSTALLED.unlink(missing_ok=True)
    for folder in ENVIRONMENT.glob("lib/python3*/site-packages/*.dist-info"):
        if not (folder / "INSTALLER").exists():  # Written last: without it, an installation was cut short.
            shutil.rmtree(folder)
    locked_uv = ENVIRONMENT / "uv.lock"
    locked_uv.write_text(re.findall(r"^uv==.*(?:\n .*)*", LOCKED.read_text(encoding="utf-8"), re.MULTILINE)[0])
    # --no-user: a user's pip setting to install into the home folder makes pip refuse to work in a .venv.
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--no-input", "--no-user", "--no-deps", "--require-hashes"]
    run("pip", [*pip, "--requirement", locked_uv], lock, PIP_ENVIRONMENT)
    uv = [ENVIRONMENT / "bin" / "uv", "pip", "install", "--python", PYTHON, "--build-constraints", LOCKED]
    run("uv", [*uv, "--constraints", LOCKED, "--requirements", REQUIREMENTS], lock, uv_environment(PYTHON))
    shutil.copyfile(LOCKED, INSTALLED)


def find_or_make_interpreter() -> Path:
    """Return the path of an interpreter that satisfies requirements.txt; raises SystemExit if none can be made."""
    pins = read_pins(REQUIREMENTS)
    unmet = unmet_pins(pins, sys.path)
    if not unmet and Path(sys.prefix).resolve() != ENVIRONMENT:
        return Path(sys.executable)
    if is_complete(pins):
        return PYTHON
    with installation_lock(ROOT / ".setup.lock") as lock:
        if not is_complete(pins):  # Another set-up may have completed it in the meantime.
            more = f"; and {len(unmet) - 3} more" if len(unmet) > 3 else ""
            say(f"{sys.executable} does not satisfy requirements.txt: {'; '.join(unmet[:3])}{more}.")
            say(f"They are now installed into {ENVIRONMENT}, once. This takes 2 GB of disk, with CUDA 6 GB.")
            make_environment(lock)
            install(lock)
            say("The environment is complete.")
    return PYTHON


if __name__ == "__main__":
    try:
        print(find_or_make_interpreter())
    except KeyboardInterrupt:
        raise SystemExit("[setup] Interrupted. Run it again to go on.") from None
    except OSError as error:
        raise SystemExit(f"[setup] The set-up failed: {error}") from None
