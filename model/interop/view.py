"""How images become input of a network, as other projects describe it."""

from dataclasses import dataclass
from math import isfinite
from typing import Any

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class View:
    """The central square of an image after its shorter side was resized to side / `crop`; then, channel by channel,
    (value / 255 - mean) / std. As `pipeline.data.augment.Preprocess`, without the side."""

    crop: float = 1.0
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        numbers = (self.crop, *self.mean, *self.std)
        if not all(isfinite(each) for each in numbers) or not 0 < self.crop <= 1 or min(self.std) <= 0:
            raise ValueError(f"preprocessing with crop {self.crop}, mean {self.mean} and std {self.std}")


def triple(values: Any) -> Triple:
    """One number for each channel; one for all three may stand alone. Raises `ValueError` or `TypeError`."""
    red, green, blue = values if isinstance(values, list | tuple) else [values] * 3
    return float(red), float(green), float(blue)
