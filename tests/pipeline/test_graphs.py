"""Networks as graphs, ONNX and PyTorch's: the same logits at any batch and size, and no trace of their making."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vitscale.errors import UserError
from vitscale.model.build import build_network
from vitscale.model.config import ArchitectureConfig, MixerConfig, ResNetConfig, SwinConfig, ViTConfig
from vitscale.model.network import Network
from vitscale.pipeline.formats import capture, onnx, pt2

ROOT = Path(__file__).parents[2]
VIT = ViTConfig(img_size=32, patch_size=8, depth=1, width=48, mlp_width=96, heads=4, num_classes=7)
OPTIONS = replace(VIT, distilled=True, registers=2, mlp="swiglu", qk_norm=True, layer_scale=0.1, pre_norm=True)
ROTARY = replace(VIT, positions="rotary", class_token=False, pool="map", pre_logits=True)
SINCOS = replace(VIT, positions="sincos2d", class_token=False, pool="avg", fc_norm=True, mlp="gelu_tanh")
SWIN = SwinConfig(img_size=56, patch=4, window=3, width=24, depths=(2, 1), heads=(2, 4), num_classes=7)
MIXER = MixerConfig(
    img_size=32, patch_size=8, depth=1, width=48, tokens_width=20, channels_width=96, num_classes=7
)  # fmt: skip
RESNET = ResNetConfig(img_size=64, depths=(1, 1), factor=1, num_classes=7)
STEM = replace(VIT, img_size=64, patch_size=16, stem=(1, 1))

FORMS = pytest.mark.parametrize("form", [onnx, pt2], ids=["onnx", "pt2"])

# Float32 sums in another order: of logits of about 1, blocks of ViTs leave 1e-6, and group norms over many pixels 4e-6.
LOGITS = 1e-5
# Numbers of 11 and 8 bits: of logits of about 2, 2e-3 and 2e-2 were measured.
HALF = {torch.float16: 1e-2, torch.bfloat16: 8e-2}

QUICK = {("fourier", False), ("resnet", False), ("options", True)}
NETWORKS = {
    "aliased": replace(VIT, antialias=False),
    "options": OPTIONS,
    "rotary": ROTARY,
    "sincos2d": SINCOS,
    "fourier": replace(VIT, mixing="fourier", img_size=88, width=180),  # short transforms err little, however made
    "stem": STEM,
    "resnet": RESNET,
    "swin": SWIN,
    "mixer": MIXER,
}
CASES = [
    pytest.param(config, dynamic_size, id=f"{name}-{'dynamic' if dynamic_size else 'fixed'}", marks=marks)
    for name, config in NETWORKS.items()
    for dynamic_size in ((False, True) if config.family in capture.ANY_SIZE else (False,))
    for marks in [[] if (name, dynamic_size) in QUICK else [pytest.mark.slow]]
]


def with_weights(config: ArchitectureConfig) -> Network:
    """A network all of whose weights are noise, heads and norms too."""
    network, generator = build_network(config).eval(), torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data = noise + 1 if "norm" in name and name.endswith("weight") else noise
    return network.requires_grad_(False)


def largest_difference(form: ModuleType, folder: Path, network: Network, rows: int, columns: int, count: int) -> float:
    images = torch.randn(count, 3, rows, columns, generator=torch.Generator().manual_seed(count))
    logits, _ = form.logits(folder, images)
    assert logits.dtype == torch.float32
    return (logits - network(images)).abs().max().item()


@FORMS
@pytest.mark.parametrize(("config", "dynamic_size"), CASES)
def test_logits_are_those_of_the_network(
    form: ModuleType,
    config: ArchitectureConfig,
    dynamic_size: bool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of one, three and five images; of smaller, longer and larger ones than those of training where sizes are free.

    The file names no folder of this machine, no file of ours, and its making puts nothing on the screen.
    """
    network, (side, _) = with_weights(config), config.height_width
    form.write(network, tmp_path, torch.float32, dynamic_size)
    sizes = [(side, side)] * 3
    if dynamic_size:
        step = config.patch_size if config.family == "vit" else 9  # a ResNet takes odd sides as well
        sizes = [(2 * step, side - step), (side, side), (side + 2 * step, side + 3 * step)]
    for count, (rows, columns) in zip((1, 3, 5), sizes, strict=True):
        assert largest_difference(form, tmp_path, network, rows, columns, count) <= LOGITS, (count, rows, columns)
    assert capfd.readouterr() == ("", "")
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    for told in (ROOT, Path.home(), Path(sys.prefix), tmp_path):
        assert len(str(told)) <= 5 or str(told).encode() not in content, told
    assert b".py" not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(onnx, torch.float16), (pt2, torch.float16), (pt2, torch.bfloat16)],
    ids=["onnx-float16", "pt2-float16", "pt2-bfloat16"],
)
def test_weights_and_arithmetic_in_16_bits(form: ModuleType, dtype: torch.dtype, tmp_path: Path) -> None:
    """Float32 images in, float32 logits out, of a network of rounded weights; the network given stays as it is."""
    config = replace(VIT, width=192, mlp_width=384)  # so large that weights are most of a file
    network = with_weights(config)
    for parameter in network.parameters():
        parameter.data = parameter.to(dtype).float()
    form.write(network, tmp_path, dtype, False)
    difference = largest_difference(form, tmp_path, network, 32, 32, 3)
    assert 0 < difference <= HALF[dtype]  # 0 would be float32
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    weights = sum(parameter.numel() for parameter in network.parameters())
    assert (tmp_path / form.FILE).stat().st_size < 3 * weights


