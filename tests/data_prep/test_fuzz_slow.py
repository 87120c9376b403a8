"""Thousands of damaged images and tars: each is refused in the way that is foreseen, or read as what it says it is."""

import json
import resource
import tarfile
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitscale.data_prep.config import ResizeConfig, ShardConfig
from vitscale.data_prep.decode import decode_rgb
from vitscale.data_prep.integrity import ImageRejected
from vitscale.data_prep.scan import Examined, examine
from vitscale.data_prep.source_tar import TarChunk, open_tars
from vitscale.data_prep.storage import LocalFolder
from vitscale.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Pillow warns of damage as well

MAX_PIXELS = 10**6
MORE_MEMORY = 200 * 2**10  # KiB: some pictures of MAX_PIXELS in RGBA; measured 31 MB
SIZES = [0, 1, 0x7F, 0x80, 0xFF, 1000, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
CASES = settings(max_examples=6000, deadline=None, derandomize=True, database=None)

# (kind of edit, where, of which seed or value, how much)
Edit = tuple[str, int, int, int]
places = st.one_of(st.integers(0, 100), st.integers(0, 700), st.integers(0, 2**16))
edits = st.lists(
    st.tuples(st.sampled_from(["byte", "bit", "size", "cut", "drop", "insert", "repeat"]), places, places, places),
    min_size=1,
    max_size=6,
)


def damaged(data: bytes, edits: list[Edit]) -> bytes:
    """Data with the edits made one after the other."""
    changed = bytearray(data)
    for kind, where, value, amount in edits:
        at, count = where % max(len(changed), 1), amount % 40
        if kind == "cut":
            del changed[at:]
        elif kind == "drop":
            del changed[at : at + count]
        elif kind == "insert":
            changed[at:at] = value.to_bytes(4, "big") * (count % 4)
        elif kind == "repeat":
            changed[at:at] = changed[value : value + count]
        elif kind == "size":
            width = (1, 2, 4)[count % 3]
            number = SIZES[value % len(SIZES)] % 256**width
            changed[at : at + width] = number.to_bytes(width, ("big", "little")[count % 2])
        elif changed:
            changed[at] = value % 256 if kind == "byte" else changed[at] ^ 1 << value % 8
    return bytes(changed)


def seed_images() -> list[bytes]:
    """One small picture in every way of storing it that a decoder has code for."""
    corners = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8))
    picture, large = corners.resize((36, 24)), corners.resize((264, 200))
    deep = Image.fromarray((np.arange(24 * 36).reshape(24, 36) * 70).astype(np.uint16))
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = 6, "maker"
    both = {"save_all": True, "append_images": [picture.rotate(180)]}
    palette = picture.quantize(16)
    pictures: list[tuple[Image.Image, str, dict]] = [
        *((picture, "JPEG", options) for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1})),
        *((picture, "JPEG", options) for options in ({"exif": exif}, {"xmp": b'<x tiff:Orientation="6"/>'})),
        *((picture.convert(mode), "JPEG", {}) for mode in ("L", "CMYK")),
        *((large, "JPEG", options) for options in ({}, {"progressive": True})),
        (picture, "MPO", both),
        *((picture.convert(mode), "PNG", {}) for mode in ("RGB", "RGBA", "LA", "1")),
        *((picture, "PNG", options) for options in ({"exif": exif}, both)),
        (palette, "PNG", {"transparency": 3}),
        (deep, "PNG", {}),
        (palette, "GIF", {}),
        (palette, "GIF", both | {"transparency": 2}),
        (picture.convert("RGBA"), "WEBP", {"lossless": True}),
        *((picture, "WEBP", options) for options in ({}, both, {"exif": exif})),
        *((image, "BMP", {}) for image in (picture, palette, picture.convert("1"))),
        *((picture, "TIFF", {"compression": kind}) for kind in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg")),
        (picture.convert("1"), "TIFF", {"compression": "group4"}),
        (picture, "TIFF", {"big_tiff": True}),
        *((picture.convert(mode), "TIFF", {}) for mode in ("CMYK", "LAB", "F")),
        (deep, "TIFF", {"compression": "packbits"}),
    ]
    seeds = []
    for image, format, options in pictures:
        buffer = BytesIO()
        image.save(buffer, format, **options)
        seeds.append(buffer.getvalue())
    return seeds


