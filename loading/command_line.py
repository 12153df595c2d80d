"""The command line of every program: flags from dataclasses, and one message for the user's mistakes."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from data import InputError, first_line, is_unicode


def flag(default, text: str, **metadata):
    """A dataclass field that becomes the flag of the same name, with its help text."""
    return field(default=default, metadata={"help": text, **metadata})


def listed(text: str | None) -> list[str] | None:
    """The items of a flag's value, separated by commas and optional spaces; None if the flag was not given."""
    return None if text is None else [item.strip() for item in text.split(",") if item.strip()]


# The requirement in words, its test, and the flags that it applies to.
Range = tuple[str, Callable[[Any], bool], tuple[str, ...]]


def at_least(least: float, *names: str) -> Range:
    """The range of flags with a lower bound."""
    return f"at least {least}", lambda value: value >= least, names


def one_of(allowed: Sequence, *names: str) -> Range:
    """The range of flags with a few allowed values."""
    return f"one of {', '.join(map(str, allowed))}", lambda value: value in allowed, names


def a_seed(*names: str) -> Range:
    """The range of seeds, which is that of numpy."""
    return "from 0 to 4294967295", lambda value: 0 <= value < 2**32, names


def range_problems(flags: object, ranges: Iterable[Range]) -> list[str]:
    """One sentence for each flag whose value is out of range; None, the default of some, is allowed."""
    return [
        f"--{name} is {value!r}, but has to be {needed}"
        for needed, holds, names in ranges
        for name in names
        if (value := getattr(flags, name)) is not None and not holds(value)
    ]


class FlagParser(HfArgumentParser):
    """A parser that raises InputError instead of exiting, and suggests names for a flag that does not exist.

    Args:
        kinds: dataclasses; every field is a flag.
        command: the command that starts the program, for its help and messages.
    """

    def __init__(self, kinds: tuple[type, ...], command: str, description: str | None = None):
        super().__init__(kinds, prog=command, description=description, allow_abbrev=False)

    def error(self, message: str):
        unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        for name in unknown:
            if near := difflib.get_close_matches(name, self._option_string_actions, n=2):
                message += f"; did you mean {' or '.join(near)} instead of {name}?"
        raise InputError(f"{message} ({self.prog} --help lists every flag)")


def output_problem(
    output: str | Path | None,
    inputs: Sequence[str | None] = (),
    is_folder: bool = False,
    endings: Sequence[str] = (),
) -> str | None:
    """The reason why a program cannot write to `--output`, or None; also None if `output` is None.

    Args:
        inputs: files and folders that the program reads: output written there would be read as input the next time.
        is_folder: the program makes a folder there, not a file. An empty one may exist.
        endings: allowed endings of the name; by default any.
    """
    if output is None:
        return None
    if not is_unicode(str(output)):
        return f"--output {str(output)!r}: the path is not valid UTF-8; choose another"
    place = Path(output)
    if endings and place.suffix not in endings:
        return f"--output {output}: the name has to end in {' or '.join(endings)}"
    try:
        return _place_problem(place, is_folder) or next(
            filter(None, (_loss(place, Path(each)) for each in inputs if each)), None
        )
    except (OSError, RuntimeError) as error:  # the latter for circular links
        return f"--output {output} cannot be made: {error}"


def obstacle(path: Path) -> str | None:
    """The reason why an absolute path is not a folder and cannot become one, or None."""
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
    if is_folder and place.exists() and not (place.is_dir() and not any(place.iterdir())):
        return f"--output {place} exists and is not an empty folder; move it away or choose another"
    if problem := obstacle(place.absolute().parent):
        return f"--output {place} cannot be made: {problem}"
    nearest = next(filter(Path.is_dir, place.absolute().parents))
    return None if os.access(nearest, os.W_OK) else f"--output {place} cannot be made: {nearest} is not writable"


def _loss(place: Path, source: Path) -> str | None:
    """The reason why writing to a place would overwrite an input or add to it, or None."""
    if place.resolve() == source.resolve():
        return f"--output {place} is the input itself, which would be lost; choose another file"
    if source.is_dir() and source.resolve() in place.resolve().parents:
        return (
            f"--output {place} lies in the input folder {source} and would be read as input the next time; "
            "choose a place outside"
        )
    return None


def parse_flags(command: str, description: str, kinds: tuple[type, ...], argv: list[str] | None) -> tuple:
    """The command line as an instance of each dataclass; each has a method `problems` for `refuse`.

    Raises:
        InputError: unknown flags, values of the wrong type, or everything that `problems` finds, all at once.
    """
    parser = FlagParser(kinds, command, description)
    parts = parser.parse_dict(vars(parser.parse_args(sys.argv[1:] if argv is None else argv)))
    refuse([problem for part in parts for problem in part.problems()])
    return parts


def refuse(found: Iterable[str | None]) -> None:
    """Raises InputError with all problems that were found; None stands for a check that found nothing."""
    if problems := [problem for problem in found if problem]:
        raise InputError(problems[0] if len(problems) == 1 else "\n".join(f"- {problem}" for problem in problems))


def run_verb(main: Callable[[], None]) -> None:
    """Run a program's `main`; an error that the user can fix becomes one message and exit code 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full: lower --batch_size, or quantise the base with --load_in_kbits 4")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
