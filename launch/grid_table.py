"""What came of the runs of a grid: a row for each, which one is the best, and the table."""

import json
import math
from pathlib import Path
from typing import Any

from vitscale.errors import UserError
from vitscale.launch.chain_stages import run_complete
from vitscale.pipeline.config import Config
from vitscale.pipeline.evaluation.tables import Table

SCORES = ("ema_map", "map", "ema_top1", "top1")  # the first that was measured counts: the average is what is used after
SPLITS = ("dev", "val")  # what they were measured on: data.dev, or data.val
MEASURED = (
    *(f"{split}_{key}" for split in SPLITS for key in ("top1", "ema_top1", "map", "ema_map", "loss")), "train_loss",
)  # fmt: skip


def row_of(settings: dict[str, str], config: Config) -> dict[str, Any]:
    """Settings, state, steps, and the last loss and evaluation of the log."""
    row: dict[str, Any] = {"run": config.run.dir, "settings": settings, "state": "not begun", "step": 0}
    try:
        from vitscale.pipeline.status import read_status

        status = read_status(config.run.dir)
    except UserError:
        return row
    row |= {"state": status.state, "step": status.step, "train_loss": status.train.get("loss")}
    if run_complete(config):
        row["state"] = "finished"
    split = "dev" if config.data.dev else "val"
    return row | {f"{split}_{key}": value for key, value in status.evaluation.items() if key in ("loss", *SCORES)}


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows are sorted by: finished ones first, by their score, or without one by their loss."""
    scores = (row.get(f"{split}_{key}") for split in SPLITS for key in SCORES)
    score = next((score for score in scores if score is not None), None)
    loss = row.get("train_loss")
    loss = math.inf if loss is None or math.isnan(loss) else loss
    return row["state"] != "finished", math.inf if score is None else -score, loss if score is None else 0.0


def result_of(folder: str, test: str, file: Path) -> dict[str, Any]:
    """What `vitscale evaluate` wrote about a network on the test set; `mean_per_class` where it counted confusions."""
    found = json.loads(file.read_text())
    measured = {key: found[key] for key in ("images", "top1", "top5", "map", "loss") if found.get(key) is not None}
    if found.get("confusion"):
        shares = [row[place] / sum(row) for place, row in enumerate(found["confusion"]) if sum(row)]
        measured["mean_per_class"] = sum(shares) / len(shares)
    return {"run": folder, "dataset": test, **measured}


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table: settings, then what was measured."""
    keys = list(rows[0]["settings"])
    measured = [key for key in MEASURED if any(row.get(key) is not None for row in rows)]
    header = [*keys, *(key.replace("_", " ") for key in measured), "step", "state", "run"]
    cells = [
        [*row["settings"].values(), *(_number(row.get(key)) for key in measured), f"{row['step']:,}", row["state"],
         row["run"]] for row in rows
    ]  # fmt: skip
    return Table(header, cells)


def result_line(test: dict[str, Any]) -> str:
    """The results on the test set in a line."""
    names = {"top1": "top-1", "map": "mean average precision", "mean_per_class": "mean per class"}
    told = ", ".join(f"{said} {test[key]:.2%}" for key, said in names.items() if key in test)
    return f"Test: {told} of {test['run']} on {test['dataset']} ({test['images']:,} images)"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"
