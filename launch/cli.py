"""The command `vitscale`. Thin: each stage checks its arguments and calls the pipeline.

Only typer is imported here; the rest when a stage runs, so that `vitscale --help` answers at once.
"""

import typer

from vitscale.launch import chain_cli, data_cli, model_cli, train_cli
from vitscale.launch.launch_cli import launch_app
from vitscale.launch.recipe_cli import recipe_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="From a pile of images to a trained, checked and exported Vision Transformer.",
)
app.add_typer(recipe_app, name="recipe")
app.add_typer(launch_app, name="launch")
for commands in (data_cli, train_cli, model_cli):
    commands.register(app)
app.command()(chain_cli.cancel)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
