"""The commands of data: `vitscale shard`, `index` and `verify`."""

from typing import Annotated, Any

import typer

from vitscale.errors import UserError
from vitscale.launch.options import Debug, Overrides
from vitscale.launch.stage import SettingsCommand, stage


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
    from vitscale.pipeline.console import count, progress, say
    from vitscale.pipeline.recipe import compose_overrides

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


def register(app: typer.Typer) -> None:
    """Add the commands to `vitscale`."""
    app.command(cls=SettingsCommand)(shard)
    for command in (index, verify):
        app.command()(command)
