"""The data card: what a dataset is, at a glance. `card.html`, one file to look at, and `card.md`, the same in words."""

import base64
import html
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image

from vitscale.data_prep.decode import decode_rgb
from vitscale.data_prep.integrity import ImageRejected
from vitscale.data_prep.manifest import INDEX, SAMPLES, read_table, samples_name
from vitscale.data_prep.records import Summary
from vitscale.data_prep.scan import SCAN
from vitscale.data_prep.sources import CLASS, MULTI, NONE, Source
from vitscale.data_prep.storage import Folder
from vitscale.data_prep.write import read_bytes

SHEET, THUMB = 40, 96  # pictures of the contact sheet, and pixels of their longer side
STATISTICS = 128  # pictures for mean and deviation
_MOST_CLASSES = 50
_LABELS = {CLASS: "", MULTI: ", several an image", NONE: ", no labels"}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#1a1a1a;background:#fff}
h1{font-size:1.5em}h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse}
td,th{text-align:left;padding:.15em 1.2em .15em 0;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{background:#4477aa;height:.8em;min-width:1px}.bars td{vertical-align:middle}.bars td:last-child{width:420px}
.bars td:first-child,li{overflow-wrap:anywhere}
.sheet{display:flex;flex-wrap:wrap;gap:6px}figure{margin:0;font-size:11px;line-height:1.3;width:96px;color:#555}
figure{overflow-wrap:anywhere}figure img{display:block;width:96px;height:96px;object-fit:contain;background:#f4f4f4}
.small{image-rendering:pixelated}.pair{display:flex;gap:6px;margin:0 1.5em 1em 0}.pairs{display:flex;flex-wrap:wrap}
"""


def write_card(out: Folder, source: Source, work: Folder, info: dict[str, Any], summary: Summary) -> None:
    """Publish both files. `summary` is of what was added last, `info` the content of dataset.json."""
    samples = _first_samples(out, info, STATISTICS)
    mean, deviation = _statistics([rgb for _, _, rgb in samples])
    facts = _facts(info, mean, deviation, len(samples))
    pairs = _pairs(source, work, summary)
    page = _html(info, summary.examples, facts, samples[:SHEET], pairs)
    for name, text in (("card.html", page), ("card.md", _markdown(info, facts))):
        with out.publish(name) as file:
            file.write(text.encode())


def _first_samples(out: Folder, info: dict[str, Any], count: int) -> list[tuple[str, int, np.ndarray]]:
    """(key, label, pixels) of the first samples of the first shards: drawn at random, as shards are shuffled."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for shard in read_table(out, info["index"], INDEX)["shard"].to_pylist():
        samples = read_table(out, samples_name(shard), SAMPLES).slice(0, count - len(rows))
        rows += [(shard, row) for row in samples.to_pylist()]
        if len(rows) == count:
            break

    def decoded(place: tuple[str, dict[str, Any]]) -> tuple[str, int, np.ndarray]:
        shard, row = place
        return row["key"], row["label"], decode_rgb(out.read(shard, row["offset"], row["length"]))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(decoded, rows))


def _statistics(pictures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel over all pixels, of 0 to 1; every picture counts alike."""
    moments = np.array([cv2.meanStdDev(picture) for picture in pictures])[..., 0] / 255  # (pictures, 2, channels)
    means, deviations = moments[:, 0], moments[:, 1]
    mean = means.mean(axis=0)
    return mean, np.sqrt((deviations**2 + means**2).mean(axis=0) - mean**2)


def _facts(info: dict[str, Any], mean: np.ndarray, deviation: np.ndarray, drawn: int) -> list[tuple[str, str]]:
    return [
        ("Split", info["split"]),
        ("Images", f"{info['samples']:,}"),
        ("Classes", f"{len(info['classes']):,}{_LABELS[info['labels']]}"),
        ("Shards", f"{info['shards']:,}, {info['bytes'] / 1e6:,.1f} MB"),
        ("Source", ", ".join(part["source"] for part in info["parts"])),
        ("Seed", ", ".join(str(part["seed"]) for part in info["parts"])),
        ("Source formats", ", ".join(f"{name} {count:,}" for name, count in info["summary"]["formats"].items())),
        ("Rejected", f"{sum(info['rejected'].values()):,}"),
        ("Duplicates removed", f"{info['duplicate']:,}"),
        ("Leaks removed", f"{info['leaked']:,}"),
        (f"Channel mean (of {drawn} images)", ", ".join(f"{value:.3f}" for value in mean)),
        (f"Channel deviation (of {drawn} images)", ", ".join(f"{value:.3f}" for value in deviation)),
        ("Fingerprint", info["fingerprint"]),
    ]


def _pairs(source: Source, work: Folder, summary: Summary) -> list[tuple[str, np.ndarray, str, np.ndarray]]:
    """Near duplicates beside the pictures that they are copies of, as far as both can still be read."""
    found = []
    for chunk, row, other_chunk, other_row in summary.pairs:
        try:
            one, other = _scanned(source, work, chunk, row), _scanned(source, work, other_chunk, other_row)
        except (OSError, pa.ArrowException, ImageRejected):
            continue
        found.append((*one, *other))
    return found


def _scanned(source: Source, work: Folder, chunk: int, row: int) -> tuple[str, np.ndarray]:
    record = read_table(work, f"scan/{chunk:04d}.parquet", SCAN).slice(row, 1).to_pylist()[0]
    if record["file"] is None:
        data = read_bytes(work, f"spool/{chunk:04d}.bin", record["offset"], record["length"])
    else:
        data = read_bytes(source.folder, record["file"], record["offset"], record["length"])
    return record["name"], decode_rgb(data)


def _html(
    info: dict[str, Any],
    examples: dict[str, list[str]],
    facts: list[tuple[str, str]],
    sheet: list[tuple[str, int, np.ndarray]],
    pairs: list[tuple[str, np.ndarray, str, np.ndarray]],
) -> str:
    classes = sorted(zip(info["classes"], info["class_counts"], strict=True), key=lambda pair: -pair[1])
    named = dict(enumerate(info["classes"]))
    title = html.escape(info["split"])
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{title}</title><style>{_STYLE}</style><h1>Data card: {title}</h1>",
        _table(facts),
    ]
    if classes:
        more = f", the {_MOST_CLASSES} largest of {len(classes):,}" if len(classes) > _MOST_CLASSES else ""
        parts += [f"<h2>Images by class{more}</h2>", _bars(classes[:_MOST_CLASSES])]
    sides = [(f"{int(side)} to {int(side) + 31} px", count) for side, count in _by_number(info["summary"]["sides"])]
    parts += ["<h2>Shorter side</h2>", _bars(sides)]
    if info["summary"]["reasons"]:
        parts += ["<h2>Not kept</h2>", _bars(sorted(info["summary"]["reasons"].items()))]
        for category, names in sorted(examples.items()):
            lines = "".join(f"<li>{html.escape(name)}" for name in names)
            parts.append(f"<details><summary>{html.escape(category)}</summary><ul>{lines}</ul></details>")
    if pairs:
        parts.append("<h2>Near duplicates: some that were removed, each beside the one before it</h2><div class=pairs>")
        parts += [f"<div class=pair>{_figure(a, x)}{_figure(b, y)}</div>" for a, x, b, y in pairs]
        parts.append("</div>")
    parts.append("<h2>Drawn at random</h2><div class=sheet>")
    parts += [_figure(named.get(label, key), rgb) for key, label, rgb in sheet]
    return "".join([*parts, "</div></html>\n"])


def _table(facts: list[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(v)}" for k, v in facts) + "</table>"


def _bars(counts: list[tuple[str, int]]) -> str:
    most = max((count for _, count in counts), default=0) or 1
    rows = [
        f"<tr><td>{html.escape(name)}<td class=n>{count:,}"
        f"<td><div class=bar style='width:{100 * count / most:.1f}%'></div>"
        for name, count in counts
    ]
    return f"<table class=bars>{''.join(rows)}</table>"


def _by_number(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: int(pair[0]))


def _figure(title: str, rgb: np.ndarray) -> str:
    picture = Image.fromarray(rgb)
    small = " class=small" if max(picture.size) < THUMB else ""
    picture.thumbnail((THUMB, THUMB))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<figure><img{small} alt='' src='data:image/jpeg;base64,{data}'>{html.escape(title)}</figure>"


def _cell(text: str) -> str:
    """Text as a cell of a table in Markdown, which takes HTML for what it is."""
    return html.escape(text, quote=False).replace("\\", "\\\\").replace("|", "\\|")


def _markdown(info: dict[str, Any], facts: list[tuple[str, str]]) -> str:
    lines = [f"# Data card: {info['split']}", "", "| | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in facts)]
    if info["classes"]:
        lines += ["", "| class | images |", "|---|---|"]
        rows = list(zip(info["classes"], info["class_counts"], strict=True))
        lines += [f"| {_cell(name)} | {count:,} |" for name, count in rows[:1000]]
    lines += ["", "| shorter side | images |", "|---|---|"]
    lines += [
        f"| {int(side)} to {int(side) + 31} px | {count:,} |" for side, count in _by_number(info["summary"]["sides"])
    ]
    if info["summary"]["reasons"]:
        lines += [
            "",
            "| not kept | images |",
            "|---|---|",
            *(f"| {k} | {v:,} |" for k, v in sorted(info["summary"]["reasons"].items())),
        ]
    return "\n".join(lines) + "\n"
