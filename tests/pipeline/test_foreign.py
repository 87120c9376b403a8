"""Folders and files of other projects: read as they are, refused in one paragraph where damaged, never executed."""

import argparse
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.peers import import_timm
from tests.small_peers import TRANSFORMERS, images, randomised, transformers_network
from vitscale.errors import UserError
from vitscale.model.build import build_network
from vitscale.model.config import MixerConfig, ResNetConfig, SwinConfig, ViTConfig
from vitscale.model.interop import Tensors, View, described, exported
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.foreign import open_foreign
from vitscale.pipeline.weights import Trained

SMALL = ViTConfig(img_size=32, patch_size=8, depth=2, width=128, mlp_width=192, heads=2, num_classes=7)
EXACT = 1e-5  # of logits of order 1, as tests/model/test_interop.py measured


def opened(path: Path) -> Trained:
    found = open_foreign(path, "init_from")
    assert found is not None
    return found


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_foreign(path, "init_from")
    assert error.value.setting == "init_from"
    assert len(str(error.value)) < 800
    return str(error.value)


def state_of(config: Any) -> dict[str, Tensor]:
    return randomised(build_network(config)).state_dict()


def write(folder: Path, layout: str, config: Any, state: dict[str, Tensor], view: View | None = None) -> Path:
    """A folder of transformers or timm, as an export would write it."""
    ours = Tensors({name: tuple(value.shape) for name, value in state.items()}, lambda name: state[name])
    theirs = exported(layout, config, ours)
    folder.mkdir(exist_ok=True)
    save_file(
        {name: theirs.read(name).clone() for name in theirs.shapes}, folder / "model.safetensors", {"format": "pt"}
    )
    for name, content in described(layout, config, list("abcdefg"), view or View()).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def same(trained: Trained, state: dict[str, Tensor]) -> bool:
    found = dict(trained.tensors())
    return found.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in found.items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of transformers."""
    return write(tmp_path / "vit", "hugging_face", SMALL, state_of(SMALL), View(0.8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_transformers_saves(name: str, tmp_path: Path) -> None:
    theirs = transformers_network(name)
    theirs.config.id2label = {number: f"class {number}" for number in range(7)}
    theirs.save_pretrained(tmp_path)
    trained = opened(tmp_path)
    assert trained.classes == [f"class {number}" for number in range(7)]
    with torch.no_grad():
        pixels = images(trained.model.img_size)
        assert (trained.load()(pixels) - theirs(pixels).logits).abs().max() <= EXACT


def test_transformers_loads_a_folder_of_ours(folder: Path) -> None:
    import transformers

    theirs, told = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    trained = opened(folder)
    pixels = images(32)
    with torch.no_grad():
        assert (trained.load()(pixels) - theirs.eval()(pixels).logits).abs().max() <= EXACT
    assert trained.preprocess == Preprocess(32, 0.8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)  # the side before the cut
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    middle = (image[4:36, 4:36] / 255 - np.array(trained.preprocess.mean)) / np.array(trained.preprocess.std)
    assert np.abs(expected.numpy().transpose(1, 2, 0) - middle).max() <= 1e-5


def shards(folder: Path, suffix: str = ".safetensors") -> dict[str, Any]:
    """Split the weights of a folder of transformers in two; returns the index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {name: f"part-{number % 2}{suffix}" for number, name in enumerate(sorted(state))}
    for file in set(placed.values()):
        part = {name: value for name, value in state.items() if placed[name] == file}
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
    stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    index = {"metadata": {}, "weight_map": placed}
    (folder / f"{stem}.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_in_several_files(folder: Path, suffix: str) -> None:
    expected = dict(opened(folder).tensors())
    index = shards(folder, suffix)
    assert same(opened(folder), expected)
    (folder / index["weight_map"]["classifier.bias"]).unlink()
    assert "without part-" in refused(folder)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.py", ".bin", 3])
def test_an_index_does_not_lead_elsewhere(folder: Path, name: Any) -> None:
    expected = load_file(folder / "model.safetensors")
    index = shards(folder)
    save_file(expected, folder.parent / "stolen.safetensors")
    index["weight_map"]["classifier.bias"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "files beside it" in refused(folder)


def test_half_precision_is_read_as_float32(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    expected = dict(opened(folder).tensors())
    save_file({name: value.to(torch.bfloat16) for name, value in state.items()}, folder / "model.safetensors")
    found = dict(opened(folder).tensors())
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], value.bfloat16().float()) for name, value in expected.items())


