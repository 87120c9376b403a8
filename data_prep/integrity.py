"""Checks of image containers that Pillow leaves out: is the file whole, and what size does it claim?

Sources: JPEG markers, ITU-T T.81 annex B; PNG chunks, W3C PNG 3rd edition §5; WebP, RFC 9649 §2.
"""

import re
import zlib

_JPEG_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # neither a stuffed FF00 nor a restart marker
_JPEG_TEM, _JPEG_SOI, _JPEG_EOI = 0x01, 0xD8, 0xD9
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class ImageRejected(ValueError):  # noqa: N818 - a verdict on data, not a fault of the program
    """Bytes that may not enter a data set. The text is `category` or `category: detail`, on one line.

    Categories: empty file, not an image, too many pixels, truncated, corrupt, unsupported.
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


def _check_jpeg(data: bytes) -> None:
    """Walk the marker segments to the end-of-image marker; bytes after it, such as further MPO pictures, are free."""
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