def test_graph_of_pytorch_needs_no_code_of_ours(tmp_path: Path) -> None:
    script = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vitscale":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
images = torch.linspace(-1, 1, 2 * 3 * 40 * 24).view(2, 3, 40, 24)
print(json.dumps(torch.export.load(sys.argv[1]).module()(images).tolist()))
"""
    network = with_weights(ROTARY)
    pt2.write(network, tmp_path, torch.float32, True)
    said = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path / pt2.FILE)], capture_output=True, text=True, check=True
    )
    expected = network(torch.linspace(-1, 1, 2 * 3 * 40 * 24).view(2, 3, 40, 24))
    assert (torch.tensor(json.loads(said.stdout)) - expected).abs().max() <= LOGITS


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "LARGEST", 1000)
    network = with_weights(VIT)
    onnx.write(network, tmp_path, torch.float32, False)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert largest_difference(onnx, tmp_path, network, 32, 32, 2) <= LOGITS


def test_onnx_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"without the package onnxscript.*pip install 'vitscale\[onnx\]'"):
        onnx.write(with_weights(VIT), tmp_path, torch.float32, False)
    assert not list(tmp_path.iterdir())


def test_onnx_refuses_bfloat16() -> None:
    with pytest.raises(UserError, match="--dtype: got bfloat16"):
        onnx.check(VIT, torch.bfloat16, False)
    pt2.check(VIT, torch.bfloat16, False)


@FORMS
@pytest.mark.parametrize("config", [MIXER, SWIN], ids=["mixer", "swin"])
def test_networks_tied_to_a_size_are_refused_any(form: ModuleType, config: ArchitectureConfig) -> None:
    form.check(config, torch.float32, False)
    with pytest.raises(UserError, match="--dynamic-size: got a network of the family"):
        form.check(config, torch.float32, True)


def test_what_an_exporter_says_becomes_one_paragraph(capfd: pytest.CaptureFixture[str]) -> None:
    @capture.exporting()
    def export() -> None:
        print("Translating …")
        try:
            raise ValueError("no translation\n\nof this")
        except ValueError as error:
            raise RuntimeError("pages of advice") from error

    with pytest.raises(UserError, match=r"^--format: got ValueError: no translation of this; expected"):
        export()
    assert capfd.readouterr() == ("", "")
