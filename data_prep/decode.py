"""The single decoding policy: encoded bytes → checked, upright, 8-bit RGB, for sharding and for training alike.

- The format is decided by content, never by a file name: JPEG, PNG, GIF, WebP, BMP or TIFF, and nothing else is opened.
- EXIF (or XMP) orientation is applied. ICC profiles are ignored: values are taken as sRGB.
- Transparency is composited over `BACKGROUND`. 16 bits per channel are scaled to 8, never clipped.
- Of an animation or a file of several pages the first picture counts.
- Files that end early or fail a checksum are refused, even where a lenient decoder returns a picture. A JPEG carries no
  checksum: damage inside its scans that leaves the markers whole goes unseen.
"""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vitscale.data_prep.integrity import ImageRejected, check_whole, image_format, webp_size

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
    image = _open(data, max_pixels)
    check_whole(data, image.format or "")
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


def encode_jpeg(rgb: np.ndarray, quality: int = 95) -> bytes:
    """Encode uint8 (H, W, 3) as a baseline JPEG: colour at full resolution (4:4:4) from quality 95 on, else 4:2:0.

    The same pixels, quality, Pillow and libjpeg give the same bytes.
    """
    buffer = BytesIO()
    subsampling = "4:4:4" if quality >= 95 else "4:2:0"
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Open the header and check the size it claims; pixels are not read yet."""
    if not data:
        raise ImageRejected("empty file")
    if (name := image_format(data)) is None:
        raise ImageRejected("not an image")
    if name == "WEBP":
        _check_pixels(*webp_size(data), max_pixels)
    try:
        image = Image.open(BytesIO(data), formats=[name])
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its text holds the address of the buffer
        raise ImageRejected(f"corrupt: no readable {name} header") from error
    except Exception as error:
        raise ImageRejected(_reason(error)) from error
    _check_pixels(*image.size, max_pixels)
    return image


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
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
