"""Where trained weights come from: a run, one of its checkpoints, or an export; told apart by what the folder holds."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vitscale.errors import UserError
from vitscale.model.build import build_network
from vitscale.model.config import from_dict, to_dict
from vitscale.model.interop.maps import Tensors
from vitscale.model.lora import added_up
from vitscale.model.network import Network
from vitscale.pipeline import checkpoint
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.distributed import gather
from vitscale.pipeline.mirror import fetch, names, reading_folder, shown
from vitscale.pipeline.run_folder import best_checkpoint
from vitscale.pipeline.tensor_file import TensorFile

EXPORT_FORMAT = 1
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NETWORK = "model."  # where an objective has its network


@dataclass(frozen=True)
class Trained:
    """A trained network as found: architecture, classes in label order, preprocessing, and its weights by name.

    `origin` says where it came from (path, step and kind of weights); `open()` opens the files of its weights.
    """

    path: Path
    model: Any
    classes: list[str]
    preprocess: Preprocess
    origin: dict[str, Any]
    open: Callable[[], Tensors]

    @property
    def notes(self) -> list[str]:
        """A line for each thing that is not as it was in another project's files."""
        return list(self.origin.get("notes", []))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 tensor of each parameter, one at a time. Raises `UserError` if a file is damaged."""
        found = self.open()
        for name in found.shapes:
            yield name, found.read(name)

    def load(self) -> Network:
        """The network with these weights, in evaluation mode, on the CPU. Raises `UserError` if they do not fit it."""
        with torch.device("meta"):  # no memory for what a file merely claims to hold
            network = build_network(self.model, seed=None)
        try:
            network.load_state_dict(dict(self.tensors()), assign=True)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise UserError("weights", f"{self.path}: {said}", "weights of its architecture", "Use another.") from error
        return network.eval()


def open_trained(path: str, setting: str, weights: str = "auto") -> Trained:
    """Find trained weights at `path`, or URL: a run's folder (its newest sound checkpoint, or the best one where it
    looks for that), a checkpoint, an export, or what another project left (`open_foreign`).

    `weights`: `raw`, their Polyak average (`ema`), or the average where there is one (`auto`). Raises `UserError`
    naming `setting` if there are none, or if they are damaged.
    """
    from vitscale.pipeline.foreign import open_foreign  # which returns what is defined here

    folder = reading_folder(path, setting)
    if folder.name in WEIGHT_FILES and "config.json" in names(folder.parent):
        folder = folder.parent  # which tells what the file does not
    foreign = open_foreign(folder, setting)
    if foreign:
        return foreign
    if (folder / "config.json").is_file():
        return _open_export(folder, setting)
    if (folder / "checkpoints").is_dir():
        newest, warnings = checkpoint.newest_sound(folder / "checkpoints")
        if newest is None:
            found = "; ".join(warnings) or "no checkpoint yet"
            raise UserError(setting, f"{path}: {found}", "a run with a sound checkpoint", "Train it first.")
        folder = best_checkpoint(newest)
    if (folder / "state.json").is_file():
        return _open_checkpoint(folder, setting, weights)
    found = "a folder with none of these" if folder.is_dir() else "no such folder"
    found = "a file of another kind" if folder.is_file() else found
    expected = "a run, a checkpoint, an export, or weights of another project"
    raise UserError(setting, f"{path}: {found}", expected, "Check the path.")


def open_trained_alike(path: str, setting: str, weights: str = "auto") -> Trained:
    """`open_trained` for all ranks together: each opens the folder that rank 0 found, even while a run adds others."""
    return open_trained(gather(shown(open_trained(path, setting, weights).path))[0], setting, weights)


def check_kind(trained: Trained, wanted: str, setting: str) -> None:
    """Raise `UserError`, naming `setting`, where a kind of weights is asked for that there is not, as of an export."""
    found = trained.origin.get("weights")
    if wanted not in ("auto", found):
        got = f"{wanted} for {shown(trained.path)}, where there are {found or 'no two kinds of'} weights"
        raise UserError(setting, got, f"a run, or an export of its {wanted} weights", "Leave it out.")


def describe(model: Any, classes: list[str], preprocess: Preprocess) -> dict[str, Any]:
    """The JSON form that checkpoints and exports share, read back by `open_trained`."""
    return {"model": to_dict(model), "classes": classes, "preprocess": vars(preprocess)}


def _open_checkpoint(folder: Path, setting: str, weights: str) -> Trained:
    state = checkpoint.read_state(folder)
    checkpoint.read_index(folder)
    averaged = bool(state.get("averaged", False)) if weights == "auto" else weights == "ema"
    if averaged and not state.get("averaged"):
        remedy = "Use the raw weights, or train with optim.ema above 0."
        raise UserError("--weights", f"ema of {shown(folder)}, which has none", "raw", remedy)
    if isinstance(state.get("dataset"), dict):
        dataset = state["dataset"].get("fingerprint")
        state["origin"] = {"checkpoint": shown(folder), "step": state.get("step"), "dataset": dataset}
        state["origin"] |= {key: state.get(key) for key in ("examples", "recipe", "versions")}
        state["origin"]["weights"] = "ema" if averaged else "raw"

    def tensors() -> Tensors:
        reader, kind = checkpoint.Reader(folder), checkpoint.EMA if averaged else "weight"
        shapes = {name.removeprefix(NETWORK): s for name, s in reader.shapes.items() if name.startswith(NETWORK)}
        found = Tensors(shapes, lambda name: reader.tensor(NETWORK + name, kind))
        try:
            return added_up(found, _lora_alpha(state))
        except ValueError as error:
            remedy = "The checkpoint is damaged: use another one."
            raise UserError(setting, f"{folder}: {error}", "LoRA's matrices as its recipe has them", remedy) from error

    return _trained(setting, folder, state, tensors)


def _lora_alpha(state: dict[str, Any]) -> float:
    """`finetune.lora_alpha` of a checkpoint's recipe, nan where it says nothing sensible."""
    alpha: Any = state
    for key in ("recipe", "finetune", "lora_alpha"):
        alpha = alpha.get(key) if isinstance(alpha, dict) else None
    return float(alpha) if isinstance(alpha, int | float) else math.nan


