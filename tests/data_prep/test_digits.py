"""The demo's images: the same real scans on every machine."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vitscale.data_prep.digits import write_digits
from vitscale.errors import UserError


def test_digits_are_split_once_and_for_all(tmp_path: Path) -> None:
    counts = write_digits(tmp_path / "images")
    assert counts == {"train": 1438, "test": 359}
    files = sorted((tmp_path / "images").rglob("*.png"))
    names = "\n".join(str(path.relative_to(tmp_path / "images")) for path in files)
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "245f87223c6820a9"
    assert sorted(int(path.stem) for path in files) == list(range(1797))
    digits: Any = load_digits()
    for path in files[::100]:
        image, number = Image.open(path), int(path.stem)
        assert image.size == ((24, 28, 32)[number % 3],) * 2
        assert path.parent.name == str(digits.target[number])
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float)
        assert np.corrcoef(small.ravel(), digits.images[number].ravel())[0, 1] > 0.95
    with pytest.raises(UserError, match="which exists"):
        write_digits(tmp_path / "images")
