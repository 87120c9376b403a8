"""The commands of trained networks: `vitscale evaluate`, `compare`, `predict`, `embed` and `export`; and `models`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vitscale.errors import UserError
from vitscale.launch.options import DEVICES, WEIGHTS, Debug, Device, MicroBatch, Nproc, Weights, Workers
from vitscale.launch.stage import run_ranks, stage


@stage
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A run, a checkpoint or an export.")],
    dataset: Annotated[str, typer.Argument(help="Folder that `vitscale shard` wrote.")],
    out: Annotated[str, typer.Option(help="File of results, .json; '' chooses one in the run's folder.")] = "",
    micro_batch: MicroBatch = 64,
    workers: Workers = 1,
    device: Device = "auto",
    weights: Weights = "auto",
    suite: Annotated[
        str | None,
        typer.Option(help="More: knn, fewshot, linear, calibration, real=FILE, corruptions, robustness."),
    ] = None,
    train: Annotated[str, typer.Option(help="Dataset of training features, for knn, fewshot and linear.")] = "",
    class_map: Annotated[
        str,
        typer.Option(help="For a dataset of other classes: a file that maps them to the checkpoint's, or `subset`."),
    ] = "",
    nproc: Nproc = 1,
    debug: Debug = False,
) -> None:
    """Top-1, top-5 and confusion matrix on a dataset, each image counted once; with --suite more.

    Example: `vitscale evaluate runs/a shards/test`
    """
    from vitscale.pipeline.config import require_choice
    from vitscale.pipeline.console import say
    from vitscale.pipeline.data.loader import LoaderSettings
    from vitscale.pipeline.evaluation import stage as evaluation
    from vitscale.pipeline.evaluation import suite_results
    from vitscale.pipeline.mirror import shown

    def work(world: Any) -> None:
        settings = LoaderSettings(micro_batch, workers)
        if suite is not None:
            suite_results.evaluate(checkpoint, dataset, suite, train, weights, out, settings, world, class_map)
            return
        trained, store = evaluation.check_alike(checkpoint, dataset, weights, class_map)
        path = evaluation.place_of_results(out, trained, store, world)
        results = evaluation.evaluate(trained, store, settings, world)
        if world.main:
            for note in trained.notes:
                say(note)
            evaluation.write_results(results, path)
            names = {"top1": "top-1", "top5": "top-5", "map": "mean average precision"}
            shares = [f"{said} {results[name]:.2%}" for name, said in names.items() if results.get(name) is not None]
            say(f"{shown(trained.path)} on {dataset}: {'  '.join(shares)}")
            for line in evaluation.confusion_lines(results):
                say(line)
            say(f"{results['images']:,} images; {evaluation.written(path)}")

    def check() -> None:
        if suite is not None:
            trained, store, _ = suite_results.check(checkpoint, dataset, suite, train, weights, class_map)
        else:
            trained, store = evaluation.check(checkpoint, dataset, weights, class_map)
        evaluation.check_results(out, trained, store)

    require_choice("--device", device, DEVICES)
    require_choice("--weights", weights, WEIGHTS)
    if train and suite is None:
        raise UserError("--train", train, "nothing without --suite", "Add --suite knn, or leave it out.")
    run_ranks(work, check, nproc, device, "--device")


@stage
def compare(
    runs: Annotated[list[str], typer.Argument(help="Runs, checkpoints, exports, or files results.parquet.")],
    metric: Annotated[
        str, typer.Option(help="Numbers such as top1, calibration/ece or 'knn/*', with commas between.")
    ] = "",
    form: Annotated[str, typer.Option("--format", help="text, markdown, latex or json.")] = "text",
    plot: Annotated[str, typer.Option(help="Also draw them with their intervals: .png, .svg or .pdf.")] = "",
    debug: Debug = False,
) -> None:
    """What evaluations left of several checkpoints, as one table with confidence intervals.

    Example: `vitscale compare runs/a runs/b --metric top1,calibration/ece --format markdown`
    """
    from vitscale.pipeline.config import require_choice
    from vitscale.pipeline.console import say
    from vitscale.pipeline.evaluation import compare as comparing

    require_choice("--format", form, tuple(comparing.FORMATS))
    drawn = comparing.check_plot(plot) if plot else None
    found = comparing.compare(runs, metric)
    if drawn:
        comparing.plot(found, drawn)
    say(comparing.FORMATS[form](found))


@stage
def predict(
    trained: Annotated[str, typer.Argument(metavar="EXPORT", help="An export; a run or a checkpoint will do.")],
    files: Annotated[list[str], typer.Argument(help="Image files, and folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes of each image.")] = 3,
    out: Annotated[str, typer.Option(help="Table to write instead of printing: .parquet, .csv or .jsonl.")] = "",
    micro_batch: Annotated[int, typer.Option(min=1, help="With --out: images of one forward.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="With --out: processes that read images.")] = 1,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Class names and probabilities of image files; with --out of any number of them.

    Example: `vitscale predict exported cat.jpg dog.png`
    """
    from vitscale.pipeline.config import require_choice
    from vitscale.pipeline.console import progress, say
    from vitscale.pipeline.distributed import use_cuda
    from vitscale.pipeline.inference import Classifier
    from vitscale.pipeline.prediction import find_files, predict_files, print_files
    from vitscale.pipeline.table_files import check_table
    from vitscale.pipeline.weights import open_trained

    require_choice("--device", device, DEVICES)
    path = check_table(out, "--out") if out else None
    found = open_trained(trained, "EXPORT")
    images = find_files(files, "FILES", found.preprocess, micro_batch, workers)
    for note in found.notes:
        say(note)
    classifier = Classifier(found, "cuda" if use_cuda(device, 1, "--device") else "cpu")
    if path:
        with progress("predicting") as advance:
            tally = predict_files(classifier, images, path, top, advance)
        say(f"{tally}; classes in {path}")
        return
    print_files(classifier, images, top)


