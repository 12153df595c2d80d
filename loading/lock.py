"""A lock that keeps two processes from writing the same file or folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data import InputError


@contextmanager
def locked(path: Path, in_use: str, seconds: float = 0) -> Iterator[None]:
    """A context in which no other process that asks for it may write a file or folder; makes missing parents.

    Args:
        path: the file or folder, which need not exist.
        in_use: the message if another process holds the lock.
        seconds: time to wait for the other process.

    Raises:
        InputError: another process holds the lock, or the lock cannot be written next to `path`.
    """
    place = path.resolve()  # the same lock for all links to the place
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=seconds)
    except Timeout:
        raise InputError(in_use) from None
    except OSError as error:
        raise InputError(f"{path} cannot be made or written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
