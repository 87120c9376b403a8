"""`report.html`: one page about some runs, with everything it shows inside it."""

import base64
import io
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from vitscale.data_prep.decode import decode_rgb
from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.model.config import in_pixels
from vitscale.pipeline.checkpoint import read_state
from vitscale.pipeline.config import Config, flatten, to_dict
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.inference import Classifier
from vitscale.pipeline.metrics import read_metrics
from vitscale.pipeline.mirror import send, shown
from vitscale.pipeline.weights import open_trained

SAMPLES = 24  # sample predictions for each run
MOST_MATRIX_CLASSES = 50  # larger confusion matrices are not drawn


@dataclass(frozen=True)
class SamplePrediction:
    """One image of the evaluated dataset, as a data URI, and what the run's model makes of it."""

    picture: str
    label: str
    predicted: str
    probability: float


@dataclass
class RunPage:
    """What the page shows of one run; figures are inline SVG."""

    name: str
    facts: dict[str, str]
    settings: dict[str, Any]
    starts: list[dict[str, Any]]
    curves: str = ""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[SamplePrediction] = field(default_factory=list)


def write_report(runs: list[Path], out: Path, commands: str) -> None:
    """Write the page about `runs` to `out`, whole or not at all.

    `commands` is a text file with one command a line, or empty: the commands of the runs. Raises `UserError` for a
    folder that is no run, a file that cannot be read, and if matplotlib is not installed.
    """
    pages = [run_page(run) for run in runs]
    told = list(chain.from_iterable(map(_commands, pages)))
    try:
        told = Path(commands).read_text().splitlines() if commands else told
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--commands", f"{commands} ({error})", "a text file", "Check the path.") from error
    template = Environment(
        loader=PackageLoader("vitscale.pipeline"), autoescape=select_autoescape(), undefined=StrictUndefined
    ).get_template("report.html")
    try:
        publish_text(out, template.render(pages=pages, commands=told))
        send(out)
    except OSError as error:
        raise UserError("--out", str(error), "a file that can be written", "Choose another.") from error


def run_page(run: Path) -> RunPage:
    """Gather what the page shows of one run. Raises `UserError` if the folder is no run with a checkpoint."""
    trained = open_trained(str(run), "RUNS")
    if not (run / "environment.json").is_file() or trained.path.parent != run / "checkpoints":
        raise UserError("RUNS", f"{shown(run)}, which is no run", "the folder of a run", "Give its run.dir.")
    state = read_state(trained.path)
    recipe, defaults = flatten(state["recipe"]), flatten(to_dict(Config()))
    model = trained.model
    page = RunPage(
        name=run.name,
        facts={
            "model": f"{recipe['model.name']}: {model.summary}",
            "input": in_pixels(model.img_size),
            "trained": f"{state['step']:,} steps, {state['examples']:,} images of {state['dataset']['samples']:,}",
            "ranks": f"{state['world_size']}, ZeRO-{state['zero_stage']}",
        },
        settings={key: value for key, value in recipe.items() if value != defaults.get(key)},
        starts=json.loads((run / "environment.json").read_text()),
        curves=curves(read_metrics(run)),
    )
    classifier = Classifier(trained)
    for path in sorted((run / "evaluations").glob("*.json")):
        results = json.loads(path.read_text())
        if "top1" not in results:  # features alone, of a dataset with other classes
            continue
        matrix = results.pop("confusion")
        drawn = matrix and len(matrix) <= MOST_MATRIX_CLASSES
        page.evaluations.append({**results, "figure": confusion_figure(matrix, results["classes"]) if drawn else ""})
        page.samples = sample_predictions(classifier, results["dataset"])
    return page


def sample_predictions(classifier: Classifier, dataset: dict[str, Any]) -> list[SamplePrediction]:
    """Predictions for samples spread evenly over an evaluated dataset; none if it is no longer there."""
    try:
        store = Store(dataset["path"], "dataset")
    except UserError:
        return []
    if store.fingerprint != dataset["fingerprint"]:
        return []
    shown = [store.read(int(n)) for n in np.linspace(0, len(store) - 1, min(SAMPLES, len(store)))]
    images = [decode_rgb(sample.data) for sample in shown]
    best = classifier.probabilities(images).max(dim=1)
    return [
        SamplePrediction(
            _picture(image),
            ", ".join(store.classes[label] for label in sample.labels),
            classifier.classes[index],
            probability,
        )
        for image, sample, index, probability in zip(
            images, shown, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def curves(rows: list[dict[str, Any]]) -> str:
    """Loss, accuracy, learning rate and throughput over the steps."""

    def draw(figure: Any) -> None:
        panels = (("loss", "loss"), ("top1", "top-1"), ("lr", "learning rate"), ("images_per_s", "images/s"))
        for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for kind, style in (("train", {"lw": 1, "alpha": 0.7}), ("eval", {"marker": "o", "ms": 3})):
                points = [(row["step"], row[key]) for row in rows if row["kind"] == kind and row.get(key) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), label=kind, **style)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        figure.axes[1].legend()

    return _svg(draw, width=12, height=2.8)


def confusion_figure(matrix: list[list[int]], classes: list[str]) -> str:
    """Share of each class (row) taken for each class (column), with counts."""

    def draw(figure: Any) -> None:
        counts = np.array(matrix)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
        axes.set_yticks(range(len(classes)), classes, parse_math=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    j, i, count, ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black", size=7
                )

    side = 2 + 0.3 * len(classes)
    return _svg(draw, width=side, height=side)


def _svg(draw: Callable[[Any], None], width: float, height: float) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "report", "no matplotlib", "matplotlib, which draws the figures", "pip install 'vitscale[report]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _picture(rgb: np.ndarray) -> str:
    image = Image.fromarray(rgb)
    image.thumbnail((96, 96))
    data = io.BytesIO()
    image.save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _commands(page: RunPage) -> list[str]:
    return ["vitscale " + shlex.join(start["command"]) for start in page.starts]
