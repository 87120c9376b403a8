"""The recipes that ship, each a YAML file that holds its differences from the defaults."""

from pathlib import Path

RECIPES = Path(__file__).parent
