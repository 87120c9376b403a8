"""scikit-learn's handwritten digits as image files in class folders: `python -m vitscale.data_prep.digits OUT`.

1,797 real scans of 8×8 pixels with 17 levels of grey (UCI Optical Recognition of Handwritten Digits, test part),
enlarged to 24 to 32 px a side and split 80/20. The files are the same on every machine.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vitscale.errors import UserError

TRAIN_SHARE = 0.8
SIDES = (24, 28, 32)


def write_digits(out: Path) -> dict[str, int]:
    """Write `OUT/{train,test}/{0 … 9}/NNNN.png`; returns the number of images of each split.

    Image number i goes to the test split if its place in a fixed shuffle is in the last fifth, and has side
    `SIDES[i % 3]`. `out` appears when all are written. Raises `UserError` if it is there already.
    """
    from sklearn.datasets import load_digits

    if out.exists():
        raise UserError("OUT", f"{out}, which exists", "a new folder", "Choose another name, or remove it first.")
    digits = load_digits()
    partial = out.with_name(f"{out.name}.partial")
    order = np.argsort(np.random.Philox(key=0).random_raw(len(digits.images)), kind="stable")
    test = set(order[round(TRAIN_SHARE * len(order)) :].tolist())
    counts = {"train": 0, "test": 0}
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if i in test else "train"
        folder = partial / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
        grey.resize((SIDES[i % 3],) * 2, Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
        counts[split] += 1
    partial.rename(out)
    return counts


if __name__ == "__main__":
    try:
        written = write_digits(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"error: {error}")
    for split, count in written.items():
        print(f"{count} images in {sys.argv[1]}/{split}")
