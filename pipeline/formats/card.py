"""The model card of an export: `README.md`, with the facts that its reader needs to trust and to repeat it."""

import json
from pathlib import Path
from typing import Any

from vitscale.pipeline.config import Config, flatten, to_dict
from vitscale.pipeline.weights import Trained

PLACES = ("run.dir", "run.wandb", "data.train", "data.val", "data.cache", "init_from")  # nobody else's business


def card(trained: Trained, licence: str, loading: str, rows: dict[str, Any]) -> str:
    """Markdown: architecture, how to load it (`loading`), data, metrics, recipe, origin, checks and checksums (`rows`).

    `licence` stands as it is in the header that model hubs read.
    """
    origin, recipe = trained.origin, flatten(trained.origin.get("recipe") or {})
    header = ["---", f"license: {json.dumps(licence or 'unknown')}", "tags:", "- image-classification", "- vitscale"]
    title = recipe.get("model.name") or trained.model.family
    preprocess, (height, width) = trained.preprocess, trained.model.height_width
    facts = {
        "architecture": f"{title}: {trained.model.summary}",
        "classes": len(trained.classes),
        "input": f"RGB, {height} × {width} px: resized to just cover {height / preprocess.crop:.0f} × "
        f"{width / preprocess.crop:.0f} px (bicubic), the centre cut out, then (value / 255 - mean) / std"
        f" with mean {_numbers(preprocess.mean)} and std {_numbers(preprocess.std)}",
        "weights": {"ema": "Polyak average", "raw": "as trained"}.get(str(origin.get("weights")), "as found"),
        "licence": licence or "not stated",
    }
    trained_on = {
        "step": origin.get("step"),
        "images seen": origin.get("examples"),
        "dataset": origin.get("dataset"),
        "source": "/".join(Path(str(origin.get("checkpoint") or origin.get("source") or "")).parts[-3:]) or None,
        "commit": origin.get("commit"),
    }
    parts = [
        "\n".join([*header, "---"]),
        f"# {title}, {len(trained.classes)} classes",
        _table({**facts, **{key: value for key, value in trained_on.items() if value is not None}}),
        f"## Use\n\n```python\n{loading}\n```",
    ]
    for metrics in origin.get("metrics") or []:
        shares = {key: f"{value:.4f}" for key, value in metrics.items() if isinstance(value, float)}
        parts.append(f"## Measured on {metrics.get('dataset')}, {metrics.get('images'):,} images\n\n{_table(shares)}")
    if recipe:
        usual = flatten(to_dict(Config()))
        told = {key: value for key, value in recipe.items() if key not in PLACES and value != usual.get(key)}
        parts.append(f"## Recipe\n\nWhat differs from the defaults:\n\n{_table(told)}")
    parts.append(f"## Checked before it was published\n\n{_table(rows)}")
    return "\n\n".join(parts) + "\n"


def provenance(trained: Trained) -> dict[str, Any]:
    """What the run's folder around a checkpoint tells besides: its commit, and what was measured of these weights."""
    run = trained.path.parent.parent
    if trained.path.parent.name != "checkpoints":
        return {}
    found: dict[str, Any] = {}
    starts = _json(run / "environment.json")
    if isinstance(starts, list) and starts and isinstance(starts[-1], dict):
        found["commit"] = starts[-1].get("commit")
    results = [_json(path) for path in sorted((run / "evaluations").glob("*.json"))]
    found["metrics"] = [
        {
            "dataset": Path(str(each["dataset"]["path"])).name,
            "images": each["images"],
            **{name: each[name] for name in ("top1", "top5", "map", "loss") if isinstance(each.get(name), float)},
        }
        for each in results
        if isinstance(each, dict) and each.get("origin", {}).get("step") == trained.origin.get("step")
        and each.get("origin", {}).get("weights") == trained.origin.get("weights")
    ]  # fmt: skip
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
