"""How files are written: whole or not at all. What was there before stays until everything new is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

UNFINISHED = ".unfinished-"  # begins the name of a directory that is being filled; one stays where a process was killed


@contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, whose file then takes the place of `file`.

    Raises:
        OSError: it could not be written; `file` is as it was.
    """
    unfinished = Path(f"{os.fspath(file)}.tmp")
    try:
        with _naming(file):
            yield unfinished
            unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_in(directory: str | os.PathLike[str], stale: Collection[str] = ()) -> Iterator[Path]:
    """A directory to write to, whose files then take the place of those of the same names in `directory`.

    Args:
        directory: made if it does not exist. Its other files stay.
        stale: patterns of names of which only the new files are kept, if there are new ones.

    Raises:
        OSError: the files could not be written; `directory` is as it was.
    """
    target = Path(directory)
    with _naming(target):
        target.mkdir(parents=True, exist_ok=True)
        outer = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=target))
    try:
        inner = outer / target.resolve().name  # a name that is shown, or pushed to, is that of the target
        with _naming(target):
            inner.mkdir()
            yield inner
            _move(inner, target, stale)
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _move(source: Path, target: Path, stale: Collection[str]) -> None:
    new = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    replaced = {path for pattern in stale for path in target.glob(pattern)}
    for path in new:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).replace(target / path)
    if any(path.match(pattern) for path in new for pattern in stale):
        for path in replaced - {target / path for path in new}:
            path.unlink()


@contextmanager
def _naming(place: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the file system say what could not be written; libraries leave that out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # of a network, such as the Hub's
            raise
        raise OSError(
            f"`{os.fspath(place)}` could not be written: {error}. What was there before is unchanged. Free space, or name "
            "another place, and save again."
        ) from error
