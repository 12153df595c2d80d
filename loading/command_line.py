"""The command line of every program here: flags from dataclasses, and one message where the user is mistaken."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from data import InputError, first_line, is_unicode


def flag(default, text: str, **metadata):
    """A dataclass field that becomes the flag of its name, with its help text."""
    return field(default=default, metadata={"help": text, **metadata})


def listed(text: str | None) -> list[str] | None:
    """The items of a flag's value, separated by commas and perhaps spaces; None where the flag was not given."""
    return None if text is None else [item.strip() for item in text.split(",") if item.strip()]


class FlagParser(HfArgumentParser):
    """Raises InputError instead of exiting, with the nearest names for a flag that does not exist.

    Args:
        kinds: dataclasses; every field is a flag.
        command: how the program is called, for its help and messages.
    """

    def __init__(self, kinds: tuple[type, ...], command: str, description: str | None = None):
        super().__init__(kinds, prog=command, description=description, allow_abbrev=False)

    def error(self, message: str):
        unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        for name in unknown:
            if near := difflib.get_close_matches(name, self._option_string_actions, n=2):
                message += f"; did you mean {' or '.join(near)} instead of {name}?"
        raise InputError(f"{message} ({self.prog} --help lists every flag)")


def output_problem(output: str | Path | None, inputs: Sequence[str | None] = (), is_folder: bool = False) -> str | None:
    """What is wrong with the place that a program shall write to, or None; nothing is wrong where there is none.

    Args:
        inputs: files and folders that the program reads: what is written there would be read the next time.
        is_folder: the program makes a folder there, not a file.
    """
    if output is None:
        return None
    if not is_unicode(str(output)):
        return f"--output {str(output)!r}: the path is not valid UTF-8; choose another"
    place = Path(output)
    try:
        return _place_problem(place, is_folder) or next(
            filter(None, (_loss(place, Path(each)) for each in inputs if each)), None
        )
    except (OSError, RuntimeError) as error:  # the latter from links in a circle
        return f"--output {output} cannot be made: {error}"


def obstacle(path: Path) -> str | None:
    """What keeps an absolute path from being a folder or from becoming one."""
    try:
        if path.is_dir():
            return None
        if path.is_symlink() and not path.exists():
            return f"{path} is a link to {path.readlink()}, which does not exist"
        return f"{path} is not a folder" if path.exists() else obstacle(path.parent)
    except OSError as error:
        return first_line(error)


def _place_problem(place: Path, is_folder: bool) -> str | None:
    if place.is_symlink() and not place.exists():
        return f"--output {place} is a link to {place.readlink()}, which does not exist; make that, or remove the link"
    if place.is_dir() and not is_folder:
        return f"--output {place} is a folder, but has to be a file"
    if problem := obstacle(place.absolute().parent):
        return f"--output {place} cannot be made: {problem}"
    nearest = next(filter(Path.is_dir, place.absolute().parents))
    return None if os.access(nearest, os.W_OK) else f"--output {place} cannot be made: {nearest} is not writable"


def _loss(place: Path, source: Path) -> str | None:
    """What would be lost of an input, or added to it, by writing to a place."""
    if place.resolve() == source.resolve():
        return f"--output {place} is the input itself, which would be lost; choose another file"
    if source.is_dir() and source.resolve() in place.resolve().parents:
        return (
            f"--output {place} lies in the input folder {source} and would be read as input the next time; "
            "choose a place outside"
        )
    return None


def parse_flags(command: str, description: str, kinds: tuple[type, ...], argv: list[str] | None) -> tuple:
    """The command line as an instance of each dataclass; each has a method `problems`.

    Raises:
        InputError: unknown flags, values of the wrong kind, or whatever `problems` finds, all at once.
    """
    parser = FlagParser(kinds, command, description)
    parts = parser.parse_dict(vars(parser.parse_args(sys.argv[1:] if argv is None else argv)))
    refuse([problem for part in parts for problem in part.problems()])
    return parts


def too_small(flags: object, **least: int) -> list[str]:
    """A problem for each flag whose value is below the given one."""
    return [
        f"--{name} is {value}, but has to be at least {limit}"
        for name, limit in least.items()
        if (value := getattr(flags, name)) < limit
    ]


def refuse(problems: list[str]) -> None:
    """Raises InputError with all the problems, if there are any."""
    if problems:
        raise InputError(problems[0] if len(problems) == 1 else "\n".join(f"- {problem}" for problem in problems))


def run_verb(main: Callable[[], None]) -> None:
    """Run a program's `main`; what the user can mend becomes one message and exit code 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full: lower --batch_size, or quantise the base with --load_in_kbits 4")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