@stage
def embed(
    checkpoint: Annotated[str, typer.Argument(help="A run, a checkpoint or an export.")],
    source: Annotated[str, typer.Argument(help="Folder that `vitscale shard` wrote, a folder of images, or an image.")],
    out: Annotated[str, typer.Argument(help="File to write: .parquet.")],
    dtype: Annotated[str, typer.Option(help="Of the features: float32 or float16.")] = "float32",
    micro_batch: MicroBatch = 64,
    workers: Workers = 1,
    device: Device = "auto",
    weights: Weights = "auto",
    nproc: Nproc = 1,
    debug: Debug = False,
) -> None:
    """Features of images, what the classifier of a network sees of each, a row an image.

    Example: `vitscale embed runs/a shards/test features.parquet`
    """
    from vitscale.pipeline import embed as embedding
    from vitscale.pipeline.config import require_choice

    require_choice("--device", device, DEVICES)
    require_choice("--weights", weights, WEIGHTS)
    require_choice("--dtype", dtype, embedding.DTYPES)
    settings = embedding.Settings(dtype, micro_batch, workers, weights)

    def work(world: Any) -> None:
        embedding.embed(checkpoint, source, Path(out), settings, world)

    def check() -> None:
        embedding.check_place(out)
        embedding.check(checkpoint, source, weights, nproc)

    run_ranks(work, check, nproc, device, "--device")


@stage
def export(
    source: Annotated[str, typer.Argument(help="A run, or one of its checkpoints.")],
    out: Annotated[str, typer.Argument(help="New folder for the export.")],
    formats: Annotated[
        str, typer.Option("--format", help="safetensors, hf, timm, onnx, pt2; several with commas between.")
    ] = "safetensors",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="onnx and pt2: images of any size that consists of whole patches.")
    ] = False,
    licence: Annotated[str, typer.Option(help="Stated in the model card, such as apache-2.0.")] = "",
    weights: Weights = "auto",
    debug: Debug = False,
) -> None:
    """Write the network in formats that others read, each read back and compared before it appears.

    Example: `vitscale export runs/a exported --format safetensors,hf,timm`
    """
    from vitscale.pipeline.config import require_choice
    from vitscale.pipeline.console import say
    from vitscale.pipeline.export import export as run

    require_choice("--weights", weights, WEIGHTS)
    chosen = [name.strip() for name in formats.split(",")]
    exported = run(source, out, chosen, weights=weights, dtype=dtype, dynamic_size=dynamic_size, licence=licence)
    for note in exported[0].notes:
        say(note)
    for made in exported:
        checked = f"largest difference of logits from {source}, read by {made.reader}: {made.difference:.1e}"
        say(f"{made.folder}: {', '.join(made.files)}; {checked}")


@stage
def models(
    containing: Annotated[str, typer.Argument(metavar="[PART]", help="Only names with this in them.")] = "",
    sizes: Annotated[bool, typer.Option("--sizes", help="Parameters and multiply-adds for 1,000 classes.")] = False,
    debug: Debug = False,
) -> None:
    """Names for `model.name`; other sides of images and patches follow the same patterns.

    Example: `vitscale models large --sizes`
    """
    from vitscale.model.registry import ModelConfig, list_models
    from vitscale.pipeline.console import say

    names = [name for name in list_models() if containing in name]
    if not names:
        raise UserError("PART", repr(containing), "a part of a name", "`vitscale models` lists all of them.")
    if not sizes:
        say("\n".join(names))
        return
    from vitscale.model.flops import forward_macs, parameters

    for name in names:
        config = ModelConfig(name).resolve(num_classes=1000)
        macs, count = forward_macs(config) / 1e9, parameters(config) / 1e6
        say(f"{name:36} {count:9.2f} M parameters  {macs:9.2f} G multiply-adds  {config.summary}")


def register(app: typer.Typer) -> None:
    """Add the commands to `vitscale`."""
    for command in (evaluate, compare, predict, embed, export, models):
        app.command()(command)
