"""Errors that the user can fix."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A file cannot be written: no right to, a full or broken disk, a quota, a limit.
UNWRITABLE = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}
# The system lacks something else, whatever is being written.
NOT_ABOUT_FILES = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPIPE}
TORCH_CANNOT_WRITE = re.compile("PytorchStreamWriter failed|inline_container.*unexpected pos|basic_ios::clear")


class InputError(ValueError):
    """Bad input: the message says what was found, where, and what is allowed. Programs print it and exit 1."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A context in which a file or folder is read.

    Raises:
        InputError: the system does not let it be read (no right to, a broken disk).
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


@contextmanager
def writing(failure: str, advice: str) -> Iterator[None]:
    """A context in which files are written.

    Args:
        failure: what the message says has failed; the system's reason follows it.
        advice: what to do about it.

    Raises:
        InputError: they cannot be written (the disk is full, say).
    """
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.errno not in NOT_ABOUT_FILES else None
        if not reason and not cannot_write(error):
            raise
        raise InputError(f"{failure}: {reason or first_line(error)}; {advice}") from error


def cannot_write(error: Exception) -> bool:
    """Tell whether an exception says that a file cannot be written, which torch says in words alone."""
    return error_number(error) in UNWRITABLE or bool(TORCH_CANNOT_WRITE.search(str(error)))


def error_number(error: Exception) -> int | None:
    """The system's number of an error, which libraries in Rust give in their message alone."""
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    return int(number[1]) if number else None
