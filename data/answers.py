"""A file of answers, written batch by batch, that an interrupted program continues."""

import hashlib
import json
from contextlib import AbstractContextManager
from pathlib import Path

from data.atomic import atomic_file
from data.errors import InputError, writing
from data.files import Unreadable


class AnswerFile:
    """The answers to a list of rows.

    Until the last answer is there, it is `NAME.partial`: JSON Lines, the settings first, then a line for each answer.
    The name is fixed, since the next program continues it. Then the complete file appears, in the rows' order.

    Args:
        path: a .json (list) or .jsonl file; an existing one is replaced at the end.
        rows: the rows that are answered.
        settings: everything else that the answers depend on.

    Attributes:
        answers: the answers so far, by the row's index.

    Raises:
        InputError: the file cannot be written, or an incomplete one belongs to other rows or settings.
    """

    def __init__(self, path: str | Path, rows: list[dict], settings: dict):
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self._rows = rows
        rows_hash = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
        self._head = json.loads(json.dumps({**settings, "rows_sha256": rows_hash}))
        self.answers: dict[int, dict] = {}
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._resume():
                self.partial.write_text(json.dumps(self._head) + "\n")

    def append(self, answers: dict[int, dict]) -> None:
        """Write answers, by the row's index, to the disk.

        Raises:
            InputError: they cannot be written.
        """
        self.answers.update(answers)
        lines = [json.dumps({"index": index, **answer}) for index, answer in answers.items()]
        with self._writing(), self.partial.open("a") as stream:
            stream.write("\n".join(lines) + "\n")

    def finish(self) -> None:
        """Write the complete file: each row with its answer's fields.

        Raises:
            InputError: it cannot be written.
        """
        rows = [{**row, **self.answers[index]} for index, row in enumerate(self._rows)]
        if self.path.suffix == ".jsonl":
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            text = json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
        with self._writing():
            with atomic_file(self.path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            self.partial.unlink()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"{self.path} cannot be written", "once it can, the same command goes on")

    def _resume(self) -> bool:
        """Read what an interrupted program has left, if anything; returns whether it left something."""
        lines = self.partial.read_bytes().splitlines(keepends=True) if self.partial.is_file() else []
        if not lines or lines == [lines[0].rstrip(b"\n")]:  # nothing, or incomplete settings
            return False
        head = _parsed(lines[0]) or {}
        differing = [
            f"  {name}: {head.get(name)!r} there, {self._head.get(name)!r} now"
            for name in sorted(head.keys() | self._head.keys())
            if head.get(name) != self._head.get(name)
        ]
        if differing:
            found = "\n".join(differing)
            raise InputError(
                f"{self.partial} holds some of another command's answers:\n{found}\n"
                "delete it to start over, or choose another --output"
            )
        answers = [answer for line in lines[1:] if (answer := _parsed(line)) and "index" in answer]
        self.answers = {answer.pop("index"): answer for answer in answers}
        if not lines[-1].endswith(b"\n"):  # incomplete
            self.partial.write_bytes(b"".join(lines[:-1]))
        return True


def unwritable_field(row: dict) -> str | None:
    """The problem with the first field of a row that cannot be written into a file of answers, or None."""
    for name, value in row.items():
        if isinstance(value, Unreadable):
            return f"{name!r} cannot be read: {value.reason}"
        try:
            json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            return f"{name!r} cannot be written as JSON: {error}"
    return None


def _parsed(line: bytes) -> dict | None:
    """A line's object, or None if the line is incomplete."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and line.endswith(b"\n") else None
