"""A folder that appears whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data import InputError, first_line
from training.checkpoint import cannot_write


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its place when all is written: it is there whole or not at all.

    Raises:
        InputError: it cannot be made or written (the disk is full, say).
    """
    folder = folder.resolve()  # an empty folder is replaced, but a link to one cannot be
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield aside
        aside.chmod(0o755)
        aside.rename(folder)
    except Exception as error:
        if not (isinstance(error, OSError) or cannot_write(error)):
            raise
        raise InputError(f"{folder} cannot be written: {first_line(error)}") from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
