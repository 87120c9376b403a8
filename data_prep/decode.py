"""The single decoding policy: encoded bytes → checked, upright, 8-bit RGB, for sharding and for training alike.

- The format is decided by content, never by a file name: JPEG, PNG, GIF, WebP, BMP or TIFF, and nothing else is opened.
- EXIF (or XMP) orientation is applied. ICC profiles are ignored: values are taken as sRGB.
- Transparency is composited over `BACKGROUND`. 16 bits per channel are scaled to 8, never clipped.
- Of an animation or a file of several pages the first picture counts.
- Files that end early or fail a checksum are refused, even where a lenient decoder returns a picture. A JPEG carries no
  checksum: damage inside its scans goes unseen where the decoder can go on. Bytes between its segments that do not
  belong there are passed over, as cameras leave them.

JPEGs of the common kind go through libjpeg-turbo directly (simplejpeg), with the same pixels as by Pillow; all else
goes through Pillow.
"""

from dataclasses import dataclass
from io import BytesIO

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from vitscale.data_prep.integrity import (
    ImageRejected,
    JpegHeader,
    check_whole,
    image_format,
    jpeg_header,
    webp_size,
)

MAX_PIXELS = 178_956_970  # 2 × Image.MAX_IMAGE_PIXELS: where Pillow itself refuses to open a picture
BACKGROUND = (255, 255, 255)  # shown through transparent pixels

