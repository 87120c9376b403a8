"""The commands `vitscale recipe …`."""

from typing import Annotated

import typer

from vitscale.launch.options import Debug, Overrides, Recipe
from vitscale.launch.recipes import RECIPES
from vitscale.launch.stage import stage

recipe_app = typer.Typer(no_args_is_help=True, help="Recipes: those that ship, what they resolve to, how they differ.")


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
    from vitscale.pipeline.console import say
    from vitscale.pipeline.recipe import load_recipe, to_yaml

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
    from vitscale.pipeline.console import say
    from vitscale.pipeline.estimate import data_size, estimate, lines
    from vitscale.pipeline.recipe import load_recipe

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
    from vitscale.pipeline.config import flatten, to_dict
    from vitscale.pipeline.console import say
    from vitscale.pipeline.recipe import load_recipe

    one, other = (flatten(to_dict(load_recipe(recipe, [], RECIPES))) for recipe in (first, second))
    differing = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    for key in differing:
        say(f"{key}: {one.get(key)!r} → {other.get(key)!r}")
    if not differing:
        say("no setting differs")
