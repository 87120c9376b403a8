"""The command `vitscale`. Thin: each stage checks its arguments and calls the pipeline.

Only typer is imported here; the rest when a stage runs, so that `vitscale --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vitscale.errors import UserError
from vitscale.launch import chain_cli
from vitscale.launch.launch_cli import launch_app
from vitscale.launch.stage import SettingsCommand, run_ranks, stage

RECIPES = Path(__file__).parent / "recipes"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="From a pile of images to a trained, checked and exported Vision Transformer.",
)
recipe_app = typer.Typer(no_args_is_help=True, help="Recipes: those that ship, what they resolve to, how they differ.")
app.add_typer(recipe_app, name="recipe")
app.add_typer(launch_app, name="launch")
app.command()(chain_cli.cancel)


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Nproc = Annotated[int, typer.Option("--nproc", help="Processes on this machine; ignored under torchrun or srun.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SETTING=VALUE]...", help="Settings to change.")]
Force = Annotated[bool, typer.Option("--force", help="Go on from a checkpoint of another recipe, if it fits.")]
Weights = Annotated[str, typer.Option(help="raw, ema (their Polyak average), or auto: the average if there is one.")]
Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that ships.")]


@app.command(cls=SettingsCommand)
@stage
def shard(
    source: Annotated[str, typer.Argument(help="Images: folders, tables, Parquet, tars, IDX, URLs; see the README.")],
    out: Annotated[str, typer.Argument(help="New folder for the shards; a path, or a URL such as s3://bucket/train.")],
    overrides: Overrides = None,
    append: Annotated[bool, typer.Option("--append", help="Add to the dataset in OUT; its shards stay.")] = False,
    one_stage: Annotated[str, typer.Option("--stage", help="scan, match, dedup, plan, write or records alone.")] = "",
    part: Annotated[str, typer.Option("--part", help="Part I/N of the stage, as one of N processes.")] = "",
    publish: Annotated[bool, typer.Option("--publish", help="Publish what the parts of all stages left.")] = False,
    debug: Debug = False,
) -> None:
    """Turn images into webdataset shards, every image checked by a full decode; run again, it goes on.

    Example: `vitscale shard photos/train shards/train split=train`
    """
    from vitscale.data_prep.config import ShardConfig
    from vitscale.data_prep.shard import Part
    from vitscale.data_prep.shard import shard as run
    from vitscale.pipeline.config import compose_overrides
    from vitscale.pipeline.console import count, progress, say

    if publish and one_stage:
        raise UserError(
            "--publish", f"--stage {one_stage} beside it", "one of the two", "Run them one after the other."
        )
    config = compose_overrides(ShardConfig, overrides or [])
    stage_name, which = "publish" if publish else one_stage, Part.parse(part) if part else None
    with progress("sharding") as advance:
        report = _preparing(advance)
        made = run(source, out, config, report, stage=stage_name, part=which, append=append)
    if not made:
        say(f"{one_stage} {part}".strip() + ": done")
        return
    if made["already_complete"]:
        say(f"{out} holds these images already")
    size = f"{made['bytes'] / 1e6:,.1f} MB in {count(made['shards'], 'shard')}"
    say(f"{out}: {made['samples']:,} images of {len(made['classes']):,} classes, {size}")
    removed = {**made["rejected"], **{name: made[name] for name in ("duplicate", "leaked") if made[name]}}
    if removed:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in removed.items())
        say(f"not kept: {reasons}; each named in {out}/rejected.csv")
    empty = [name for name, count in zip(made["classes"], made["class_counts"], strict=True) if not count]
    if empty:
        say(f"warning: no image is kept of {len(empty):,} class{'es' * (len(empty) != 1)}: {', '.join(empty[:20])}")
    say(f"what it looks like: {out}/card.html")


def _preparing(advance: Any) -> Any:
    """Progress of data preparation: tasks done, and images and bytes a second."""
    import time

    begun: dict[str, float] = {}

    def report(stage_name: str, done: int, total: int, tally: Any) -> None:
        seconds = max(time.monotonic() - begun.setdefault(stage_name, time.monotonic()), 1e-3)
        rate = f"{tally.images / seconds:,.0f} images/s, {tally.bytes / 1e6 / seconds:,.0f} MB/s"
        advance(done, total, f"{stage_name}: {rate}, {tally.rejected:,} rejected")

    return report


@app.command()
@stage
def index(
    folder: Annotated[str, typer.Argument(help="Folder of webdataset tars, of any maker.")],
    split: Annotated[str, typer.Option(help="Name of the split.")] = "train",
    check: Annotated[str, typer.Option(help="full decodes every image, header looks at headers alone.")] = "full",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one for each core.")] = 0,
    debug: Debug = False,
) -> None:
    """Make a dataset of webdataset tars where they are, without rewriting them.

    Example: `vitscale index downloaded/tars`
    """
    from vitscale.data_prep.index import index as run
    from vitscale.pipeline.console import count, progress, say

    with progress("indexing") as advance:
        made = run(folder, split, check, workers, _preparing(advance))
    say(f"{folder}: {made['samples']:,} images of {len(made['classes']):,} classes in {count(made['shards'], 'shard')}")


@app.command()
@stage
def verify(
    dataset: Annotated[str, typer.Argument(help="Folder that `vitscale shard` wrote.")],
    part: Annotated[str, typer.Option("--part", help="Part I/N of the shards, as one of N processes.")] = "",
    debug: Debug = False,
) -> None:
    """Check a dataset: checksums, members, labels, and every image by a full decode.

    Example: `vitscale verify shards/train`
    """
    from vitscale.data_prep.shard import Part
    from vitscale.data_prep.verify import verify as run
    from vitscale.pipeline.console import count, progress, say

    which = Part.parse(part) if part else Part(1, 1)
    with progress("verifying") as advance:
        found = run(dataset, lambda step, done, total: advance(done, total), part=(which.number, which.of))
    for problem in found.problems:
        say(problem)
    verdict = count(len(found.problems), "problem") if found.problems else "sound"
    say(f"{dataset}: {count(found.shards, 'shard')}, {found.samples:,} images: {verdict}")
    if found.problems:
        raise typer.Exit(1)


@app.command(cls=SettingsCommand)
@stage
def pretrain(
    recipe: Recipe, overrides: Overrides = None, nproc: Nproc = 1, force: Force = False, debug: Debug = False
) -> None:
    """Train from random weights; run again, it goes on from the last checkpoint.

    Example: `vitscale pretrain digits-demo data.train=shards/train run.dir=runs/a --nproc 2`
    """
    _train("pretrain", recipe, overrides or [], nproc, force)


@app.command(cls=SettingsCommand)
@stage
def finetune(
    recipe: Recipe, overrides: Overrides = None, nproc: Nproc = 1, force: Force = False, debug: Debug = False
) -> None:
    """Train from a checkpoint or an export, at any resolution and for any classes.

    Example: `vitscale finetune digits-demo-finetune init_from=runs/a data.train=shards/train run.dir=runs/b`
    """
    _train("finetune", recipe, overrides or [], nproc, force)


def _train(name: str, recipe: str, overrides: list[str], nproc: int, force: bool) -> None:
    from vitscale.pipeline.config import load_recipe

    config = load_recipe(recipe, overrides, RECIPES)
    if name == "finetune" and not config.init_from:
        raise UserError(
            "init_from", "nothing", "a run, a checkpoint or an export", "Add init_from=PATH to the command."
        )
    if name == "pretrain" and config.init_from:
        raise UserError("init_from", config.init_from, "nothing in pretraining", "Use `vitscale finetune`.")

    def work(world: Any) -> None:
        from vitscale.pipeline.planner import plan
        from vitscale.pipeline.train import train

        train(plan(config, world.size, check_files=world.main, force=force), world)

    def check() -> None:
        from vitscale.pipeline.planner import plan

        plan(config, nproc, force=force)

    run_ranks(work, check, nproc, config.engine.device, "engine.device")


@app.command()
@stage
def replay(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    incident: Annotated[str, typer.Argument(help="Name of an incident, a folder in its incidents/.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    nproc: Nproc = 1,
    debug: Debug = False,
) -> None:
    """Repeat a step that was not taken, and say which module first gave a value that is not finite.

    Example: `vitscale replay runs/a step-00000123-batch-00000123`
    """
    from vitscale.pipeline.config import load_recipe, require_choice
    from vitscale.pipeline.mirror import reading_folder

    require_choice("--device", device, ("auto", "cpu", "cuda"))
    recipe = reading_folder(run, "RUN") / "recipe.yaml"
    if not recipe.is_file():
        raise UserError("RUN", f"{run}, which has no recipe.yaml", "the folder of a run", "Check the path.")
    config = load_recipe(str(recipe), [f"engine.device={device}", f"run.dir={run}"], RECIPES)

    def work(world: Any) -> None:
        from vitscale.pipeline.replay import replay

        replay(config, incident, world)

    def check() -> None:
        from vitscale.pipeline.replay import find

        find(config, incident)

    run_ranks(work, check, nproc, device, "--device")


@app.command()
@stage
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A run, a checkpoint or an export.")],
    dataset: Annotated[str, typer.Argument(help="Folder that `vitscale shard` wrote.")],
    out: Annotated[str, typer.Option(help="File of results; '' chooses one in the run's folder.")] = "",
    micro_batch: Annotated[int, typer.Option(min=1, help="Images of one forward on each rank.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes of each rank.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    weights: Weights = "auto",
    suite: Annotated[
        str,
        typer.Option(help="More: knn, fewshot, linear, calibration, real=FILE, corruptions, robustness."),
    ] = "",
    train: Annotated[str, typer.Option(help="Dataset of training features, for knn, fewshot and linear.")] = "",
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
        if suite:
            settings = LoaderSettings(micro_batch, workers)
            suite_results.evaluate(checkpoint, dataset, suite, train, weights, out, settings, world)
            return
        trained, store = evaluation.check_alike(checkpoint, dataset, weights)
        path = Path(out) if out else evaluation.results_path(trained, store)
        results = evaluation.evaluate(trained, store, LoaderSettings(micro_batch, workers), world)
        if world.main:
            for note in trained.notes:
                say(note)
            evaluation.write_results(results, path)
            names = {"top1": "top-1", "top5": "top-5", "map": "mean average precision"}
            shares = [f"{said} {results[name]:.2%}" for name, said in names.items() if results.get(name) is not None]
            say(f"{shown(trained.path)} on {dataset}: {'  '.join(shares)}")
            for line in evaluation.confusion_lines(results):
                say(line)
            say(f"{results['images']:,} images; all of this in {shown(path)}")

    def check() -> None:
        if suite:
            suite_results.check(checkpoint, dataset, suite, train, weights)
        else:
            evaluation.check(checkpoint, dataset, weights)

    require_choice("--device", device, ("auto", "cpu", "cuda"))
    require_choice("--weights", weights, ("auto", "raw", "ema"))
    if train and not suite:
        raise UserError("--train", train, "nothing without --suite", "Add --suite knn, or leave it out.")
    run_ranks(work, check, nproc, device, "--device")


@app.command()
@stage
def predict(
    trained: Annotated[str, typer.Argument(metavar="EXPORT", help="An export; a run or a checkpoint will do.")],
    files: Annotated[list[str], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to print for each image.")] = 3,
    debug: Debug = False,
) -> None:
    """Class names and probabilities of image files.

    Example: `vitscale predict exported cat.jpg dog.png`
    """
    from vitscale.pipeline.console import say
    from vitscale.pipeline.inference import Classifier
    from vitscale.pipeline.weights import open_trained

    found = open_trained(trained, "EXPORT")
    for note in found.notes:
        say(note)
    classifier = Classifier(found)
    for file, prediction in zip(files, classifier.predict(files, top), strict=True):
        rows = zip(prediction.classes, prediction.probabilities, strict=True)
        say(f"{file}: " + "  ".join(f"{name} {probability:.1%}" for name, probability in rows))


@app.command()
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

    require_choice("--weights", weights, ("auto", "raw", "ema"))
    chosen = [name.strip() for name in formats.split(",")]
    exported = run(source, out, chosen, weights=weights, dtype=dtype, dynamic_size=dynamic_size, licence=licence)
    for note in exported[0].notes:
        say(note)
    for made in exported:
        checked = f"largest difference of logits from {source}, read by {made.reader}: {made.difference:.1e}"
        say(f"{made.folder}: {', '.join(made.files)}; {checked}")


@app.command()
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


@app.command()
@stage
def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders, in the order to show them.")],
    out: Annotated[str, typer.Option(help="File to write; '' is report.html in the last run's folder.")] = "",
    commands: Annotated[str, typer.Option(help="Text file of the commands that led here, to be shown.")] = "",
    debug: Debug = False,
) -> None:
    """One self-contained HTML page: curves, confusion matrices, sample predictions, commands and versions.

    Example: `vitscale report runs/a runs/b --out report.html`
    """
    from vitscale.pipeline.console import say
    from vitscale.pipeline.mirror import reading_folder, shown
    from vitscale.pipeline.report import write_report

    folders = [reading_folder(run, "RUNS") for run in runs]
    path = Path(out) if out else folders[-1] / "report.html"
    write_report(folders, path, commands)
    say(shown(path))


@app.command()
@stage
def status(
    run: Annotated[str, typer.Argument(help="Folder of a run, going on or over; or a chain's file or logs.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """How a run is doing: progress, speed and what bounds it, last checkpoint, incidents. Does not disturb it.

    Of a chain of jobs: its stages. Example: `vitscale status runs/a`
    """
    from vitscale.launch.chain_status import is_chain
    from vitscale.pipeline import status as pipeline

    if is_chain(run):
        chain_cli.status(chain_or_folder=run, as_json=as_json, debug=debug)
        return
    found = pipeline.read_status(run)
    if as_json:
        print(pipeline.as_json(found))
    else:
        pipeline.show(found)


@app.command()
@stage
def audit(
    run_a: Annotated[str, typer.Argument(help="Folder of a run.")],
    run_b: Annotated[str, typer.Argument(help="Folder of another.")],
    debug: Debug = False,
) -> None:
    """Whether two runs saw the same images, step by step, and if not, where they first differ (exit code 1).

    Example: `vitscale audit runs/a runs/b`
    """
    from vitscale.pipeline.audit import compare
    from vitscale.pipeline.console import count, say

    found = compare(run_a, run_b)
    say(f"{count(found.steps, 'step')} in common, {found.first} to {found.last}")
    if found.differs is None:
        say("the same images in each of them")
    else:
        say(f"the images of step {found.differs} differ")
        raise typer.Exit(1)


@app.command()
@stage
def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SETTING=VALUE]...", help="data.train, run.dir and engine.device.")
    ] = None,
    nproc: Nproc = 1,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds for ranks to arrive, and for each thing tried.")
    ] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Whether all ranks meet, see the same, and are as fast as each other; names a node that is odd (exit code 1).

    Under `srun`, one task a GPU or a node. Example: `srun vitscale doctor data.train=shards/train run.dir=runs/a`
    """
    import os

    from vitscale.launch.local import LAUNCHER, check_processes, launch, under_launcher
    from vitscale.pipeline.config import Config, compose_overrides

    config = compose_overrides(Config, overrides or [])
    if not under_launcher():
        check_processes(nproc, config.engine.device, "engine.device")
        if nproc > 1:
            raise typer.Exit(launch(sys.argv[1:], nproc))
    from vitscale.launch.doctor import examine
    from vitscale.pipeline.distributed import die_with_parent

    if LAUNCHER in os.environ:
        die_with_parent(int(os.environ[LAUNCHER]))
    examine(config, timeout, as_json)


