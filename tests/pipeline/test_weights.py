"""Trained weights from outside: read where they are whole, refused in one paragraph where not, never trusted."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitscale.errors import UserError
from vitscale.model.config import ViTConfig
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.export import export as write
from vitscale.pipeline.inference import load
from vitscale.pipeline.weights import describe, open_trained

MODEL = ViTConfig(img_size=16, patch_size=8, depth=1, width=16, mlp_width=32, heads=2, num_classes=3)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export with random weights."""
    return save(tmp_path / "export", MODEL)


def save(folder: Path, model: ViTConfig) -> Path:
    folder.mkdir()
    save_file(VisionTransformer(model, seed=4).state_dict(), folder / "model.safetensors")
    described = describe(model, ["a", "b", "c"], Preprocess(16, 0.9, std=(0.2, 0.3, 0.4)))
    (folder / "config.json").write_text(json.dumps({"format": 1, **described, "origin": {"step": 5}}))
    return folder


def test_an_export_reads_back(export: Path) -> None:
    trained = open_trained(str(export), "x")
    assert (trained.model, trained.classes, trained.origin) == (MODEL, ["a", "b", "c"], {"step": 5})
    assert trained.preprocess == Preprocess(16, 0.9, std=(0.2, 0.3, 0.4))
    expected = VisionTransformer(MODEL, seed=4).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trained.load().state_dict().items())
    assert load(export).classes == ["a", "b", "c"]


def spoil(export: Path, change: dict[str, Any]) -> None:
    """Change keys of config.json, dotted keys reach inside."""
    config = json.loads((export / "config.json").read_text())
    for key, value in change.items():
        place = config
        *path, last = key.split(".")
        for name in path:
            place = place[name]
        place[last] = value
    (export / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"classes": ["a"]},
        {"classes": None},
        {"origin": None},
        {"model": {}},
        {"model.unknown": 1},
        {"model.width": "wide"},
        {"model.heads": 3},
        {"preprocess": [1]},
        {"preprocess.surprise": 1},
        {"preprocess.img_size": 10**9},
        {"model.depth": 10**9},
    ],
)
def test_a_description_that_cannot_be_is_refused(export: Path, change: dict[str, Any]) -> None:
    spoil(export, change)
    with pytest.raises(UserError):
        load(export)


def test_a_size_that_is_only_claimed_costs_no_memory(export: Path) -> None:
    """A width of 2²⁴ would be petabytes."""
    spoil(export, {"model.width": 2**24, "model.mlp_width": 2**24})
    with pytest.raises(UserError, match="size mismatch"):
        load(export)


def test_weights_that_do_not_fit_are_named(export: Path) -> None:
    weights = load_file(export / "model.safetensors")
    del weights["norm.bias"]
    save_file(weights, export / "model.safetensors")
    with pytest.raises(UserError, match=r"norm\.bias"):
        load(export)


def test_weights_that_are_no_numbers_are_refused_where_they_are_read(export: Path) -> None:
    weights = load_file(export / "model.safetensors")
    weights["norm.bias"][3] = torch.inf
    save_file(weights, export / "model.safetensors")
    trained = open_trained(str(export), "x")
    with pytest.raises(UserError, match=r"^x: got .*norm\.bias with values that are not finite"):
        trained.load()
    assert trained.open().read("norm.weight").isfinite().all()
    with pytest.raises(UserError, match="not finite"):
        trained.open().read("norm.bias")


@pytest.mark.parametrize("form", ["safetensors", "timm", "hf"])
def test_an_export_is_what_it_was(tmp_path: Path, form: str) -> None:
    """Its file of weights stands for the folder, and a change of it is seen."""
    model = replace(MODEL, heads=4)  # which weights do not tell
    save(tmp_path / "plain", model)
    write(str(tmp_path / "plain"), str(tmp_path / "out"), [form])
    file = tmp_path / "out" / "model.safetensors"
    assert open_trained(str(file), "x").model.heads == 4
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    for place in (tmp_path / "out", file):
        with pytest.raises(UserError, match=r"^x: got .*, whose model.safetensors is not what was exported"):
            open_trained(str(place), "x")


def test_a_pickle_is_never_opened(export: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    (export / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        load(export)
    assert not (tmp_path / "executed").exists()


def test_an_index_cannot_point_elsewhere_or_claim_what_is_not_there(tmp_path: Path) -> None:
    from vitscale.pipeline import checkpoint

    save_file({"model.a|weight|0": torch.zeros(3)}, tmp_path / "rank-00000.safetensors")
    row = {
        "file": "rank-00000.safetensors",
        "bytes": (tmp_path / "rank-00000.safetensors").stat().st_size,
        "sha256": "",
    }
    for tensors, file in (({"model.a": [2**40]}, row["file"]), ({"model.a": [3]}, "../rank-00000.safetensors")):
        index = {"format": 1, "tensors": tensors, "files": [{**row, "file": file}]}
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"index\.json"):
            checkpoint.Reader(tmp_path)
