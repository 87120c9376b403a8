"""Settings of `vitscale shard`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vitscale.data_prep.decode import MAX_PIXELS
from vitscale.errors import UserError


def check_range(name: str, value: Any, low: int, high: int) -> None:
    """Raise `UserError` unless `value` is a whole number from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise UserError(name, repr(value), f"a whole number from {low} to {high}", "Correct the setting.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `UserError` unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(name, repr(value), f"one of {', '.join(choices)}", "Correct the setting.")


@dataclass(frozen=True)
class ResizeConfig:
    """`shorter`: pixels of the shorter side of pictures that are larger (0: leave sizes alone). None is enlarged."""

    shorter: int = 0

    def __post_init__(self) -> None:
        check_range("resize.shorter", self.shorter, 0, 65_535)

    def target(self, height: int, width: int) -> tuple[int, int] | None:
        """(height, width) to scale down to, None where the picture stays."""
        least = min(height, width)
        if not self.shorter or least <= self.shorter:
            return None
        return round(height * self.shorter / least), round(width * self.shorter / least)


@dataclass(frozen=True)
class DedupConfig:
    """`exact`: keep or drop copies of the same bytes. `near`: bits of 256 in which perceptual hashes of one picture
    may differ (0: not looked for; 64 finds crops of 5% and tells photos apart); the first in source order stays.
    `against`: datasets whose images, exact and near, are removed from this one."""

    exact: str = "keep"
    near: int = 0
    against: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("dedup.exact", self.exact, ("keep", "drop"))
        check_range("dedup.near", self.near, 0, 96)
        if isinstance(self.against, str) or not all(isinstance(path, str) and path for path in self.against):
            raise UserError("dedup.against", repr(self.against), "a list of datasets", "Write [path, path].")


@dataclass(frozen=True)
class ShardConfig:
    """Settings of a run. A shard holds at most `shard_samples`, or about `shard_mb` million bytes if that is not 0.

    `check`: full decodes every image, header trusts JPEGs whose headers and end are whole. `format` (jpeg, or png or
    webp without loss) and `jpeg_quality` are of pictures that cannot be stored as they are. `workers` 0 stands for
    every available core; `executor` is local or ray. Raises `UserError`, naming the field.
    """

    split: str = "train"
    seed: int = 0
    shard_samples: int = 10_000
    shard_mb: int = 0
    check: str = "full"
    format: str = "jpeg"
    jpeg_quality: int = 95
    max_pixels: int = MAX_PIXELS
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    workers: int = 0
    executor: str = "local"

    def __post_init__(self) -> None:
        if not isinstance(self.split, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.split):
            raise UserError(
                "split", repr(self.split), "a word of letters, digits, - and _", "It becomes part of file names."
            )
        check_range("seed", self.seed, 0, 2**63 - 1)
        check_range("shard_samples", self.shard_samples, 1, 10**9)
        check_range("shard_mb", self.shard_mb, 0, 10**6)
        check_choice("check", self.check, ("full", "header"))
        check_choice("format", self.format, ("jpeg", "png", "webp"))
        check_range("jpeg_quality", self.jpeg_quality, 1, 100)
        check_range("max_pixels", self.max_pixels, 1, MAX_PIXELS)
        check_range("workers", self.workers, 0, 1024)
        check_choice("executor", self.executor, ("local", "ray"))
        if self.check == "header" and (self.dedup.near):
            raise UserError("check", "header", "full, as dedup.near looks at pixels", "Set check=full or dedup.near=0.")