def check_export(folder: Path, setting: str) -> None:
    """Raise `UserError` unless the weights in a folder are those that `export.json` there tells of, if there is one."""
    if not {"export.json", "model.safetensors"} <= names(folder):
        return
    fetch(folder / "export.json")
    fetch(folder / "model.safetensors")
    try:
        expected = json.loads((folder / "export.json").read_text())["sha256 of model.safetensors"]
        status = (folder / "model.safetensors").stat()
        found = _sha256(folder / "model.safetensors", status.st_size, status.st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected, found = "", repr(error)
    if found != expected:
        got = f"{shown(folder)}, whose model.safetensors is not what was exported"
        raise UserError(setting, got, "a whole export", "Export it again, or fetch it again.")


@lru_cache(maxsize=8)
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of a file of this size that was changed last at that time: it is opened more than once, and large."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(tensors: Callable[[], Tensors], place: str, setting: str) -> Callable[[], Tensors]:
    """`tensors`, whose reading raises `UserError` for weights that are not finite."""

    def opened() -> Tensors:
        found = tensors()

        def read(name: str) -> Tensor:
            tensor = found.read(name)
            if not tensor.isfinite().all():
                got = f"{place}: {name} with values that are not finite"
                raise UserError(setting, got, "finite weights", "Use an earlier checkpoint.")
            return tensor

        return Tensors(found.shapes, read)

    return opened


def _open_export(folder: Path, setting: str) -> Trained:
    check_export(folder, setting)
    fetch(folder / "model.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["format"] != EXPORT_FORMAT:
            raise ValueError(f"format {config['format']}")
        TensorFile(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            setting, f"{folder}: {error!r}", "a folder written by `vitscale export`", "Export it again."
        ) from error
    return _trained(setting, folder, config, lambda: open_safetensors(folder / "model.safetensors"))


def _trained(
    setting: str,
    folder: Path,
    described: dict,
    tensors: Callable[[], Tensors],
) -> Trained:
    try:
        numbers = {key: tuple(v) if isinstance(v, list) else v for key, v in described["preprocess"].items()}
        model, preprocess = from_dict(described["model"]), Preprocess(**numbers)
        classes, origin = [str(name) for name in described["classes"]], dict(described["origin"])
        if len(classes) != model.num_classes:
            raise ValueError(f"{len(classes)} class names for {model.num_classes} outputs")
        if preprocess.img_size != model.img_size:
            raise ValueError(f"preprocessing to {preprocess.img_size} px for a model of {model.img_size} px")
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            setting, f"{folder}: {error!r}", "architecture, classes and preprocessing", "Use another one."
        ) from error
    return Trained(folder, model, classes, preprocess, origin, finite(tensors, shown(folder), setting))


def open_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, read as float32."""
    file = TensorFile(path)
    return Tensors(file.shapes, lambda name: file.read(name).to(torch.float32))
