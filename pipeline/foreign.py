"""Trained weights of other projects: transformers, timm, the original ViT, DeiT and DINO, DeepSpeed's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitscale.errors import UserError
from vitscale.model.config import ArchitectureConfig, ViTConfig
from vitscale.model.interop import Tensors, View, google, hugging_face_config, imported, timm, timm_config
from vitscale.model.interop.shapes import infer
from vitscale.pipeline import weights
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.foreign_files import SUFFIXES, open_file, open_shards, read_json
from vitscale.pipeline.mirror import fetch, names, shown

UNTOLD = View(0.875)  # for files that say nothing of preprocessing
LONGEST = 400  # characters told of what a file holds
ASSUMED = "nothing is said of preprocessing: values in [-1, 1] and a crop of 0.875 are assumed"
EXACT = "GELU is exact here; Google's Mixers were trained with its approximation by tanh"
Described = tuple[ArchitectureConfig, list[str] | None, View, list[str]]  # the last are notes


def open_foreign(path: Path, setting: str) -> weights.Trained | None:
    """Trained weights at `path` if they are another project's, else None.

    A folder of transformers or timm (`config.json` and weights), a file of tensors (safetensors, `.npz`, or one of
    `torch.save`, of which nothing is executed), or a checkpoint of DeepSpeed whose weights are whole. `origin` of what
    is returned has `notes`, a line for each thing that is not as it was. Raises `UserError`, naming `setting`, for what
    is damaged, or of an architecture that we do not have.
    """
    path = _deepspeed(path, setting) or path
    if path.suffix in SUFFIXES and not path.is_dir():
        fetch(path)
        if path.is_file():
            return _open(path, setting, *_bare(path, setting))
    if not path.is_dir() or not (path / "config.json").is_file():
        return None
    described = read_json(path / "config.json", setting)
    if "format" in described:
        return None  # ours
    if "architecture" in described:
        return _open(path, setting, "timm", lambda: _weights(path, setting), lambda found: _timm(described, found))
    if "model_type" in described:
        more = read_json(path / "preprocessor_config.json", setting) if _has(path, "preprocessor_config.json") else None
        return _open(
            path, setting, "hugging_face", lambda: _weights(path, setting), lambda _: _hugging_face(described, more)
        )
    return None


def _open(
    path: Path, setting: str, layout: str, theirs: Callable[[], Tensors], describe: Callable[[Tensors], Described]
) -> weights.Trained:
    """Weights in one of `LAYOUTS` as `theirs` opens them, and as `describe` describes them by their shapes."""
    opened = theirs()
    try:
        config, classes, view, notes = describe(opened)
        found = imported(layout, config, opened)
    except UserError as error:
        said = str(error.got) if error.setting == setting else f"{error.setting} {error.got}"
        raise UserError(setting, f"{shown(path)}: {said[:LONGEST]}", error.expected, error.remedy) from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError) as error:
        expected = "a description of an architecture and its preprocessing"
        said = repr(error)[:LONGEST]
        raise UserError(setting, f"{shown(path)}: {said}", expected, "Fetch it again, or use another.") from error
    if found.config.num_classes != len(classes or ()):
        classes = [str(number) for number in range(found.config.num_classes)]
    preprocess = Preprocess(found.config.img_size, view.crop, view.mean, view.std)
    origin = {"source": shown(path), "layout": layout, "notes": [*notes, *(f"the file {n}" for n in found.notes)]}

    def open_ours() -> Tensors:
        return imported(layout, config, theirs()).tensors

    opened = weights.finite(open_ours, shown(path), setting)
    return weights.Trained(path, found.config, classes or [], preprocess, origin, opened)


def _hugging_face(described: dict[str, Any], more: dict[str, Any] | None) -> Described:
    config, classes = hugging_face_config.read_config(described)
    view, notes = (UNTOLD, [ASSUMED]) if more is None else hugging_face_config.read_view(more)
    return config, classes, view, notes


def _timm(described: dict[str, Any], found: Tensors) -> Described:
    config, classes, view = timm_config.read_config(described, timm.familiar(found).shapes)
    return config, classes, view, []


def _bare(path: Path, setting: str) -> tuple[str, Callable[[], Tensors], Callable[[Tensors], Described]]:
    """A file without a description: what `_open` takes."""

    def describe(found: Tensors) -> Described:
        if path.suffix == ".npz":
            config = google.read_config(google.familiar(found).shapes)
            return config, None, UNTOLD, [ASSUMED, *([EXACT] if config.family == "mixer" else [])]
        config = infer(timm.familiar(found).shapes)
        heads = [f"nothing is said of heads: {config.heads} are assumed"] if isinstance(config, ViTConfig) else []
        return config, None, UNTOLD, [ASSUMED, *heads]

    return "google" if path.suffix == ".npz" else "timm", lambda: open_file(path, setting), describe


def _weights(folder: Path, setting: str) -> Tensors:
    """The tensors in a folder of transformers or timm."""
    name = next((name for name in weights.WEIGHT_FILES if _has(folder, name)), None)
    if name is None:
        expected = " or ".join(weights.WEIGHT_FILES)
        raise UserError(setting, f"{shown(folder)} without weights", expected, "Fetch the folder again.")
    weights.check_export(folder, setting)
    fetch(folder / name)
    return open_shards(folder / name, setting) if name.endswith(".json") else open_file(folder / name, setting)


def _has(folder: Path, name: str) -> bool:
    found = name in names(folder)
    if found and name.endswith(".json"):
        fetch(folder / name)
    return found


def _deepspeed(path: Path, setting: str) -> Path | None:
    """The file with the weights of a checkpoint of DeepSpeed, or of the newest in a folder of several; None if `path`
    is none. Raises `UserError` if its weights are in parts."""
    found = names(path) if path.is_dir() else set()
    if "latest" in found and "config.json" not in found:
        fetch(path / "latest")
        tag = (path / "latest").read_text("utf-8", "replace")[:256].strip()
        if re.fullmatch(r"[\w-][\w.-]*", tag) and (path / tag).is_dir():
            path, found = path / tag, names(path / tag)
    whole = sorted(name for name in found if re.fullmatch(r"mp_rank_\d+_model_states\.pt", name))
    if len(whole) > 1 or (not whole and any(re.fullmatch(r"zero_pp_rank_\w+_model_states\.pt", n) for n in found)):
        remedy = "Join them by DeepSpeed's zero_to_fp32.py, which it saves with them, and name the file it makes."
        raise UserError(setting, f"{shown(path)}, whose weights are in parts", "whole ones", remedy)
    return path / whole[0] if whole else None