_UPRIGHT = {  # EXIF orientation → the transposition that undoes it; EXIF 2.3, tag 0x0112
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LONGEST = {"jpeg": 65_500, "webp": 16_383}  # pixels a side that the encoders of libjpeg and libwebp take
_CONVERTIBLE = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"}
_CONVERTIBLE_ALPHA = {"LA", "PA", "RGBA", "RGBa"}


@dataclass(frozen=True)
class ImageInfo:
    """What the header tells. `keep`: the bytes may be stored as they are.

    That holds for an upright 8-bit JPEG with one (grey) or three (YCbCr) components and one picture in the file.
    """

    format: str
    keep: bool


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one picture completely, by the policy of this module, to a writable uint8 array (H, W, 3).

    `max_pixels` is compared with the size in the header before memory for pixels is asked for; above `MAX_PIXELS` it
    has no effect. Raises `ImageRejected` for anything that is not one whole picture of an accepted format.
    """
    header = jpeg_header(data) if image_format(data) == "JPEG" else None
    if header:
        pixels = decode_plain_jpeg(data, header.width, header.height, max_pixels)
        if pixels is not None:
            return np.array(_turned(Image.fromarray(pixels), header.orientation)) if header.orientation > 1 else pixels
    return _decode_by_pillow(data, max_pixels)


def decode_plain_jpeg(
    data: bytes, width: int, height: int, max_pixels: int, colorspace: str = "RGB", least: tuple[int, int] = (0, 0)
) -> np.ndarray | None:
    """Decode a JPEG, as it lies in the file, to uint8 (H, W, C); None if Pillow should try. Pixels are not turned.

    `colorspace` is RGB, or GRAY, which skips colour and looks at all bytes all the same. With `least` (height, width)
    the picture may be halved in the decoder, up to three times, to no less. Raises `ImageRejected`.
    """
    check_pixels(width, height, max_pixels)
    try:
        parts = _parts(width, height, least)
        return simplejpeg.decode_jpeg(data, colorspace, min_height=-(-height // parts), min_width=-(-width // parts))
    except ValueError as error:
        return _refuse(error)


def decode_top(
    data: bytes, header: JpegHeader, rows: int, max_pixels: int, least: tuple[int, int]
) -> np.ndarray | None:
    """The first `rows` rows of a sequential JPEG, without reading the others: what `decode_plain_jpeg` gives of them.

    It is told that it is no higher, and what follows in the file counts as superfluous. Of the damage that decoders
    notice, what lies within the rows may be missed: for images that were looked at as a whole before.
    """
    rows = min(header.height, rows + 2)  # chroma of the last two is interpolated from below
    if rows == header.height or not header.height_at:
        return decode_plain_jpeg(data, header.width, header.height, max_pixels, "RGB", least)
    check_pixels(header.width, header.height, max_pixels)
    lower = data[: header.height_at] + rows.to_bytes(2) + data[header.height_at + 2 :]
    parts = _parts(header.width, header.height, least)
    size = -(-rows // parts), -(-header.width // parts)
    pixels = np.empty((*size, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(lower, "RGB", min_height=size[0], min_width=size[1], buffer=pixels)
    except ValueError as error:
        if "extraneous bytes" not in str(error):
            return _refuse(error)
    return pixels


def _parts(width: int, height: int, least: tuple[int, int]) -> int:
    """By how much a picture is scaled down, in halves: other eighths take longer to decode than the whole."""
    fits = (parts for parts in (8, 4, 2) if -(-height // parts) >= least[0] and -(-width // parts) >= least[1])
    return next(fits, 1) if any(least) else 1


def _refuse(error: ValueError) -> None:
    """Raise `ImageRejected` for what simplejpeg says of damage; where it says anything else, Pillow should try."""
    text = " ".join(str(error).split())
    if "premature end" in text.lower():
        raise ImageRejected(f"truncated: {text}") from error
    if text.startswith("Corrupt JPEG data") and "extraneous bytes" not in text:
        raise ImageRejected(f"corrupt: {text}") from error


def _decode_by_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    image = _open(data, max_pixels)
    check_whole(data, image.format or "")
    if image.format in ("JPEG", "MPO"):  # for its warnings, which Pillow does not pass on
        decode_plain_jpeg(data, *image.size, max_pixels, "CMYK" if image.mode == "CMYK" else "RGB")
    try:
        image.load()
        upright = _turned(_to_rgb(image), _orientation(image))
    except (ImageRejected, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise a dozen kinds on damaged data
        raise ImageRejected(_reason(error)) from error
    return np.array(upright)


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Read the header only. Raises `ImageRejected` where the picture cannot be opened or is too large."""
    image = _open(data, max_pixels)
    image_format = image.format or ""
    plain = image_format == "JPEG" and image.mode in ("L", "RGB") and image.info.get("adobe_transform") != 0
    return ImageInfo(image_format, keep=plain and _orientation(image) == 1)


def encode(rgb: np.ndarray, format: str = "jpeg", quality: int = 95) -> bytes:
    """Encode uint8 (H, W, 3) as `jpeg`, or without loss as `png` or `webp`.

    A JPEG is baseline, its colour at full resolution (4:4:4) from quality 95 on, else 4:2:0. The same pixels, settings
    and library versions give the same bytes. Raises `ImageRejected` for a side longer than the format allows.
    """
    if max(rgb.shape[:2]) > (longest := _LONGEST.get(format, max(rgb.shape[:2]))):
        raise ImageRejected(f"unsupported: {max(rgb.shape[:2])} px a side, of which {format} takes {longest}")
    if format == "jpeg":  # the bytes of Pillow's, sooner; simplejpeg takes a coarser DCT, 0.4 dB at quality 95
        sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444 if quality >= 95 else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420
        options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
        return cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)[1].tobytes()
    buffer = BytesIO()
    Image.fromarray(rgb).save(buffer, format.upper(), lossless=True)
    return buffer.getvalue()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Open the header and check the size it claims; pixels are not read yet."""
    if not data:
        raise ImageRejected("empty file")
    if (name := image_format(data)) is None:
        raise ImageRejected("not an image")
    if name == "WEBP":
        check_pixels(*webp_size(data), max_pixels)
    try:
        image = Image.open(BytesIO(data), formats=[name])
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its text holds the address of the buffer
        raise ImageRejected(f"corrupt: no readable {name} header") from error
    except Exception as error:
        raise ImageRejected(_reason(error)) from error
    check_pixels(*image.size, max_pixels)
    return image


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise `ImageRejected` for a size, as the header tells it, above the limit."""
    if width * height > max_pixels:
        raise ImageRejected(f"too many pixels: {width}x{height} > {max_pixels}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any accepted mode to RGB; transparency goes over `BACKGROUND`."""
    if image.mode.startswith("I;16"):
        return _grey16_to_rgb(image)
    if image.mode not in _CONVERTIBLE | _CONVERTIBLE_ALPHA:
        raise ImageRejected(f"unsupported: pixel mode {image.mode}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, BACKGROUND)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 0…65535 to 0…255, rounded (PNG, 3rd edition, §12.4), where Pillow's own conversion would clip at 255."""
    values = np.asarray(image)
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        return Image.fromarray(np.where((values == transparent)[..., None], np.uint8(BACKGROUND), grey[..., None]))
    return Image.fromarray(grey).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the orientation, 2 to 8, or 1 for upright; a damaged EXIF block or a senseless value counts as upright."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in _UPRIGHT else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _reason(error: Exception) -> str:
    """Turn an exception of Pillow's into a reason on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels: {text}"
    return f"truncated: {text}" if "truncated" in text.lower() else f"corrupt: {text}"