CONFIGS: dict[str, Any] = {
    "vit": SMALL,
    "dinov2": ViTConfig(32, 8, 2, 128, 256, 2, 7, registers=4, layer_scale=1e-5, mlp="swiglu"),
    "siglip": ViTConfig(32, 8, 2, 128, 192, 2, 7, pool="map", class_token=False, mlp="gelu_tanh"),
    "clip": ViTConfig(32, 8, 2, 128, 192, 2, 7, pre_norm=True, norm_eps=1e-5),
    "mae": ViTConfig(32, 8, 2, 128, 192, 2, 7, pool="avg", fc_norm=True),
    "deit": ViTConfig(32, 8, 2, 128, 192, 2, 7, distilled=True),
    "swin": SwinConfig(48, 4, 3, 24, (2, 2), (2, 4), 7),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_timm_loads_a_folder_of_ours_and_we_read_it(name: str, tmp_path: Path) -> None:
    config, state = CONFIGS[name], state_of(CONFIGS[name])
    folder = write(tmp_path / "a", "timm", config, state, View(0.9, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    theirs = import_timm().create_model(f"local-dir:{folder}", pretrained=True).eval()
    trained = opened(folder)
    assert trained.model == config
    assert trained.classes == list("abcdefg")
    assert trained.preprocess == Preprocess(config.img_size, 0.9, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    if name not in ("dinov2", "clip"):  # whose class token, or bias of patches, is part of something else there
        assert same(trained, state)
    pixels = images(config.img_size)
    with torch.no_grad():
        ours = build_network(config)
        ours.load_state_dict(state)
        assert (theirs(pixels) - ours.eval()(pixels)).abs().max() <= EXACT
        assert (theirs(pixels) - trained.load()(pixels)).abs().max() <= EXACT


def test_what_timm_saves(tmp_path: Path) -> None:
    timm = import_timm()
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 2, "img_size": 32, "num_classes": 3}
    theirs = randomised(timm.create_model("vit_base_patch32_siglip_gap_256", **sizes))
    timm.models.save_for_hf(theirs, tmp_path, model_config={"label_names": ["x", "y", "z"]})  # of torch.save
    trained = opened(tmp_path)
    assert (trained.model.mlp, trained.model.pool, trained.classes) == ("gelu_tanh", "avg", ["x", "y", "z"])
    with torch.no_grad():
        assert (trained.load()(images(32)) - theirs(images(32))).abs().max() <= EXACT


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "architecture"),
        ({"architecture": "resnet50"}, "architecture"),
        ({"architecture": "vit_base_patch16_rope_ape_224"}, "architecture"),
        ({"model_args": {"act_layer": "relu"}}, "act_layer"),
        ({"model_args": {"pool_include_prefix": True}}, "pool_include_prefix"),
        ({"global_pool": "max", "model_args": {}}, "global_pool"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "std"),
        ({"model_args": {"num_heads": 3}}, "model.heads"),
        ({"model_args": 3}, "TypeError"),
    ],
)
def test_what_is_not_ours_of_timm_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = write(tmp_path / "a", "timm", SMALL, state_of(SMALL))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert said in refused(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bert"}, "model_type bert"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"num_channels": 1}, "num_channels"),
        ({"image_size": [32, 64, 3]}, "image_size"),
        ({"image_size": [32, 64]}, "is (1, 17, 128), not (1, 33, 128)"),
        ({"image_size": 40}, "is (1, 17, 128), not (1, 26, 128)"),
        ({"num_hidden_layers": 3}, "vit.encoder.layer.2.attention.attention.key.bias is missing"),
        ({"num_hidden_layers": 10**9}, "depth"),
        ({"hidden_size": 10**9}, "width"),
        ({"hidden_size": "wide"}, "TypeError"),
        ({"layer_norm_eps": None}, "TypeError"),
        ({"layer_norm_eps": "x" * 100_000}, "TypeError"),
        ({"hidden_act": "x" * 100_000}, "hidden_act"),
        ({"id2label": {"0": "a"}}, "classifier.bias is (7,), not (1,)"),
        ({"id2label": {"x": "a"}}, "ValueError"),
    ],
)
def test_what_is_not_ours_of_transformers_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert said in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0" * 100, "[" * 100_000, '{"model_type": "vit"}', " " * (17 << 20)])
def test_a_garbled_description_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder)


