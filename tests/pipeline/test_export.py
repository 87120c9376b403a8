"""Exports: what each reader gets of them, what they say of themselves, and what is never published."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.peers import import_timm
from vitscale.errors import UserError
from vitscale.model.build import build_network
from vitscale.model.config import ArchitectureConfig, MixerConfig, ResNetConfig, SwinConfig, ViTConfig
from vitscale.pipeline import export as exporter
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.export import export
from vitscale.pipeline.formats import ours
from vitscale.pipeline.formats.check import fixed_images
from vitscale.pipeline.inference import load
from vitscale.pipeline.tensor_file import TensorFile, write_safetensors
from vitscale.pipeline.weights import Tensors, Trained, open_trained

VIT = ViTConfig(img_size=32, patch_size=8, depth=2, width=48, mlp_width=96, heads=4, num_classes=3)
FAMILIES: dict[str, ArchitectureConfig] = {
    "vit": VIT,
    "registers": replace(VIT, registers=2, layer_scale=0.1, mlp="swiglu"),
    "deit": replace(VIT, distilled=True),
    "oblong": replace(VIT, img_size=(32, 72)),
    "map": replace(VIT, pool="map", class_token=False),
    "fourier": replace(VIT, mixing="fourier"),
    "hybrid": replace(VIT, stem=(3, 4, 9), patch_size=16),
    "swin": SwinConfig(32, 4, 4, 16, (2, 2), (2, 4), 3),
    "mixer": MixerConfig(32, 16, 8, 512, 256, 2048, 3),
    "resnet": ResNetConfig(32, (1, 1), 1, 3),
}
RECIPE = {"model": {"name": "vit_tiny_patch8_32"}, "optim": {"lr": 0.002}, "run": {"dir": "/home/someone/runs/a"}}


def trained(config: ArchitectureConfig, tmp_path: Path) -> Path:
    """An export of random weights, none of them zero."""
    network, generator = build_network(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    weights = network.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    origin = {"checkpoint": "/home/someone/runs/a/checkpoints/step-00000005", "step": 5, "recipe": RECIPE}
    found = Trained(tmp_path, config, ["ant", "bee", "cat"], Preprocess(config.img_size, 0.875), origin,
                    lambda: Tensors(shapes, weights.__getitem__))  # fmt: skip
    folder = tmp_path / "source"
    folder.mkdir()
    ours.write(found, folder, torch.float32)
    return folder


def logits(folder: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return load(folder).network(images)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exported_and_read_back(tmp_path: Path, family: str) -> None:
    """Ours exactly; by timm's own loading where timm has it; both are opened again as any weights are."""
    import_timm()
    config = FAMILIES[family]
    images = fixed_images(*config.height_width)
    source = trained(config, tmp_path)
    expected = logits(source, images)
    made = export(str(source), str(tmp_path / "own"))[0]
    assert (made.difference, made.reader) == (0, "vitscale")
    assert torch.equal(logits(tmp_path / "own", images), expected)
    if family in ("fourier", "resnet"):  # timm has no such block, or not of such sizes
        with pytest.raises(UserError, match=r"(in|of) timm"):
            export(str(source), str(tmp_path / "timm"), ["timm"])
        assert not (tmp_path / "timm").exists()
        return
    made = export(str(source), str(tmp_path / "timm"), ["timm"])[0]
    assert made.reader.startswith("timm ")
    assert made.difference <= 1e-5
    assert (logits(tmp_path / "timm", images) - expected).abs().max() <= 1e-5
    assert load(tmp_path / "timm").classes == ["ant", "bee", "cat"]


