"""Webdataset tars, of ours, webdataset's or img2dataset's making: members that share a name up to its first dot.

The image is the member with an image's suffix, the label `.cls`, or `label` or `labels` of `.json`; what else `.json`
and `.txt` say is kept as extra. Nothing is unpacked: members are read where they lie.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

from vitscale.data_prep.manifest import DATASET_FILE
from vitscale.data_prep.sources import (
    CLASS,
    MAX_FILE_BYTES,
    MULTI,
    NONE,
    Item,
    Source,
    check_classes,
    check_label,
    cut_evenly,
    to_extra,
)
from vitscale.data_prep.storage import Folder
from vitscale.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_TEXT_BYTES = 2**20
_PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
_MAX_HEADER = 2**14  # bytes of a long name or of extended attributes
_LOOK = 100  # members of a tar that tell what its labels are
_MAX_DEPTH = 50  # of .json
_GUESS_BYTES = 30_000  # of an image in a tar, for a first idea of their number


@dataclass(frozen=True)
class TarChunk:
    """Some tars of the folder."""

    files: tuple[str, ...]
    classes: int | None
    labelled: str
    images: int = 0

    def read(self, folder: Folder) -> Iterator[Item]:
        """Yield the image of each sample, or why it cannot be used; of a damaged tar, what lies before the damage."""
        for name in self.files:
            try:
                with folder.open(name) as file:
                    yield from self._samples(name, file)
            except (OSError, tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
                yield Item(name, None, None, f"unreadable: tar: {' '.join(str(error).split())}")

    def _samples(self, name: str, file: BinaryIO) -> Iterator[Item]:
        base, members, problem = None, {}, ""
        with open_tar(file) as archive:
            for member in members_of(archive):
                if member.isdir():
                    continue
                stem, suffix = _split(member.name)
                if stem != base:
                    if base is not None:
                        yield self._item(name, base, members, problem)
                    base, members, problem = stem, {}, ""
                problem = problem or _unsafe(member, suffix)
                if not problem and suffix in (*IMAGE_SUFFIXES, "cls", "json", "txt"):
                    if suffix in members:
                        problem = f"unsupported: two members .{suffix}"
                    members[suffix] = member.offset_data, read_member(file, member)
            if base is not None:
                yield self._item(name, base, members, problem)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a member nor the end of the archive at byte {archive.offset}")

    def _item(self, file: str, stem: str, members: dict[str, tuple[int, bytes]], problem: str) -> Item:
        name = f"{file}/{stem.encode('utf-8', 'backslashreplace').decode()}"
        images = [members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members]
        if not problem and len(images) != 1:
            problem = f"unsupported: {len(images) or 'no'} image members"
        try:
            label, labels, extra = _annotations({suffix: data for suffix, (_, data) in members.items()})
        except ValueError as error:
            return Item(name, None, None, problem or f"label: {' '.join(str(error).split())[:200]}")
        wanted = labels if self.labelled == MULTI else [label] if self.labelled == CLASS else []
        for one in wanted if wanted is not None else [None]:
            problem = problem or check_label(one, self.classes)
        if problem:
            return Item(name, None, None, problem)
        if self.labelled != CLASS:
            label = None
        offset, data = images[0]
        return Item(name, label, data, "", labels if self.labelled == MULTI else None, extra, file, offset)


def open_tars(name: str, folder: Folder, files: list[str]) -> Source:
    """List tars. Class names, if any, are those of a dataset.json beside them; the first samples tell what labels are.

    Raises `UserError` (SOURCE) for tars without a sample.
    """
    sizes = [folder.size(file) or 0 for file in files]
    classes = _class_names(folder)
    labelled = _kind_of_labels(folder, files[:3])
    count = len(classes) if classes else None
    chunks = [
        TarChunk(tuple(files[rows.start : rows.stop]), count, labelled) for rows in cut_evenly(len(files), least=1)
    ]
    digest = _digest([*zip(files, sizes, strict=True)], classes)
    guess = max(1, sum(sizes) // _GUESS_BYTES)
    return Source(name, folder, classes if labelled != NONE else [], labelled, chunks, digest, guess)


def open_tar(file: BinaryIO) -> tarfile.TarFile:
    """An uncompressed tar to read headers of. Raises `tarfile.TarError`, also for headers of senseless length."""
    return tarfile.open(fileobj=_Headers(file), mode="r:")  # pyright: ignore[reportArgumentType]


class _Headers:
    """A tar as tarfile needs to see it; else it would ask for as much memory as a header claims to be long."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def read_member(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """Bytes of a plain member. Raises `tarfile.TarError` where the file ends early."""
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def members_of(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Headers one after the other. Raises `tarfile.TarError` where one is damaged."""
    for member in archive:
        archive.members.clear()  # else tarfile keeps all headers
        if member.size < 0 or archive.offset < member.offset_data:
            raise tarfile.ReadError(f"a member of {member.size} bytes")  # older tarfiles would go round in circles
        yield member