@pytest.mark.parametrize("content", [b"", b"\0" * 50, struct.pack("<Q", 1 << 40), None])
def test_damaged_weights_are_refused(folder: Path, content: bytes | None) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    refused(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "without weights" in refused(folder)


def test_what_is_not_foreign_is_left_alone(tmp_path: Path) -> None:
    assert open_foreign(tmp_path, "x") is None
    assert open_foreign(tmp_path / "missing.pth", "x") is None
    (tmp_path / "config.json").write_text('{"format": 1, "model": {}}')
    assert open_foreign(tmp_path, "x") is None
    (tmp_path / "config.json").write_text("{}")
    assert open_foreign(tmp_path, "x") is None


def legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "args": argparse.Namespace(lr=1), "epoch": 3},  # DeiT
        lambda state: {  # DINO
            "student": {"module.backbone.patch_embed.proj.weight": torch.zeros(1)},
            "teacher": {f"backbone.{n}": v for n, v in state.items()} | {"head.mlp.0.weight": torch.zeros(3, 3)},
        },
        lambda state: {"module": {f"model.{n}": v for n, v in state.items()}, "loss": torch.zeros(1)},
        lambda state: {f"_orig_mod.{n}": torch.nn.Parameter(v) for n, v in state.items()},
    ],
)
@pytest.mark.parametrize("save", [torch.save, legacy])
def test_what_training_scripts_save(tmp_path: Path, wrap: Callable[[dict], Any], save: Callable[..., None]) -> None:
    state = state_of(SMALL)
    save(wrap(state), tmp_path / "a.pth")
    trained = opened(tmp_path / "a.pth")
    assert trained.model == SMALL
    assert same(trained, state)
    assert trained.classes == list("0123456")
    assert trained.preprocess == Preprocess(32, 0.875)
    assert any("heads" in note for note in trained.origin["notes"])


def test_a_backbone_of_dino(tmp_path: Path) -> None:
    state = {name: value for name, value in state_of(SMALL).items() if not name.startswith("head")}
    torch.save(state, tmp_path / "dino.pth")
    trained = opened(tmp_path / "dino.pth")
    assert trained.classes == ["0"]
    assert any("no classifier" in note for note in trained.origin["notes"])
    assert same(trained, state | {"head.weight": torch.zeros(1, 128), "head.bias": torch.zeros(1)})


