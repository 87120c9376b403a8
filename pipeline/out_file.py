"""Files that a command is to write, looked at before the work whose results they hold."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitscale.data_prep.publish import PARTIAL
from vitscale.errors import UserError
from vitscale.pipeline.distributed import World, agree


def check_out(path: str, setting: str, suffixes: tuple[str, ...], ours: Callable[[Path], bool] | None = None) -> Path:
    """The path of a file to write, in place of one that is there.

    Raises `UserError` for other suffixes, URLs, folders, where no file can be made, and for a file that is there, is
    not empty, and not such as we write: not `ours`, which may raise OSError or ValueError for it.
    """
    out = Path(path)
    if out.suffix.lower() not in suffixes:
        raise UserError(setting, path, f"a file that ends in {' or '.join(suffixes)}", "Give it another name.")
    if ":/" in path:  # of a URL, also as pathlib shortens it
        raise UserError(setting, path, "a file of this machine", "Choose another place.")
    folder = next(each for each in out.absolute().parents if os.path.lexists(each))  # the others will be made
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{out.name}.", suffix=PARTIAL):
            pass
        if out.exists() and not out.is_file():
            got = f"{path}: {'a folder' if out.is_dir() else 'no plain file'}"
            raise UserError(setting, got, "a file to write", "Choose another name.")
        other = bool(ours) and out.is_file() and out.stat().st_size > 0
    except OSError as error:
        raise UserError(
            setting, f"{path}: {error.strerror}", "a file that can be written", "Choose another."
        ) from error
    if other and not _is(ours, out):
        expected = "a new file, or one that this command wrote"
        raise UserError(setting, f"{path}, which holds something else", expected, "Choose another, or remove it.")
    return out


def _is(ours: Any, path: Path) -> bool:
    try:
        return ours(path)
    except (OSError, ValueError):
        return False


def alike(check: Callable[[], Any], world: World) -> None:
    """Have rank 0 `check`, and raise the `UserError` that it meets on all ranks."""
    error = None
    if world.main:
        try:
            check()
        except UserError as problem:
            error = problem
    agree(error)