def memory() -> int:
    """The most that this process ever held, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def verdict_of(look: Callable[[], np.ndarray | Examined]) -> np.ndarray | Examined | None:
    with suppress(ImageRejected):
        return look()
    return None


@settings(CASES)
@given(st.sampled_from(seed_images()), edits)
def check_images(seed: bytes, edits: list[Edit]) -> None:
    data = damaged(seed, edits)
    rgb = verdict_of(lambda: decode_rgb(data, MAX_PIXELS))
    assert rgb is None or (isinstance(rgb, np.ndarray) and (rgb.dtype, rgb.shape[2:]) == (np.uint8, (3,)) and rgb.size)
    for config in (ShardConfig(max_pixels=MAX_PIXELS), ShardConfig(max_pixels=MAX_PIXELS, resize=ResizeConfig(12))):
        found = verdict_of(lambda config=config: examine(data, config))
        # what is kept is what `verify` and the loader can decode, although it was looked at in grey and scaled down
        assert (found is None) == (rgb is None)
        if isinstance(found, Examined) and isinstance(rgb, np.ndarray):
            assert (found.height, found.width) == rgb.shape[:2]
            assert found.stored is None or min(decode_rgb(found.stored).shape) > 0
    verdict_of(lambda: examine(data, ShardConfig(max_pixels=MAX_PIXELS, check="header")))


def test_damaged_images_are_rejected_or_read() -> None:
    before = memory()
    check_images()
    assert memory() - before < MORE_MEMORY


def seed_tars() -> list[bytes]:
    """Four samples in each format of tar; in GNU's and POSIX's with names too long for the older header."""
    seeds = []
    for format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
            for number in range(4):
                folder = "d" * (120 if number == 2 else 1)
                text = json.dumps({"caption": "größe" * number, "label": number}).encode()
                for suffix, data in (("jpg", bytes(range(256)) * 3), ("cls", b"%d" % number), ("json", text)):
                    info = tarfile.TarInfo(f"{folder}/{number:03d}.{suffix}")
                    info.size = len(data)
                    if format == tarfile.PAX_FORMAT and number == 1:
                        info.pax_headers = {"comment": "größe", "GNU.sparse.map": "0,10,100,20"}
                    archive.addfile(info, BytesIO(data))
        seeds.append(buffer.getvalue())
    return seeds


NUMBERS = [b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\7", b"77777777777\0", (10**15).to_bytes(12, "big")]
NUMBERS += [(-size).to_bytes(12, "big", signed=True) for size in (1, 512, 4096, 10**6)]
headers = st.lists(
    st.tuples(
        st.integers(0, 40),  # block of 512 bytes
        st.sampled_from([0, 2, 100, 124, 136, 156, 157, 257, 345, 386, 482]),  # fields of POSIX ustar and GNU
        st.sampled_from([b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"3", b"5", b"6", b"../", b"/", *NUMBERS]),
    ),
    max_size=4,
)


def with_checksums(tar: bytearray) -> bytes:
    """Headers whose checksum is right, so that the fields behind it are believed."""
    for at in range(0, len(tar) - 511, 512):
        if tar[at + 257 : at + 262] == b"ustar":
            tar[at + 148 : at + 156] = b" " * 8
            tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    return bytes(tar)


def test_damaged_tars_are_problems_or_read(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path))

    @settings(CASES)
    @given(st.sampled_from(seed_tars()), headers, st.one_of(st.just([]), edits), st.booleans())
    def check(seed: bytes, headers: list[tuple[int, int, bytes]], edits: list[Edit], sums: bool) -> None:
        tar = bytearray(seed)
        for block, field, value in headers:
            at = block * 512 % len(tar) + field
            tar[at : at + len(value)] = value
        data = damaged(bytes(tar), edits)
        data = with_checksums(bytearray(data)) if sums else data
        (tmp_path / "x.tar").write_bytes(data)
        for labelled in ("class", "none", "multi"):
            for item in TarChunk(("x.tar",), None, labelled).read(folder):
                assert (item.data is None) == bool(item.problem)
                "".join([item.name, item.problem, item.extra or ""]).encode()
                if item.data is not None:
                    assert data[item.offset : item.offset + len(item.data)] == item.data
                    assert ".." not in item.name.split("/")
        with suppress(UserError):
            open_tars("x", folder, ["x.tar"])

    before = memory()
    check()
    assert memory() - before < MORE_MEMORY
