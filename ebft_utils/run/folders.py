"""A folder that appears whole or not at all, whatever ends the process that writes it."""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path


def remove(path: Path) -> None:
    """Removes a folder, a file or a link (not what it leads to). What cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _beside(target: Path) -> tuple[Path, Path]:
    """The names that a target has while it is written, and while it is replaced."""
    return target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")


def recover(target: Path) -> None:
    """Cleans up after a process that was killed in `writing`: the target is the last whole one, and nothing is left."""
    temporary, old = _beside(target)
    if os.path.lexists(old) and not os.path.lexists(target):
        os.replace(old, target)
    remove(old)
    remove(temporary)


@contextmanager
def writing(target: Path):
    """Yields a temporary folder, which replaces the target only when the block ends without an error.

    The target can be a folder, a file or a link. An error leaves it as it was.
    """
    temporary, old = _beside(target)
    recover(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if os.path.lexists(target):
            os.replace(target, old)
        os.replace(temporary, target)
    finally:
        recover(target)
