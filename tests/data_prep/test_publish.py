"""Whole or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vitscale.data_prep.publish import publish


def test_published_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with publish(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_changes_when_the_block_raises(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def interrupted() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), publish(target) as file:
        file.writelines(interrupted())
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