def test_a_checkpoint_of_deepspeed(tmp_path: Path) -> None:
    state, folder = state_of(SMALL), tmp_path / "run" / "global_step7"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("global_step7")
    saved = {"module": {f"model.{n}": v.bfloat16() for n, v in state.items()}, "ds_version": "0.18", "optimizer": None}
    torch.save(saved, folder / "mp_rank_00_model_states.pt")
    for path in (tmp_path / "run", folder, folder / "mp_rank_00_model_states.pt"):
        assert same(opened(path), {name: value.bfloat16().float() for name, value in state.items()})
    (folder / "mp_rank_00_model_states.pt").rename(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert "in parts" in refused(tmp_path / "run")
    (tmp_path / "run" / "latest").write_text("../../elsewhere")
    assert open_foreign(tmp_path / "run", "x") is None


class Malicious:
    """An object that makes a file as it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("save", [torch.save, legacy, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("name", ["a.pth", "pytorch_model.bin"])
def test_nothing_is_executed(folder: Path, tmp_path: Path, save: Callable[..., None], name: str) -> None:
    target = tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    save({"model": state_of(SMALL), "more": Malicious(target)}, folder / name)
    said = refused(folder if name == "pytorch_model.bin" else folder / name)
    assert not target.exists()
    assert "nothing was run" in said or "Unsupported" in said
    assert "weights_only" not in said  # the advice to trust it
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists()  # else this would have tested nothing


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04", bytes(1000), None])
def test_a_damaged_pickle_is_refused(tmp_path: Path, content: bytes | None) -> None:
    torch.save(state_of(SMALL), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2] if content is None else content)
    refused(tmp_path / "a.pth")


def cyclic() -> dict[str, Any]:
    state: dict[str, Any] = {}
    state["model"] = state
    return state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: {**state, "head.weight": torch.zeros(1).expand(1 << 40, 128)}, "has 4 bytes"),
        (lambda state: {**state, "norm.bias": torch.zeros(128, device="meta")}, "no plain tensor"),
        (lambda state: {**state, "norm.bias": torch.eye(128).to_sparse()}, "no plain tensor"),
        (lambda state: {**state, "surprise": torch.zeros(1)}, "surprise is unexpected"),
        (lambda state: {"nothing": 1}, "no state dict"),
        (lambda state: 3, "no state dict"),
        (lambda state: cyclic(), "no state dict"),
        (lambda state: {"a": torch.zeros(2)}, "no patch_embed.proj.weight"),
        (lambda state: {**state, "pos_embed": torch.zeros(1, 8, 128)}, "positions of 8 tokens"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, change: Callable[[dict], Any], said: str) -> None:
    torch.save(change(state_of(SMALL)), tmp_path / "a.pth")
    assert said in refused(tmp_path / "a.pth")


def arrays() -> dict[str, Any]:
    """A small network as vision_transformer's files have it."""
    config = ViTConfig(32, 8, 2, 128, 192, 2, 7, mlp="gelu_tanh")
    state = state_of(config)
    ours = Tensors({name: tuple(value.shape) for name, value in state.items()}, lambda name: state[name])
    theirs = exported("google", config, ours)
    return {name: theirs.read(name).numpy() for name in theirs.shapes}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_of_arrays(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", **arrays())
    trained = opened(tmp_path / "a.npz")
    assert trained.model == ViTConfig(32, 8, 2, 128, 192, 2, 7, mlp="gelu_tanh")
    assert same(trained, state_of(trained.model))
    as_bfloat16 = {
        name: torch.from_numpy(value).bfloat16().view(torch.int16).numpy().view("V2")
        for name, value in arrays().items()
    }
    save(tmp_path / "b.npz", **as_bfloat16)
    assert same(opened(tmp_path / "b.npz"), {name: v.bfloat16().float() for name, v in state_of(trained.model).items()})


def test_of_arrays_one_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", **arrays())
    trained, read = opened(tmp_path / "a.npz"), list[str]()
    monkeypatch.setattr(
        "vitscale.pipeline.foreign_files._read_npy", lambda archive, name: read.append(name) or torch.zeros(128, 7)
    )
    trained.open().read("head.weight")
    assert read == ["head/kernel.npy"]


@pytest.mark.parametrize("spoil", ["objects", "text", "bomb", "claim", "truncated", "garbage", "no header"])
def test_arrays_that_are_not_what_they_claim_are_refused(tmp_path: Path, spoil: str) -> None:
    target, path, whole = tmp_path / "executed", tmp_path / "a.npz", arrays()
    if spoil == "objects":
        whole["head/kernel"] = np.array([Malicious(target)], dtype=object)
    elif spoil == "text":
        whole["head/kernel"] = np.array(["a"])
    elif spoil == "bomb":  # 64 MB of zeros in 64 kB
        whole = {name: np.zeros(shape) for name, shape in [("embedding/kernel", (8, 8, 3, 128)), ("cls", (1 << 23,))]}
    np.savez_compressed(path, **whole)
    if spoil == "claim":
        with zipfile.ZipFile(path, "a") as archive:
            claim = (
                b"\x93NUMPY\x01\x00v\x00"
                + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117)
                + b"\n"
            )
            archive.writestr("huge.npy", claim)
    elif spoil == "no header":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("x.npy", b"123")
    elif spoil in ("truncated", "garbage"):
        path.write_bytes(path.read_bytes()[:-5000] if spoil == "truncated" else b"PK\x03\x04" + bytes(999))
    said = refused(path)
    assert not target.exists()
    assert {"objects": "object", "text": "not of numbers", "bomb": "bytes of arrays", "claim": "bytes"}.get(
        spoil, ""
    ) in said


def test_an_array_that_is_damaged_within_is_refused_as_it_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays())
    content = bytearray((tmp_path / "a.npz").read_bytes())
    at = content.index(arrays()["embedding/kernel"].tobytes()[:64])
    content[at] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="CRC"):
        dict(opened(tmp_path / "a.npz").tensors())


@pytest.mark.parametrize(
    ("config", "lead"),
    [(ResNetConfig(224, (1, 1), 1, 5), "resnet/"), (MixerConfig(16, 4, 1, 24, 12, 40, 5), "opt/target/")],
)
def test_other_files_of_arrays(tmp_path: Path, config: Any, lead: str) -> None:
    state = state_of(config)
    ours = Tensors({name: tuple(value.shape) for name, value in state.items()}, lambda name: state[name])
    theirs = exported("google", config, ours)
    written: dict[str, Any] = {f"{lead}{name}": theirs.read(name).numpy() for name in theirs.shapes}
    np.savez(tmp_path / "a.npz", **written)
    trained = opened(tmp_path / "a.npz")
    assert trained.model == config
    assert same(trained, state)
    assert any("GELU" in note for note in trained.origin["notes"]) == (config.family == "mixer")
