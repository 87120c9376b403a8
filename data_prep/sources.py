"""Where images come from. `open_source` tells the kind of a path and lists it; images are read chunk by chunk.

A source is listed once, in a fixed order that does not depend on the order in which the file system lists names. Its
chunks are small and picklable, so that any process can read any of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from vitscale.errors import UserError


class Item(NamedTuple):
    """One image as found: its bytes, or None and the problem that kept them from being read."""

    name: str
    label: int
    data: bytes | None
    problem: str = ""


class Chunk(Protocol):
    """A piece of a source: `len(chunk)` images, read in order and always the same number of them."""

    def __len__(self) -> int: ...

    def read(self) -> Iterator[Item]:
        """Yield one item for each image. An image that cannot be read yields its problem; it does not stop the rest."""
        ...

    def pick(self, rows: Sequence[int]) -> "Chunk":
        """Return the chunk restricted to the given rows, which are ascending positions in this one."""
        ...


@dataclass(frozen=True)
class Source:
    """A listed source.

    `name` is its last path component; `digest` changes with the names and sizes of its files, not with its place;
    `needs_every_class` says that a class without a readable image is a mistake of the user's.
    """

    name: str
    classes: list[str]
    chunks: list[Chunk]
    digest: str
    needs_every_class: bool


def open_source(path: str) -> Source:
    """List a folder of class folders, or Parquet with embedded images: a file, a folder of them, or a glob of them.

    Raises `UserError` (SOURCE) for a path that is none of these, or is empty.
    """
    from vitscale.data_prep.source_folder import open_folder
    from vitscale.data_prep.source_parquet import open_parquet

    place = Path(path).resolve()
    if place.is_dir():
        parquet = sorted(place.glob("*.parquet"))
        return open_parquet(place.name, parquet) if parquet else open_folder(place)
    if place.is_file():
        return open_parquet(place.name, [place])
    matches = sorted(found for found in place.parent.glob(place.name) if found.is_file()) if place.name else []
    if not matches:
        raise UserError(
            "SOURCE", path, "a folder of class folders or Parquet files", "Check the path; nothing is there."
        )
    return open_parquet(place.name, matches)
