"""Recipes: YAML files and dotted overrides, composed into settings. The sole omegaconf import."""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vitscale.errors import UserError
from vitscale.pipeline.config import Config, flatten, to_dict

T = TypeVar("T")
Layer = tuple[Path | None, DictConfig]  # settings, and the file that has them; None of a command


def to_yaml(config: Config) -> str:
    """The resolved recipe: every setting, itself a valid recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def load_recipe(recipe: str, overrides: list[str], shipped: Path) -> Config:
    """Compose a recipe (a file, or the name of one in the folder `shipped`) with overrides such as `optim.lr=1e-3`.

    Raises `UserError` for a recipe that is not there, a key that is unknown (with the nearest right one) and a value
    that cannot be.
    """
    layers = _recipe_layers(recipe, shipped, seen=())
    return compose(Config, [*layers, (None, _parse_overrides(overrides))])


def compose(schema: type[T], layers: list[Layer]) -> T:
    """Merge `layers` over the defaults of the dataclass `schema`, the last one winning, and validate.

    Raises `UserError`, which names the file that a setting is from.
    """
    known = flatten(to_dict(schema()))
    merged = OmegaConf.structured(schema)
    for file, layer in layers:
        with _told_of(lambda _, file=file: file):
            _check_keys(OmegaConf.to_container(layer), known)
            merged = OmegaConf.merge(merged, layer)
    with _told_of(lambda setting: _origin(setting, layers)):
        config: Any = OmegaConf.to_object(merged)
        for key, value in flatten(to_dict(config)).items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(key, value, "a finite number", "Change it.")
    return config


def compose_overrides(schema: type[T], overrides: list[str]) -> T:
    """A config dataclass from dotted overrides alone (stages without a recipe)."""
    return compose(schema, [(None, _parse_overrides(overrides))])


@contextmanager
def _told_of(file_of: Callable[[str], Path | None]) -> Iterator[None]:
    """Turn what is raised within into a `UserError` that tells which file a setting is from."""
    try:
        yield
    except (OmegaConfBaseException, UserError) as error:
        if isinstance(error, UserError):
            setting, got, expected, remedy = error.setting, error.got, error.expected, error.remedy
        else:
            setting, got = str(error.full_key or "recipe"), str(error.msg or error).splitlines()[0]
            expected = "a value of the setting's type"
            remedy = "`vitscale recipe show base` prints every setting with its default."
        file = file_of(setting)
        raise UserError(setting, f"{got} in {file}" if file else got, expected, remedy) from error


def _origin(setting: str, layers: list[Layer]) -> Path | None:
    """The file that a setting is from, the last of those that have it; None of the command, and of defaults."""
    found = [file for file, layer in layers if setting in flatten(OmegaConf.to_container(layer))]
    return found[-1] if found else None


def _check_keys(layer: Any, known: dict[str, Any]) -> None:
    sections = {key.rsplit(".", i)[0] for key in known for i in range(1, key.count(".") + 1)}
    free = {key for key, value in known.items() if isinstance(value, dict)}  # passed through as they are
    for key, value in flatten(layer).items():
        if key in known or any(key.startswith(f"{name}.") for name in free):
            continue
        if key in sections:
            raise UserError(key, repr(value), "a section with settings", f"Write {key}.SETTING=VALUE.")
        leaf_of = [name for name in known if name.endswith("." + key.rsplit(".", 1)[-1])]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or leaf_of[:1]
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(
            key, "a setting that does not exist", "a known setting", f"{hint}`vitscale recipe show base` lists them."
        )


def _parse_overrides(overrides: list[str]) -> DictConfig:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(
                "override", repr(override), "SETTING=VALUE, such as optim.lr=1e-3", "Write it without spaces."
            )
    try:
        found = OmegaConf.from_dotlist(overrides)
        for key in [override.removesuffix("=") for override in overrides if override.endswith("=")]:
            if OmegaConf.select(found, key) is None:  # a later one may have given it a value
                OmegaConf.update(found, key, "")
        return found
    except (YAMLError, OmegaConfBaseException) as error:
        message = " ".join(str(error).split())
        raise UserError("override", message, "SETTING=VALUE with a YAML value", "Quote special characters.") from error


def _recipe_layers(recipe: str, shipped: Path, seen: tuple[Path, ...]) -> list[Layer]:
    """The chain of `base:` recipes, the deepest first."""
    path = _find_recipe(recipe, shipped, seen)
    if path in seen:
        chain = " → ".join(p.stem for p in (*seen, path))
        raise UserError("base", chain, "a chain of recipes that ends", "Take one `base:` out.")
    try:
        text = path.read_text()
        layer = OmegaConf.load(io.StringIO(text))
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            "RECIPE", f"{path}: {' '.join(str(error).split())}", "a YAML file", "Mend that line."
        ) from error
    if not isinstance(layer, DictConfig) or not text.strip():
        raise UserError("RECIPE", str(path), "a YAML file of sections such as `model:`", "See `vitscale recipe show`.")
    base = layer.pop("base", None)
    return [*(_recipe_layers(str(base), shipped, (*seen, path)) if base else []), (path, layer)]


def _find_recipe(recipe: str, shipped: Path, seen: tuple[Path, ...]) -> Path:
    beside = [seen[-1].parent / recipe, seen[-1].parent / f"{recipe}.yaml"] if seen else []
    for path in (*beside, Path(recipe), shipped / f"{recipe}.yaml"):
        if path.is_file():
            return path.resolve()
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    near = difflib.get_close_matches(recipe, names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Give the path of a YAML file, or one of these names."
    raise UserError("RECIPE", repr(recipe), f"a file, or one of {', '.join(names)}", hint)
