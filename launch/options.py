"""Arguments and options that several commands have."""

from typing import Annotated

import typer

DEVICES, WEIGHTS = ("auto", "cpu", "cuda"), ("auto", "raw", "ema")  # that `Device` and `Weights` may be

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be started, and stop.")]
Nproc = Annotated[int, typer.Option("--nproc", help="Processes on this machine; ignored under torchrun or srun.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SETTING=VALUE]...", help="Settings to change.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
MicroBatch = Annotated[int, typer.Option(min=1, help="Images of one forward on each rank.")]
Workers = Annotated[int, typer.Option(min=0, help="Loader processes of each rank.")]
Force = Annotated[bool, typer.Option("--force", help="Go on from a checkpoint of another recipe, if it fits.")]
Vary = Annotated[list[str] | None, typer.Option("--grid", help="SETTING=[VALUE, …]; may be given again.")]
Test = Annotated[str, typer.Option(help="Dataset for the best settings of --grid, trained on all of data.train.")]
Weights = Annotated[str, typer.Option(help="raw, ema (their Polyak average), or auto: the average if there is one.")]
Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that ships.")]
