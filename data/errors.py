"""Mistakes and troubles that the user can mend."""

import errno

# What the system says of a file that cannot be written: no right to, a full or a broken disk, a quota, a limit.
UNWRITABLE = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS}


class InputError(ValueError):
    """Bad input: the message says what was found, where, and what is allowed. Programs print it and exit 1."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message; the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