def _kind_of_labels(folder: Folder, files: list[str]) -> str:
    """CLASS, MULTI or NONE, by what the first members say."""
    found, seen = set(), 0
    for file in files:
        try:
            with folder.open(file) as opened, open_tar(opened) as archive:
                for member in islice(members_of(archive), _LOOK):
                    seen += 1
                    suffix = _split(member.name)[1]
                    if suffix in ("cls", "json") and not _unsafe(member, suffix):
                        with suppress(ValueError):
                            label, labels, _ = _annotations({suffix: read_member(opened, member)})
                            found |= {CLASS} if label is not None else {MULTI} if labels is not None else set()
        except (OSError, tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError):
            continue
        if found:
            break
    if not seen:
        got = f"{folder.url}/{files[0]}, of which no sample can be read"
        raise UserError("SOURCE", got, "uncompressed webdataset tars", "Unpack .tar.gz, or fetch the file again.")
    return CLASS if CLASS in found else MULTI if MULTI in found else NONE


def _annotations(members: dict[str, bytes]) -> tuple[Any, list[Any] | None, str | None]:
    """(label, labels, extra) of a sample. Raises ValueError for what cannot be read."""
    label = labels = None
    extra: dict[str, Any] = {}
    if "json" in members:
        try:
            values = json.loads(members["json"])
        except RecursionError as error:
            raise ValueError("member .json nested too deeply") from error
        if _is_deep(values, _MAX_DEPTH):
            raise ValueError("member .json nested too deeply")
        if not isinstance(values, dict):
            raise ValueError("member .json is no object")
        label, labels = values.pop("label", None), values.pop("labels", None)
        if labels is not None and not isinstance(labels, list):
            raise ValueError("labels of .json are no list")
        extra = values
    if "txt" in members:
        extra["txt"] = members["txt"].decode()
    if "cls" in members:
        label = int(members["cls"][:32].decode("ascii"))
    return label, labels, to_extra(extra)


def _is_deep(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth == 0 or any(_is_deep(one, depth - 1) for one in inner)


def _unsafe(member: tarfile.TarInfo, suffix: str) -> str:
    """Why a member may not be used, "" if it may."""
    if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
        return f"unsafe: member {member.name[:100]!r}"
    if not member.isreg() or member.issparse():
        return f"unsafe: member {member.name[:100]!r} is no plain file"
    if suffix in _PICKLES:
        return f"unsafe: pickled member .{suffix}"
    limit = MAX_TEXT_BYTES if suffix in ("cls", "json", "txt") else MAX_FILE_BYTES
    return f"too large: member .{suffix} of {member.size} bytes" if member.size > limit else ""


def _split(name: str) -> tuple[str, str]:
    """Webdataset's (key, suffix): cut at the first dot of the last component."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _class_names(folder: Folder) -> list[str] | None:
    try:
        classes = json.loads(folder.read(DATASET_FILE))["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return check_classes(classes)


def _digest(files: list[tuple[str, int]], classes: list[str] | None) -> str:
    return hashlib.sha256(json.dumps([files, classes]).encode()).hexdigest()