@recipe_app.command("list")
@stage
def recipe_list(debug: Debug = False) -> None:
    """Names of the recipes that ship.

    Example: `vitscale recipe list`
    """
    from vitscale.pipeline.console import say

    for path in sorted(RECIPES.glob("*.yaml")):
        first = path.read_text().splitlines()[0].removeprefix("# ")
        say(f"{path.stem:24} {first}")


@recipe_app.command("show")
@stage
def recipe_show(recipe: Recipe, overrides: Overrides = None, debug: Debug = False) -> None:
    """Every setting of a recipe as it resolves: itself a valid recipe.

    Example: `vitscale recipe show digits-demo optim.lr=1e-4`
    """
    from vitscale.pipeline.config import load_recipe, to_yaml
    from vitscale.pipeline.console import say

    say(to_yaml(load_recipe(recipe, overrides or [], RECIPES)).rstrip())


@recipe_app.command("plan")
@stage
def recipe_plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all, one rank each.")] = 8,
    images: Annotated[int, typer.Option(min=0, help="Training images; 0: those of data.train.")] = 0,
    classes: Annotated[int, typer.Option(min=0, help="Classes; 0: those of data.train.")] = 0,
    gpu_memory: Annotated[float, typer.Option(min=0.001, help="GB of each GPU.")] = 80.0,
    peak: Annotated[float, typer.Option(min=0.0, help="TFLOP/s of a GPU's matrix products; 0: an H200's.")] = 0.0,
    mfu: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of that which training reaches.")] = 0.4,
    debug: Debug = False,
) -> None:
    """What a recipe comes to: batches, steps, memory, arithmetic. Needs no GPU; exit code 1 if it does not fit.

    Example: `vitscale recipe plan vit-l16-i21k-pretrain --gpus 64 --images 14197122 --classes 21843`
    """
    from vitscale.pipeline.config import load_recipe
    from vitscale.pipeline.console import say
    from vitscale.pipeline.estimate import data_size, estimate, lines

    config = load_recipe(recipe, overrides or [], RECIPES)
    found = estimate(config, gpus, *data_size(config, images, classes), gpu_memory * 1e9, peak)
    for line in lines(found, mfu):
        say(line)
    if not found.fits:
        raise typer.Exit(1)


@recipe_app.command("diff")
@stage
def recipe_diff(first: Recipe, second: Recipe, debug: Debug = False) -> None:
    """Settings in which two resolved recipes differ.

    Example: `vitscale recipe diff digits-demo runs/a/recipe.yaml`
    """
    from vitscale.pipeline.config import flatten, load_recipe, to_dict
    from vitscale.pipeline.console import say

    one, other = (flatten(to_dict(load_recipe(recipe, [], RECIPES))) for recipe in (first, second))
    differing = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    for key in differing:
        say(f"{key}: {one.get(key)!r} → {other.get(key)!r}")
    if not differing:
        say("no setting differs")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
