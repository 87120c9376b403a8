"""The data card: one page that needs no other, and that no name of a class or file can break out of."""

import base64
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitscale.data_prep.card import SHEET, THUMB
from vitscale.data_prep.config import DedupConfig, ShardConfig
from vitscale.data_prep.shard import shard

CONFIG = ShardConfig(workers=1, dedup=DedupConfig(near=8))
HOSTILE = ("<script>alert(1)", "a|b & c", "\"><img src=x onerror='alert(1)'>", "`x`\\[y](z)", "ä–猫")
KNOWN = {"html", "meta", "title", "style", "h1", "h2", "table", "tr", "th", "td", "div", "figure", "img"}
KNOWN |= {"details", "summary", "ul", "li"}


class Page(HTMLParser):
    """Tags with their attributes, pictures, and the text between tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [Image.open(BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]


def rows_of(markdown: str) -> dict[str, str]:
    """Two columns of all tables."""
    rows = [line[2:-2].rsplit(" | ", 1) for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


@pytest.fixture
def source(make_folder) -> Path:
    """35 pictures in five classes; of them two exact copies, three near ones and two files that are no images."""
    source = make_folder(classes=HOSTILE)
    whole = (source / HOSTILE[0] / "000.jpg").read_bytes()
    for number in range(3):
        comment = b"\xff\xfe\0\x04n" + str(number).encode()
        (source / HOSTILE[4] / f"near {number} <b onclick=x>.jpg").write_bytes(whole[:2] + comment + whole[2:])
    for name in ("one", "two"):
        shutil.copy(source / HOSTILE[0] / "002.jpg", source / HOSTILE[4] / f"{name}.jpg")
    (source / HOSTILE[1] / "<script>.jpg").write_bytes(b"<html>")
    (source / HOSTILE[1] / "cut.jpg").write_bytes(whole[:-9])
    return source


def test_the_page_needs_nothing_and_runs_nothing(source: Path, tmp_path: Path) -> None:
    info = shard(str(source), str(tmp_path / "out"), CONFIG)
    page = Page(tmp_path / "out" / "card.html")
    assert {tag for tag, _ in page.tags} <= KNOWN
    assert {name for _, attributes in page.tags for name in attributes} <= {
        *("lang", "charset", "name", "content", "style", "class", "alt", "src")
    }
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    text = (tmp_path / "out" / "card.html").read_text()
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    for name in HOSTILE:
        assert name in page.texts
    assert any("<script>.jpg: not an image" in text for text in page.texts)
    assert str(info["samples"]) in page.texts


def test_the_numbers_are_those_of_the_dataset(source: Path, tmp_path: Path) -> None:
    info = shard(str(source), str(tmp_path / "out"), CONFIG)
    assert (info["duplicate"], sum(info["rejected"].values())) == (5, 2)
    assert info["samples"] == 35
    texts = Page(tmp_path / "out" / "card.html").texts
    facts = {
        "Split": "train",
        "Images": "35",
        "Classes": "5",
        "Source": "images",
        "Seed": "0",
        "Rejected": "2",
        "Duplicates removed": "5",
        "Leaks removed": "0",
        "Fingerprint": info["fingerprint"],
    }
    for name, value in facts.items():
        assert texts[texts.index(name) + 1] == value
    sizes = texts.index("0 to 31 px")
    assert texts[sizes + 1] == "35"
    reasons = texts.index("Not kept")
    assert texts[reasons + 1 : reasons + 7] == ["duplicate", "5", "not an image", "1", "truncated", "1"]
    rows = rows_of((tmp_path / "out" / "card.md").read_text())
    assert {name: rows[name] for name in facts} == facts
    assert (rows["duplicate"], rows["not an image"], rows["truncated"]) == ("5", "1", "1")
    assert [rows[name] for name in ("&lt;script&gt;alert(1)", "a\\|b &amp; c", "`x`\\\\[y](z)", "ä–猫")] == ["7"] * 4


def test_mean_and_deviation_are_those_of_the_pixels(tmp_path: Path, encode) -> None:
    (tmp_path / "source" / "plain").mkdir(parents=True)
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    pixels[0, ..., 0], pixels[1, :, :4, 1] = 255, 102
    for number, image in enumerate(pixels):
        (tmp_path / "source" / "plain" / f"{number}.png").write_bytes(encode(image, "PNG"))
    shard(str(tmp_path / "source"), str(tmp_path / "out"), ShardConfig(workers=1, format="png"))
    rows = rows_of((tmp_path / "out" / "card.md").read_text())
    values = pixels / 255
    for name, expected in (("mean", values.mean((0, 1, 2))), ("deviation", values.std((0, 1, 2)))):
        assert rows[f"Channel {name} (of 2 images)"] == ", ".join(f"{value:.3f}" for value in expected)


def test_pictures_are_small_and_near_duplicates_stand_side_by_side(
    tmp_path: Path, picture, encode, source: Path
) -> None:
    wide = encode(picture(77, 300, 600), "JPEG", quality=95)
    (source / HOSTILE[0] / "wide.jpg").write_bytes(wide)
    (source / HOSTILE[3] / "wide again.jpg").write_bytes(wide[:2] + b"\xff\xfe\0\x04no" + wide[2:])
    shard(str(source), str(tmp_path / "out"), CONFIG)
    page = Page(tmp_path / "out" / "card.html")
    pictures = page.pictures()
    pairs = sum(attributes.get("class") == "pair" for _, attributes in page.tags)
    assert pairs == 4  # exact copies are none
    assert len(pictures) == 2 * pairs + 36
    assert max(max(picture.size) for picture in pictures) == THUMB
    assert {picture.size for picture in pictures} == {(96, 48), (28, 20)}
    assert sum(attributes.get("class") == "small" for _, attributes in page.tags) == 2 * pairs + 36 - 3
    for left, right in zip(pictures[0 : 2 * pairs : 2], pictures[1 : 2 * pairs : 2], strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
    names = {text for text in page.texts if "wide" in text and ":" not in text}
    assert names == {f"{HOSTILE[0]}/wide.jpg", f"{HOSTILE[3]}/wide again.jpg"}


def test_a_large_set_shows_a_part_of_itself(digits) -> None:
    page = Page(digits.train / "card.html")
    assert len(page.pictures()) == SHEET
    assert "1,438" in page.texts
    assert "Channel mean (of 128 images)" in page.texts
    assert (digits.train / "card.html").stat().st_size < 200_000


@pytest.mark.parametrize("labelled", ["none", "many"])
def test_sets_without_one_label_an_image_have_a_card(
    make_folder, encode, picture, tmp_path: Path, labelled: str
) -> None:
    folder: Any = make_folder(classes=("ant",)) / "ant"
    if labelled == "many":
        names = sorted(path.name for path in folder.iterdir())
        lines = [f"{name},{'red|big' if number % 2 else 'red'}" for number, name in enumerate(names)]
        (folder / "table.csv").write_text("\n".join(["path,labels", *lines, ""]))
        folder = folder / "table.csv"
    info = shard(str(folder), str(tmp_path / "out"), CONFIG)
    texts = Page(tmp_path / "out" / "card.html").texts
    said = {"none": "0, no labels", "many": "2, several an image"}[labelled]
    assert texts[texts.index("Classes") + 1] == said
    assert info["class_counts"] == ([] if labelled == "none" else [3, 7])


def test_the_card_of_an_appended_set_is_of_all_of_it(make_folder, tmp_path: Path) -> None:
    shard(str(make_folder("of 3", each=3)), str(tmp_path / "out"), ShardConfig(workers=1))
    info = shard(str(make_folder("of 9", each=9)), str(tmp_path / "out"), ShardConfig(workers=1), append=True)
    texts = Page(tmp_path / "out" / "card.html").texts
    assert info["samples"] == 36
    assert texts[texts.index("Images") + 1] == "36"
    assert texts[texts.index("Source") + 1] == "of 3, of 9"
    assert [texts[texts.index(name) + 1] for name in ("ant", "bee", "cat")] == ["12"] * 3
