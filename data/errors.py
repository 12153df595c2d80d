"""Mistakes and troubles that the user can mend."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What the system says of a file that cannot be written: no right to, a full or a broken disk, a quota, a limit.
UNWRITABLE = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}
# And of a folder that cannot be made: a file is in its place, or its name is impossible.
NO_FOLDER = {errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR}


class InputError(ValueError):
    """Bad input: the message says what was found, where, and what is allowed. Programs print it and exit 1."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message; the name of its class where it has none."""
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
