"""Where images come from. `open_source` tells the kind of a path and lists it; images are read chunk by chunk.

A source is listed in a fixed order that does not depend on the order in which a file system lists names, and cut into
at most `MAX_CHUNKS` chunks, which are picklable, so that any process can read any of them.
"""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

from vitscale.data_prep.storage import Folder, LocalFolder, open_folder
from vitscale.errors import UserError

MAX_CHUNKS = 4096  # what the next stages read from: each of their tasks opens one file a chunk
MAX_FILE_BYTES = 2**30  # larger files are no single pictures, and are not read into memory
MAX_CLASSES = 10_000_000  # dataset.json lists all numbers up to the highest that occurs
CLASS, MULTI, NONE = "class", "multi", "none"  # one label an image, several, or none


class Item(NamedTuple):
    """One image as found: its bytes, or None and the problem that kept them from being read.

    Where `file` is given, the same bytes lie in that file of the source from `offset` on, and can be read again there.
    """

    name: str
    label: int | None
    data: bytes | None
    problem: str = ""
    labels: list[int] | None = None
    extra: str | None = None
    file: str | None = None
    offset: int = 0


class Chunk(Protocol):
    """A piece of a source: `images` of them (0: known when read), read in order and always the same ones."""

    @property
    def images(self) -> int: ...

    def read(self, folder: Folder) -> Iterator[Item]:
        """Yield one item for each image. An image that cannot be read yields its problem; it does not stop the rest."""
        ...


@dataclass(frozen=True)
class Source:
    """A listed source.

    `name` is its last path component; `digest` changes with the names and sizes of its files, not with its place;
    `classes` is None where labels are numbers without names; `labelled` is CLASS, MULTI or NONE; `images` a guess
    where chunks do not know theirs. `walked`: all that lies in the folder, at any depth, belongs to it.
    """

    name: str
    folder: Folder
    classes: list[str] | None
    labelled: str
    chunks: Sequence[Chunk]
    digest: str
    images: int
    walked: bool = False


def open_source(path: str) -> Source:
    """List a source, on a file system or in an object store:

    - a folder of class folders, or a flat folder of images
    - Parquet with embedded images, by file, folder or glob
    - a table (CSV, TSV or Parquet) that names files beside it, or URLs; a text file of URLs
    - webdataset tars, by file, folder or glob
    - the images file of an IDX pair (the MNIST family)

    Raises `UserError` (SOURCE) for a path that is none of these, is empty, or cannot be reached.
    """
    try:
        return _open(path)
    except OSError as error:
        got = f"{path} ({error.strerror or error})"
        raise UserError("SOURCE", got, "a path that can be read", "Check its rights and the network.") from error


def _open(path: str) -> Source:
    from vitscale.data_prep.source_folder import open_image_folder
    from vitscale.data_prep.source_idx import is_idx, open_idx
    from vitscale.data_prep.source_table import TABLES, open_tables
    from vitscale.data_prep.source_tar import open_tars

    folder, pattern = _split(path)
    names = sorted(name for name in folder.names() if not name.startswith(".") and _matches(name, pattern))
    if not names:
        raise UserError("SOURCE", path, "a folder or file of images", "Check the path; nothing is there.")
    title = pattern if pattern != "*" else folder.url.rsplit("/", 1)[-1]
    tars = [name for name in names if name.endswith(".tar")]
    if tars:
        return open_tars(title, folder, tars)
    tables = [name for name in names if name.endswith(TABLES) and folder.size(name) is not None]
    if pattern == "*":  # a whole folder: Parquet rather than other tables, and these only beside no class folders
        parquet = [name for name in tables if name.endswith(".parquet")]
        flat = not any(folder.names(name) for name in names if "." not in name)
        tables = parquet or [name for name in tables if flat and not name.endswith(".txt")]
    if tables:
        return open_tables(title, folder, tables)
    if any(is_idx(name) for name in names):
        return open_idx(title, folder, [name for name in names if is_idx(name)])
    if pattern != "*":
        raise UserError(
            "SOURCE", path, "a folder, Parquet, CSV, TSV, a text file of URLs, tars or IDX files", "Name one of these."
        )
    return open_image_folder(title, folder)


def _split(path: str) -> tuple[Folder, str]:
    """The folder of a path and a pattern of names in it: `*` for a folder."""
    whole = open_folder(path, "SOURCE")
    head, _, tail = whole.url.rpartition("/")
    if isinstance(whole, LocalFolder):
        whole = LocalFolder(str(whole.path.resolve()))
        is_folder = whole.path.is_dir()
        head, _, tail = whole.url.rpartition("/")
    else:
        is_folder = "*" not in tail and bool(whole.names()) and whole.size("") is None
    return (whole, "*") if is_folder else (open_folder(head or "/", "SOURCE"), tail)


def _matches(name: str, pattern: str) -> bool:
    return pattern == "*" or name == pattern or fnmatchcase(name, pattern)


def cut_evenly(count: int, least: int) -> list[range]:
    """Cut `count` things into ranges of at least `least`, and no more than `MAX_CHUNKS` of them."""
    size = max(least, -(-count // MAX_CHUNKS))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def check_classes(names: Sequence[Any]) -> list[str]:
    """The class names as they are. Raises `UserError` (SOURCE) for one that could be no name of a folder."""
    for name in names:
        bad = not isinstance(name, str) or name in ("", ".", "..") or len(name.encode(errors="replace")) > 255
        if bad or "/" in name or any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name):
            raise UserError("SOURCE", f"the class name {name!r}", "names that a folder could have", "Rename the class.")
    if len(set(names)) != len(names):
        raise UserError("SOURCE", "the same class name twice", "names that differ", "Rename one of them.")
    return list(names)


def check_label(label: Any, classes: int | None) -> str:
    """What is wrong with a label, "" if nothing is."""
    if type(label) is not int or label < 0 or label >= MAX_CLASSES:
        return f"label: {str(label)[:100]!r} is no class number"
    return f"label: {label} of {classes} classes" if classes is not None and label >= classes else ""


def to_extra(values: dict[str, Any]) -> str | None:
    """Further values of a sample as JSON, None if there are none."""
    known = {name: value for name, value in values.items() if value is not None}
    return to_json(known).decode() if known else None


def to_json(values: dict[str, Any]) -> bytes:
    """JSON in UTF-8, keys sorted; half a surrogate pair, which has no UTF-8, stays an escape."""
    text = json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)
    return text.encode(errors="backslashreplace")