def test_timm_loads_it_by_its_documented_ways(tmp_path: Path) -> None:
    timm, images = import_timm(), fixed_images(32)
    source = trained(FAMILIES["registers"], tmp_path)
    export(str(source), str(tmp_path / "out"), ["timm"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = {"num_classes": config["num_classes"], **config["model_args"]}
    weights = str(tmp_path / "out" / "model.safetensors")
    by_path = timm.create_model(config["architecture"], checkpoint_path=weights, **settings)
    by_folder = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    for model in (by_path, by_folder):
        with torch.inference_mode():
            assert (model.eval()(images) - logits(source, images)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["vit", "registers", "deit", "swin", "oblong"])
def test_transformers_loads_it_by_its_documented_ways(tmp_path: Path, family: str) -> None:
    transformers, images = pytest.importorskip("transformers"), fixed_images(*FAMILIES[family].height_width)
    source = trained(FAMILIES[family], tmp_path)
    made = export(str(source), str(tmp_path / "out"), ["hf"])[0]
    assert made.reader.startswith("transformers ")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        assert (model(images).logits - logits(source, images)).abs().max() <= 1e-5
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert (logits(tmp_path / "out", images) - logits(source, images)).abs().max() <= 1e-5


def test_the_image_processor_of_transformers_sees_what_we_see(tmp_path: Path) -> None:
    """Both resize by Pillow, but round the cut differently by up to half a pixel."""
    import numpy as np

    transformers = pytest.importorskip("transformers")
    export(str(trained(VIT, tmp_path)), str(tmp_path / "out"), ["hf"])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    y, x = np.mgrid[0:90, 0:120]
    picture = np.stack([x * 2, y * 2, (x + y)], axis=-1).astype(np.uint8)  # slopes, on which half a pixel is little
    got = processor(picture, return_tensors="pt")["pixel_values"][0]
    view = load(tmp_path / "out").preprocess.view(picture)
    expected = torch.from_numpy((view / 255 - 0.5) / 0.5).permute(2, 0, 1).float()
    assert got.shape == expected.shape == (3, 32, 32)
    assert (got - expected).abs().max() <= 2 * 2 * 90 / 37 / 255  # two values a pixel, 90 / 37 pixels to one of ours


def test_several_formats_and_sixteen_bits(tmp_path: Path) -> None:
    source = trained(VIT, tmp_path)
    made = export(str(source), str(tmp_path / "out"), ["safetensors", "hf", "timm"], dtype="bfloat16", licence="mit")
    assert [each.folder for each in made] == [tmp_path / "out" / name for name in ("safetensors", "hf", "timm")]
    assert not list(tmp_path.glob(".*"))
    for each in made:
        file = TensorFile(each.folder / "model.safetensors")
        assert {file.read(name).dtype for name in file.shapes} == {torch.bfloat16}
        told = json.loads((each.folder / "export.json").read_text())
        assert told["max_difference"] == each.difference
        whole = hashlib.sha256((each.folder / "model.safetensors").read_bytes()).hexdigest()
        assert told["sha256 of model.safetensors"] == whole
        card = (each.folder / "README.md").read_text()
        assert whole in card
        assert 'license: "mit"' in card
        assert "vit_tiny_patch8_32" in card
        assert "optim.lr" in card
        assert "/home/someone" not in card
    half = logits(tmp_path / "out" / "hf", fixed_images(32)) - logits(source, fixed_images(32))
    assert 0 < half.abs().max() <= 2**-6  # 8 bits in a network of two blocks


def test_an_export_that_computes_something_else_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = trained(VIT, tmp_path)

    def spoil(path: Path, shapes: Any, read: Any, *more: Any) -> Any:
        changed = {"blocks.1.mlp.fc2.weight", "vit.encoder.layer.1.output.dense.weight"}
        return write_safetensors(path, shapes, lambda name: read(name) * (1.1 if name in changed else 1), *more)

    for name, module in exporter.STREAMED.items():
        with monkeypatch.context() as patched:
            writer = "ours" if module == "ours" else "others"
            patched.setattr(f"vitscale.pipeline.formats.{writer}.write_safetensors", spoil)
            with pytest.raises(UserError, match=f"{name}: logits that differ from the source's by"):
                export(str(source), str(tmp_path / "out"), list(dict.fromkeys(["safetensors", name])))
        assert not (tmp_path / "out").exists()
    assert sorted(os.listdir(tmp_path)) == ["source"]


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"formats": ["safetensor"]}, "--format"),
        ({"dtype": "float64"}, "--dtype"),
        ({"formats": ["hf"], "dynamic_size": True}, "--dynamic-size"),
        ({"out": "source"}, "OUT"),
        ({"source": "nowhere"}, "SOURCE"),
        ({"out": "file/out"}, "OUT"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tmp_path: Path, settings: dict[str, Any], setting: str) -> None:
    source = trained(VIT, tmp_path)
    (tmp_path / "file").write_text("")
    given = {"source": source.name, "out": "out", **settings}
    places = (str(tmp_path / given.pop("source")), str(tmp_path / given.pop("out")))
    with pytest.raises(UserError) as refused:
        export(*places, **given)
    assert refused.value.setting == setting
    assert sorted(os.listdir(tmp_path)) == ["file", "source"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained(VIT, tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitscale.pipeline.tensor_file.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        export(str(source), str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_tensor_files_hold_what_was_written(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "empty": torch.zeros(0, 4), "b": torch.arange(7.0)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        size, sha256 = write_safetensors(tmp_path / "x", shapes, tensors.__getitem__, dtype, {"format": "pt"})
        data = (tmp_path / "x").read_bytes()
        assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())
        from safetensors.torch import load_file

        theirs, file = load_file(tmp_path / "x"), TensorFile(tmp_path / "x")
        assert file.shapes == shapes
        for name, tensor in tensors.items():
            assert torch.equal(theirs[name], tensor.to(dtype))
            assert torch.equal(file.read(name), tensor.to(dtype))
        assert torch.equal(file.read_range("a", 4, 9), tensors["a"].to(dtype).view(-1)[4:9])


def test_the_streamed_source_is_the_whole_one(tmp_path: Path) -> None:
    for number, config in enumerate(FAMILIES.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = open_trained(str(trained(config, folder)), "x")
        images = fixed_images(32)
        with torch.inference_mode():
            expected = found.load()(images)
        got = exporter.streamed_logits(found.model, found.open().read, images)
        assert torch.allclose(got, expected, atol=1e-6)  # of Swin positions are gathered in another memory layout
