"""Pictures and sources small enough to make in each test."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

Picture = Callable[..., np.ndarray]
Encode = Callable[..., bytes]
MakeFolder = Callable[..., Path]
MakeParquet = Callable[..., Path]


def _picture(seed: int = 0, height: int = 20, width: int = 28) -> np.ndarray:
    """A smooth colour gradient, so that JPEG keeps it closely; its corners differ, so that no turn goes unseen."""
    random = np.random.default_rng(seed)
    corners = random.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    return np.array(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR))


def _encode(image: np.ndarray | Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture() -> Picture:
    return _picture


@pytest.fixture(scope="session")
def encode() -> Encode:
    return _encode


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Make `tmp_path/name` with a folder per class; JPEG and PNG in turn, pictures by number."""

    def make(
        name: str = "images", classes: tuple[str, ...] = ("ant", "bee", "cat"), each: int = 7, step: int = 1
    ) -> Path:
        for label, kind in list(enumerate(classes))[::step]:
            (tmp_path / name / kind).mkdir(parents=True)
            for number in range(each)[::step]:
                image = _picture(label * each + number)
                data = _encode(image, "PNG") if number % 2 else _encode(image, "JPEG", quality=95)
                (tmp_path / name / kind / f"{number:03d}.{'png' if number % 2 else 'jpg'}").write_bytes(data)
        return tmp_path / name

    return make


@pytest.fixture
def make_parquet(tmp_path: Path) -> MakeParquet:
    """Write images and labels in the layout of the datasets library."""

    def make(
        images: list[bytes | None],
        labels: list[int | None],
        names: list[str],
        file: str = "train.parquet",
        row_group_size: int = 1000,
    ) -> Path:
        rows = [{"bytes": data, "path": f"{row}.jpg"} for row, data in enumerate(images)]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
        schema = pa.schema([("image", kind), ("label", pa.int64())], metadata=metadata)
        pq.write_table(pa.table([rows, labels], schema=schema), tmp_path / file, row_group_size=row_group_size)
        return tmp_path / file

    return make
