"""Image files and folders of them as batches of model input, decoded by worker processes."""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitscale.data_prep.decode import ImageRejected, decode_rgb
from vitscale.data_prep.source_tar import IMAGE_SUFFIXES
from vitscale.data_prep.sources import MAX_FILE_BYTES
from vitscale.errors import UserError
from vitscale.model.config import height_width
from vitscale.pipeline.data.augment import Pixels, Preprocess
from vitscale.pipeline.data.workers import worker_deaths, worker_options

AHEAD = 2  # batches that each worker has ready


class FileBatch(NamedTuple):
    """Some files, what is wrong with each ("" if nothing is), and uint8 pixels (B, Y, X, 3), of those zeros."""

    files: list[str]
    errors: list[str]
    pixels: torch.Tensor


def image_files(places: Sequence[str]) -> Iterator[str]:
    """The files among `places` as they are, and in folders, at any depth, those that end as images do, sorted by name.

    Hidden names, and symlinks to folders, are left out.
    """
    for place in places:
        if os.path.isdir(place):
            yield from _walk(place)
        else:
            yield place


def _walk(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir():
            yield entry.path


def count_images(places: Sequence[str], setting: str) -> int:
    """How many files there are. Raises `UserError` (`setting`) for places that are not there, or without images."""
    for place in places:
        if not os.path.lexists(place):
            raise UserError(
                setting, f"{place}: No such file or directory", "an image file or a folder", "Check the path."
            )
    try:
        images = sum(1 for _ in image_files(places))
    except OSError as error:
        raise UserError(setting, f"{error}", "folders that can be read", "Check their rights.") from error
    if not images:
        expected = f"files that end in {', '.join(IMAGE_SUFFIXES)}"
        raise UserError(setting, " ".join(places), expected, "Check the path, or name the files themselves.")
    return images


def read_image(file: str | Path) -> Pixels:
    """An image file as upright RGB (Y, X, 3). Raises OSError or `ImageRejected`."""
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise ImageRejected("not a file")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageRejected(f"too large: {status.st_size} bytes")
    return decode_rgb(Path(file).read_bytes())


def file_batches(files: Iterable[str], preprocess: Preprocess, size: int, workers: int) -> Iterator[FileBatch]:
    """All files in order, `size` at a time, read and decoded ahead by `workers` processes (0: by this one)."""
    loader = DataLoader(
        _Views(preprocess),
        batch_sampler=_cut(iter(files), size),  # pyright: ignore[reportArgumentType]
        **worker_options(workers, AHEAD),
    )
    with worker_deaths(workers):
        yield from loader


def printable(file: str) -> str:
    """A file name in UTF-8; bytes that are none appear as \\xff."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


class _Views(Dataset):
    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess

    def __getitems__(self, files: list[str]) -> FileBatch:
        shape = (len(files), *height_width(self.preprocess.img_size), 3)
        pixels, errors = np.zeros(shape, np.uint8), [""] * len(files)
        for row, file in enumerate(files):
            try:
                pixels[row] = self.preprocess.view(read_image(file))
            except ImageRejected as reason:
                errors[row] = str(reason)
            except OSError as error:
                errors[row] = f"unreadable: {error.strerror or error}"
            except Exception as error:  # whatever one file of millions may bring about
                errors[row] = " ".join(f"{type(error).__name__}: {error}".split())
        return FileBatch(files, errors, torch.from_numpy(pixels))


def _cut(files: Iterator[str], size: int) -> Iterator[list[str]]:
    while some := list(islice(files, size)):
        yield some
