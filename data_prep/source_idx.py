"""IDX files, gzipped or not: the layout of MNIST, Fashion-MNIST, KMNIST, EMNIST.

Source: http://yann.lecun.com/exdb/mnist, "the IDX file format": two zero bytes, a type code (8: uint8), the number of
dimensions, each dimension as a big-endian int32, the values.
"""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vitscale.data_prep.sources import CLASS, MAX_FILE_BYTES, NONE, Item, Source, cut_evenly
from vitscale.data_prep.storage import Folder
from vitscale.errors import UserError

_CHUNK_IMAGES, _CHUNK_BYTES = 4096, 2**26
_GZIP_RATIO = 1100  # deflate packs at most 1032 to 1
_IMAGES, _LABELS = "-images-idx3-ubyte", "-labels-idx1-ubyte"


def is_idx(name: str) -> bool:
    """Tell the names that the family uses: `train-images-idx3-ubyte.gz`, or `.` for the second `-`."""
    return _IMAGES in _usual(name)


@dataclass(frozen=True)
class IdxChunk:
    """Images `rows` of a pair of files."""

    images_file: str
    labels_file: str | None
    rows: range

    @property
    def images(self) -> int:
        return len(self.rows)

    def read(self, folder: Folder) -> Iterator[Item]:
        """Yield each picture as a PNG without compression."""
        labels = _values(folder, self.labels_file, self.rows, dimensions=1) if self.labels_file else None
        (height, width), pixels = _values(folder, self.images_file, self.rows, dimensions=3)
        for at, row in enumerate(self.rows):
            picture = pixels[at * height * width : (at + 1) * height * width]
            label = labels[1][at] if labels else None
            yield Item(f"{self.images_file}:{row}", label, _png(picture, height, width))


def open_idx(name: str, folder: Folder, files: list[str]) -> Source:
    """List the one images file of `files`, and the labels file of the same name beside it, if there is one.

    Raises `UserError` (SOURCE) for several images files, and for files that are not what they are named.
    """
    if len(files) > 1:
        got = f"{folder.url}, with {', '.join(files)}"
        raise UserError("SOURCE", got, "one file of images", f"Name one: {folder.url}/{files[0]}.")
    images = files[0]
    wanted = _usual(images).replace(_IMAGES, _LABELS)
    labels = next((other for other in sorted(folder.names()) if _usual(other) == wanted), None)
    count, *sides = _shape(folder, images, 3)
    if labels and (counted := _shape(folder, labels, 1)[0]) != count:
        raise UserError("SOURCE", f"{count} images and {counted} labels", "as many of both", "Fetch the files again.")
    digest = hashlib.sha256()
    for file in filter(None, (images, labels)):
        digest.update(f"{file} {folder.size(file)}\n".encode())
    least = max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // math.prod(sides)))
    chunks = [IdxChunk(images, labels, rows) for rows in cut_evenly(count, least)]
    return Source(name, folder, None if labels else [], CLASS if labels else NONE, chunks, digest.hexdigest(), count)


def _usual(name: str) -> str:
    return name.removesuffix(".gz").replace(".idx", "-idx")


def _open(folder: Folder, name: str) -> BinaryIO:
    file = folder.open(name)
    return gzip.open(file) if name.endswith(".gz") else file  # pyright: ignore[reportReturnType]


def _shape(folder: Folder, name: str, dimensions: int) -> tuple[int, ...]:
    try:
        with _open(folder, name) as file:
            header = file.read(4 + 4 * dimensions)
        shape = struct.unpack(f">{dimensions}i", header[4:])
        sound = header[:4] == bytes((0, 0, 8, dimensions)) and min(shape) > 0
        if not sound or (dimensions == 3 and shape[1] * shape[2] > MAX_FILE_BYTES):
            raise ValueError(f"header {header.hex(' ')}")
        size = (folder.size(name) or 0) * (_GZIP_RATIO if name.endswith(".gz") else 1)
        if len(header) + math.prod(shape) > size:  # before as much memory is asked for
            raise ValueError("the file ends early")
    except (OSError, EOFError, ValueError, zlib.error, struct.error) as error:
        got = f"{folder.url}/{name} ({error})"
        raise UserError("SOURCE", got, f"an IDX file of {dimensions} dimensions", "Fetch the file again.") from error
    return shape


def _values(folder: Folder, name: str, rows: range, dimensions: int) -> tuple[tuple[int, ...], bytes]:
    """(shape of one entry, bytes of the entries `rows`)."""
    _, *shape = _shape(folder, name, dimensions)
    size = math.prod(shape)
    try:
        with _open(folder, name) as file:
            file.seek(4 + 4 * dimensions + rows.start * size)
            data = file.read(len(rows) * size)
        if len(data) != len(rows) * size:
            raise EOFError("the file ends early")
    except (OSError, EOFError, zlib.error) as error:
        got = f"{folder.url}/{name} ({error})"
        raise UserError("SOURCE", got, "a whole IDX file", "Fetch the file again.") from error
    return tuple(shape), data


def _png(grey: bytes, height: int, width: int) -> bytes:
    """A grey picture as a PNG whose bytes do not depend on a compressor. W3C PNG 3rd edition §5."""
    lines = b"".join(b"\0" + grey[row * width : (row + 1) * width] for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, level=0)), (b"IEND", b""))
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
