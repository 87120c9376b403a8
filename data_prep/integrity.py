"""Checks of image containers that Pillow leaves out: is the file whole, and what size does it claim?

Sources: JPEG markers, ITU-T T.81 annex B; PNG chunks, W3C PNG 3rd edition §5; WebP, RFC 9649 §2.
"""

import re
import zlib
from typing import NamedTuple

_JPEG_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # neither a stuffed FF00 nor a restart marker
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)(\d)")
_JPEG_TEM, _JPEG_SOI, _JPEG_EOI, _JPEG_SOS = 0x01, 0xD8, 0xD9, 0xDA
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class JpegHeader(NamedTuple):
    """A JPEG of the common kind: 8 bits, one picture, grey or YCbCr, upright where `orientation` is 1.

    `height_at` is where the two bytes of its height are if it is sequential, its rows one after the other; else 0.
    """

    width: int
    height: int
    orientation: int
    height_at: int = 0


class ImageRejected(ValueError):  # noqa: N818 - a verdict on data, not a fault of the program
    """Bytes that may not enter a data set. The text is `category` or `category: detail`, on one line.

    Categories: empty file, not an image, too many pixels, too large, truncated, corrupt, unsupported, unreadable,
    unsafe, label.
    """


def image_format(data: bytes) -> str | None:
    """Name the accepted format (Pillow's name) that the first bytes announce, or None."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(_PNG_SIGNATURE):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    return "BMP" if data.startswith(b"BM") else None


def check_whole(data: bytes, image_format: str) -> None:
    """Refuse a JPEG or PNG that ends early or a PNG with a damaged chunk, which decoders may read without complaint.

    The other formats pass: Pillow refuses them itself when pixels are missing. Raises `ImageRejected`.
    """
    if image_format == "JPEG":
        _check_jpeg(data)
    elif image_format == "PNG":
        _check_png(data)


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the markers of a JPEG up to its pixels; None where it is damaged there, or is of a kind less common.

    Sources: T.81 annex B; Adobe TN 5116 (APP14); CIPA DC-007 (several pictures, APP2); Exif 2.3 §4.6 (APP1).
    """
    position, size, plain, orientation, height_at = 2, None, True, 1, 0
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, start = data[position + 1], position + 4
        if marker == _JPEG_SOS:
            return JpegHeader(*size, orientation, height_at) if size and all(size) and plain else None
        position = start - 2 + int.from_bytes(data[start - 2 : start])
        if marker == 0xE1 and data.startswith(b"Exif\0\0", start):
            orientation = _exif_orientation(data[start + 6 : position])
        elif marker == 0xE1:
            turned = _XMP_ORIENTATION.search(data, start, position)
            plain &= turned is None or turned[1] == b"1"
        elif marker == 0xE2:
            plain &= not data.startswith(b"MPF\0", start)
        elif marker == 0xEE and data.startswith(b"Adobe", start):
            plain &= data[start + 11 : start + 12] == b"\1"  # YCbCr
        elif marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            size = int.from_bytes(data[start + 3 : start + 5]), int.from_bytes(data[start + 1 : start + 3])
            height_at = start + 1 if marker != 0xC2 else 0
            ids = data[start + 6 : start + 6 + 3 * data[start + 5] : 3] if start + 5 < len(data) else b""
            plain &= data[start : start + 1] == b"\x08" and (len(ids) == 1 or ids in (b"\1\2\3", b"\0\1\2"))
        elif not (0xE0 <= marker <= 0xEF or marker in (0xC4, 0xDB, 0xDD, 0xFE)):
            return None
        if orientation == 0:
            return None
    return None


def _exif_orientation(tiff: bytes) -> int:
    """Orientation 1 to 8 out of an Exif block, 1 where it names none, 0 where it is out of the ordinary."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return 0

    def number(at: int, length: int) -> int:
        return int.from_bytes(tiff[at : at + length], order)  # pyright: ignore[reportArgumentType]

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * min(number(directory, 2), 1000), 12):
        if number(entry, 2) == 0x0112:
            value = number(entry + 8, 2)
            return value if (number(entry + 2, 2), number(entry + 4, 4)) == (3, 1) and 1 <= value <= 8 else 0
    return 1


def _check_jpeg(data: bytes) -> None:
    """Walk the marker segments to the end-of-image marker; bytes after it, such as further MPO pictures, are free."""
    if data.endswith(b"\xff\xd9"):
        return
    position = 2
    while match := _JPEG_MARKER.search(data, position):
        position, marker = match.end(), match[1][0]
        if marker == _JPEG_EOI:
            return
        if marker not in (_JPEG_TEM, _JPEG_SOI):
            position += int.from_bytes(data[position : position + 2])  # skips what embedded thumbnails contain
    raise ImageRejected("truncated: JPEG without an end-of-image marker")


def _check_png(data: bytes) -> None:
    """Check the CRC of every chunk up to IEND, without inflating any."""
    view, position = memoryview(data), len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(view[position : position + 4])
        if end > len(data):
            break
        kind = bytes(view[position + 4 : position + 8])
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise ImageRejected(f"corrupt: wrong CRC in PNG chunk {kind.decode('ascii', 'backslashreplace')}")
        if kind == b"IEND":
            return
        position = end
    raise ImageRejected("truncated: PNG without an IEND chunk")


def webp_size(data: bytes) -> tuple[int, int]:
    """Return the (width, height) that a WebP header claims; (0, 0) where its first chunk is of no known kind.

    Needed because Pillow creates the decoder, and with it two canvases, while it opens a WebP.
    """
    kind, start = data[12:16], 20
    if kind == b"VP8X":
        return 1 + _little(data, start + 4, 3), 1 + _little(data, start + 7, 3)
    if kind == b"VP8L":
        bits = _little(data, start + 1, 4)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return _little(data, start + 6, 2) & 0x3FFF, _little(data, start + 8, 2) & 0x3FFF
    return 0, 0


def _little(data: bytes, start: int, length: int) -> int:
    return int.from_bytes(data[start : start + length], "little")
