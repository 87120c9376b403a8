"""State dicts of transformers, timm and Google ↔ ours: what they compute is the same, and nothing is read in advance.

Tolerances: for the same weights, logits of order 1 differed from transformers' and timm's by at most 7e-7 in float32
(1.2e-6 behind the ResNet of a hybrid), gradients by 7e-7 of their largest: rounding of another order of operations.
1e-5, and 1e-4 for gradients, leave room for other kernels; a wrong map is off by 1e-2 and more.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.peers import import_timm
from tests.small_peers import TRANSFORMERS, gradients, images, randomised, transformers_network
from vitscale.errors import UserError
from vitscale.model.build import build_network
from vitscale.model.config import MixerConfig, ResNetConfig, SwinConfig, ViTConfig
from vitscale.model.embed import resize_pos_embed
from vitscale.model.interop import Tensors, View, described, exported, google, hugging_face, imported, timm_config
from vitscale.model.interop.hugging_face_config import read_config, read_view
from vitscale.model.interop.maps import made, our_shapes
from vitscale.model.interop.shapes import infer

SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "depth": 2, "width": 48, "mlp_width": 96, "heads": 4, "num_classes": 7,
}  # fmt: skip
SMALL = ViTConfig(**SIZES)


def tensors(state: dict[str, Tensor]) -> Tensors:
    return Tensors({name: tuple(value.shape) for name, value in state.items()}, lambda name: state[name])


def read_all(found: Tensors) -> dict[str, Tensor]:
    """All of them; each has the shape that was told before."""
    state = {name: found.read(name) for name in found.shapes}
    assert {name: tuple(value.shape) for name, value in state.items()} == found.shapes
    return state


def network(config: Any, weights: Tensors) -> nn.Module:
    ours = build_network(config)
    ours.load_state_dict(read_all(weights))
    return ours.eval()


def assert_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-4 of the largest of a tensor. Those of biases of keys are zero, and so rounding of others."""
    rounding = 1e-6 * max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        largest = gradient.abs().max()
        assert (got[name] - gradient).abs().max() <= 1e-4 * largest + rounding, name


@pytest.fixture(scope="module", params=TRANSFORMERS)
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """One of `TRANSFORMERS`: its name, itself, and our network with its weights."""
    theirs = transformers_network(request.param)
    config, _ = read_config({**theirs.config.to_dict(), "architectures": [type(theirs).__name__]})  # as if saved
    found = imported("hugging_face", config, tensors(theirs.state_dict()))
    assert found.notes == []
    return request.param, theirs, network(found.config, found.tensors)


def test_a_network_of_transformers_is_ours(pair: tuple[str, Any, Any]) -> None:
    """Logits and the gradients of all weights, from the names of a network in memory."""
    name, theirs, ours = pair
    pixels = images(ours.config.img_size)
    expected, got = theirs(pixels).logits, ours(pixels)
    assert expected.abs().max() > 0.5
    assert (got - expected).abs().max() <= 1e-5
    recipe = hugging_face.layout(ours.config, their_gradients := gradients(theirs, expected))
    back = made(recipe.ours, hugging_face.familiar(tensors(their_gradients)))
    found = gradients(ours, got)
    if name == "deit":
        del found["reg_token"]  # the sum of two of their tensors: its gradient is no sum of theirs
    assert_gradients(found, {weight: back.read(weight) for weight in found})


@pytest.mark.parametrize("size", [(96,), (148,), (96, 128)])
def test_it_is_at_another_resolution(pair: tuple[str, Any, Any], size: tuple[int, ...]) -> None:
    """A grid of 14×14 as one of 24×24 (224 px → 384 at patches of 16), 37×37 (→ 518 at 14) and 24×32."""
    name, theirs, ours = pair
    size = tuple(side // 24 * 24 for side in size) if name == "swin" else size
    options = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        assert (theirs(images(*size), **options).logits - ours(images(*size))).abs().max() <= 1e-5


def test_transformers_loads_what_we_write(pair: tuple[str, Any, Any]) -> None:
    """A DeiT without a teacher is written as a DINOv2, whose registers have no positions."""
    import transformers

    name, theirs, ours = pair
    written = exported("hugging_face", ours.config, tensors(ours.state_dict()))
    description = described("hugging_face", ours.config, list("abcdefg"), View())["config.json"]
    assert description["architectures"][0] == ("Dinov2With" * (name == "deit") + type(theirs).__name__).replace(
        "Dinov2WithDeiT", "Dinov2WithRegisters"
    )
    kind = getattr(transformers, description["architectures"][0])
    again, told = kind.from_pretrained(
        None, config=kind.config_class(**description), state_dict=read_all(written), output_loading_info=True
    )
    assert not any(told.values()), told
    assert again.config.id2label[6] == "g"
    with torch.no_grad():
        pixels = images(ours.config.img_size)
        assert (again.eval()(pixels).logits - ours(pixels)).abs().max() <= 1e-5
    if name != "deit":
        assert read_config(description)[0] == ours.config
        classic = imported("hugging_face", ours.config, written)  # the names of files
        assert all(torch.equal(ours.state_dict()[n], value) for n, value in read_all(classic.tensors).items())


def test_a_model_without_a_classifier_gets_one_of_zeros() -> None:
    theirs = transformers_network("vit")
    config: Any = read_config(theirs.config.to_dict())[0]
    found = imported("hugging_face", config, tensors(theirs.vit.state_dict()))
    assert found.config == replace(config, num_classes=1)
    assert "has no classifier" in found.notes[0]
    ours: Any = network(found.config, found.tensors)
    pixels = images(56)
    with torch.no_grad():
        assert ours(pixels).abs().max() == 0
        expected = theirs.vit(pixels).last_hidden_state
        assert (ours.forward_features(pixels) - expected).abs().max() <= 1e-5


def test_a_classifier_on_token_and_patches_is_dropped() -> None:
    theirs = randomised(transformers_network("dinov2"))  # all of its weights
    config, _ = read_config(theirs.config.to_dict())
    found = imported("hugging_face", config, tensors(theirs.state_dict()))
    assert found.config.num_classes == 1
    assert "class token and the average" in found.notes[0]


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"positions": "rotary", "heads": 12}, "model.positions"),
        ({"pre_logits": True}, "model.pre_logits"),
        ({"qk_norm": True}, "model.qk_norm"),
        ({"pool": "map"}, "model.pool"),
        ({"mixing": "fourier"}, "model.mixing"),
        ({"stem": (1, 1, 1), "patch_size": 16}, "model.stem"),
        ({"distilled": True, "registers": 2}, "model.registers"),
        ({"registers": 2, "mlp_width": 100}, "model.mlp_width"),
    ],
)
def test_what_transformers_does_not_have_is_refused(options: dict, setting: str) -> None:
    with pytest.raises(UserError) as error:
        described("hugging_face", replace(SMALL, **options), list("abcdefg"), View())
    assert error.value.setting == setting


def test_preprocessing_of_transformers() -> None:
    written = described("hugging_face", SMALL, list("abcdefg"), View(0.8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert read_view(written["preprocessor_config.json"]) == (View(0.8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), [])
    deit = {"size": 256, "crop_size": 224, "do_center_crop": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert read_view(deit)[0] == View(0.875)
    view, notes = read_view({"size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert view == View(1.0)
    assert "squeeze" in notes[0]
    assert read_view({"do_normalize": False})[0] == View(1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="std"):
        read_view({"image_std": [0.5, 0.5, 0.0]})


# of timm's class: what differs from SIZES, and in its own arguments what does not follow from ours
TIMM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "registers": ({"registers": 3}, {"no_embed_class": True}),
    "registers with positions": ({"registers": 3}, {}),
    "class token without position": ({}, {"no_embed_class": True}),
    "average": ({"pool": "avg", "fc_norm": True, "class_token": False}, {}),
    "average of norms": ({"pool": "avg"}, {"fc_norm": False}),
    "attention pooling": ({"pool": "map", "class_token": False}, {}),
    "attention pooling, registers": ({"pool": "map", "class_token": False, "registers": 2}, {}),
    "norms of queries and keys": ({"qk_norm": True, "layer_scale": 1e-5}, {}),
    "gated": ({"mlp": "swiglu", "registers": 4, "layer_scale": 1e-5}, {"no_embed_class": True}),
    "norm first": ({"pre_norm": True, "norm_eps": 1e-5}, {}),
    "norm first, registers": ({"pre_norm": True, "registers": 2}, {"no_embed_class": True}),
    "distilled": ({"distilled": True}, {}),
    "approximate": ({"mlp": "gelu_tanh"}, {}),
    "oblong": ({"img_size": (32, 72)}, {}),  # 4×9 patches, which are as many as a square's
}


RESHAPED = ("cls_token", "reg_token", "pos_embed")  # sums or parts of ours: their gradients are no sums or parts


def timm_network(config: ViTConfig, **options: Any) -> Any:
    timm = import_timm()
    kind = timm.models.deit.VisionTransformerDistilled if config.distilled else timm.models.VisionTransformer
    gated = config.mlp == "swiglu"
    layers: dict[str, Any] = {"norm_layer": partial(nn.LayerNorm, eps=config.norm_eps), "act_layer": "gelu"}
    layers |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": "silu"} if gated else {}
    layers |= {"act_layer": "gelu_tanh"} if config.mlp == "gelu_tanh" else {}
    if config.stem:
        layers["embed_layer"] = partial(timm.layers.HybridEmbed, backbone=timm_stem(config.stem))
    return kind(
        img_size=config.img_size, patch_size=config.patch_size // config.stem_stride, embed_dim=config.width,
        depth=config.depth, num_heads=config.heads, mlp_ratio=config.mlp_width / config.width * (1 + gated),
        num_classes=config.num_classes, class_token=config.class_token, reg_tokens=config.registers,
        global_pool=config.pool, qk_norm=config.qk_norm, init_values=config.layer_scale or None,
        pre_norm=config.pre_norm, dynamic_img_size=not config.stem, **layers, **options,
    )  # fmt: skip


def timm_stem(depths: tuple[int, ...]) -> Any:
    timm = import_timm()
    convolution = partial(timm.layers.StdConv2dSame, eps=1e-8)
    return timm.models.ResNetV2(
        depths, num_classes=0, global_pool="", preact=False, stem_type="same", conv_layer=convolution
    )


@pytest.mark.parametrize("case", TIMM)
def test_a_network_of_timm_is_ours_and_back(case: str) -> None:
    """At the trained resolution and at others, and the gradients of what both have."""
    config = replace(SMALL, **TIMM[case][0])
    theirs = randomised(timm_network(config, **TIMM[case][1]))
    shapes = {n: tuple(value.shape) for n, value in theirs.state_dict().items()}
    inferred: Any = infer(shapes, config.height_width, heads=4)
    assert replace(inferred, mlp=config.mlp, pool=config.pool, norm_eps=config.norm_eps) == config
    found = imported("timm", config, tensors(theirs.state_dict()))
    assert found.notes == []
    ours = network(config, found.tensors)
    with torch.no_grad():
        assert (ours(images(56, 40)) - theirs(images(56, 40))).abs().max() <= 1e-5
    expected, got = theirs(images(*config.height_width)), ours(images(*config.height_width))
    assert (got - expected).abs().max() <= 1e-5
    expected_gradients = gradients(theirs, expected)
    assert_gradients(gradients(ours, got), {n: g for n, g in expected_gradients.items() if n not in RESHAPED})
    written = read_all(exported("timm", config, tensors(ours.state_dict())))
    again = timm_network(config, fc_norm=config.fc_norm, no_embed_class=config.registers > 0)
    again.load_state_dict(written)
    with torch.no_grad():
        assert (again.eval()(images(32)) - ours(images(32))).abs().max() <= 1e-5


def test_positions_that_are_fixed_are_written_as_learned_ones() -> None:
    config = replace(SMALL, positions="sincos2d")
    ours = randomised(build_network(config))
    theirs = timm_network(SMALL)
    theirs.load_state_dict(read_all(exported("timm", config, tensors(ours.state_dict()))))
    with torch.no_grad():
        assert (theirs.eval()(images(32)) - ours(images(32))).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "deit_base_distilled_patch16_224",
        "vit_large_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "vit_giant_patch14_reg4_dinov2",
        "vit_base_r50_s16_224",
        "swin_tiny_patch4_window7_224",
        "mixer_b16_224",
        "resnetv2_50x1_bit",
    ],
)
def test_all_weights_of_timms_networks_have_a_place(name: str) -> None:
    """Names and shapes of the real ones, and the architecture that they tell, on the meta device."""
    with torch.device("meta"):
        theirs = import_timm().create_model(name, num_classes=1000)
    shapes = {n: tuple(value.shape) for n, value in theirs.state_dict().items()}
    pool = {"global_pool": theirs.global_pool} if hasattr(theirs, "attn_pool") else {}
    config, _, view = timm_config.read_config({"architecture": name, **pool}, shapes)
    found = imported("timm", config, Tensors(shapes, lambda _: pytest.fail("read")))
    assert found.notes == []
    assert found.tensors.shapes == our_shapes(config)
    if isinstance(config, ViTConfig):
        side = 518 if "dinov2" in name else 224
        assert (config.depth, config.heads, config.img_size) == (
            len(theirs.blocks),
            theirs.blocks[0].attn.num_heads,
            side,
        )
    assert view == View(0.875, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, stem=(2, 2, 2, 2), img_size=64, patch_size=32),
        replace(SMALL, stem=(3, 4, 9), img_size=64, patch_size=16),
        MixerConfig(64, 32, 8, 512, 256, 2048, 7),
        ResNetConfig(64, (3, 4, 23, 3), 3, 7),
        SwinConfig(48, 4, 3, 24, (2, 2), (2, 4), 7, mlp_ratio=2.0),
        replace(SMALL, mlp="swiglu", mlp_width=100, registers=2),
        replace(SMALL, img_size=(32, 72)),
        SwinConfig((48, 72), 4, 3, 24, (2, 2), (2, 4), 7),
        MixerConfig((64, 96), 32, 8, 512, 256, 2048, 7),
    ],
)
def test_timm_makes_what_we_describe(config: Any) -> None:
    """Names and shapes, on the meta device."""
    description = described("timm", config, list("abcdefg"), View())["config.json"]
    with torch.device("meta"):
        theirs = import_timm().create_model(
            description["architecture"], **{"num_classes": 7, "global_pool": description["global_pool"]}
            | description["model_args"]
        )  # fmt: skip
    written = exported("timm", config, Tensors(our_shapes(config), lambda _: pytest.fail("read")))
    assert {name: tuple(value.shape) for name, value in theirs.state_dict().items()} == written.shapes


@pytest.mark.parametrize("grid", [(24, 24), (37, 37), (24, 32)])
def test_positions_are_interpolated_as_in_timm(grid: tuple[int, int]) -> None:
    """Of 14×14. Sums of products in float32, taken in another order, of numbers of order 0.1 differed by 1e-7."""
    places = torch.randn(1, 197, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    expected = import_timm().layers.resample_abs_pos_embed(places, list(grid), num_prefix_tokens=1)
    assert (resize_pos_embed(places, (14, 14), grid) - expected).abs().max() <= 1e-6


def published_vit(config: ViTConfig, big_vision: bool = False) -> dict[str, np.ndarray]:
    """Random arrays as vision_transformer's files have them, or big_vision's."""
    D, H, E, W = config.width, config.heads, config.width // config.heads, config.mlp_width
    P, channels, arrays = config.patch_size // config.stem_stride, 3, dict[str, np.ndarray]()
    generator = np.random.default_rng(0)

    def put(name: str, *shape: int, around: float = 0.0) -> None:
        arrays[name] = (generator.normal(size=shape) * 0.1 + around).astype(np.float32)

    def norm(name: str, *shape: int) -> None:
        put(f"{name}/scale", *shape, around=1.0)
        put(f"{name}/bias", *shape)

    def dense(name: str, *shape: int) -> None:
        put(f"{name}/kernel", *shape)
        put(f"{name}/bias", shape[-1])

    def attention(name: str) -> None:
        for part in ("query", "key", "value"):
            put(f"{name}/{part}/kernel", D, H, E)
            put(f"{name}/{part}/bias", H, E)
        put(f"{name}/out/kernel", H, E, D)
        put(f"{name}/out/bias", D)

    for stage, depth in enumerate(config.stem):
        channels, before = 256 << stage, 64 if not stage else 128 << stage
        middle = channels // 4
        for unit in range(depth):
            lead = f"block{stage + 1}/unit{unit + 1}"
            if not unit:
                put(f"{lead}/conv_proj/kernel", 1, 1, before, channels)
                norm(f"{lead}/gn_proj", 1, 1, 1, channels)
            for number, shape in enumerate([(1, 1, before, middle), (3, 3, middle, middle), (1, 1, middle, channels)]):
                put(f"{lead}/conv{number + 1}/kernel", *shape)
                norm(f"{lead}/gn{number + 1}", 1, 1, 1, shape[-1])
            before = channels
    if config.stem:
        put("conv_root/kernel", 7, 7, 3, 64)
        norm("gn_root", 1, 1, 1, 64)
    dense("embedding", P, P, channels, D)
    if config.class_token:
        put("cls", 1, 1, D)
    prefix = config.class_token and not big_vision
    put("pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding", 1, config.patches + prefix, D)
    for i in range(config.depth):
        lead, (mha, second, mlp) = f"Transformer/encoderblock_{i}", (0, 1, 0) if big_vision else (1, 2, 3)
        norm(f"{lead}/LayerNorm_0", D)
        attention(f"{lead}/MultiHeadDotProductAttention_{mha}")
        norm(f"{lead}/LayerNorm_{second}", D)
        dense(f"{lead}/MlpBlock_{mlp}/Dense_0", D, W)
        dense(f"{lead}/MlpBlock_{mlp}/Dense_1", W, D)
    norm("Transformer/encoder_norm", D)
    if config.pool == "map":
        put("MAPHead_0/probe", 1, 1, D)
        attention("MAPHead_0/MultiHeadDotProductAttention_0")
        norm("MAPHead_0/LayerNorm_0", D)
        dense("MAPHead_0/MlpBlock_0/Dense_0", D, W)
        dense("MAPHead_0/MlpBlock_0/Dense_1", W, D)
    dense("head", D, config.num_classes)
    return {f"params/{name}": value for name, value in arrays.items()} if big_vision else arrays


def from_arrays(arrays: dict[str, np.ndarray]) -> Tensors:
    return tensors({name: torch.from_numpy(value) for name, value in arrays.items()})


@pytest.mark.parametrize(
    ("options", "big_vision"),
    [
        ({}, False),
        ({"pool": "avg", "class_token": False}, False),
        ({"stem": (1, 1, 1), "img_size": 64, "patch_size": 16}, False),
        ({"pool": "map", "class_token": False}, True),
        ({}, True),
    ],
)
def test_google_s_files_are_the_same_here_and_in_timm(options: dict, big_vision: bool, tmp_path: Path) -> None:
    config = replace(SMALL, mlp="gelu_tanh", **options)
    arrays = published_vit(config, big_vision)
    theirs = timm_network(
        config, fc_norm=False, **({"no_embed_class": True} if big_vision and config.class_token else {})
    )
    np.savez(tmp_path / "a.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        theirs.load_pretrained(str(tmp_path / "a.npz"))
        theirs.eval()
    plain = google.familiar(from_arrays(arrays))
    assert google.read_config(plain.shapes) == config
    ours = network(config, imported("google", config, from_arrays(arrays)).tensors)
    pixels = images(config.height_width[0])
    with torch.no_grad():
        expected = theirs(pixels)
        assert expected.abs().max() > 0.1
        assert (ours(pixels) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max().item())
    if big_vision and config.class_token:
        return  # written as vision_transformer's
    written = read_all(exported("google", config, tensors(ours.state_dict())))
    assert {name: value.shape for name, value in written.items()} == plain.shapes
    assert all(torch.equal(value, plain.read(name)) for name, value in written.items())


def test_google_s_hidden_layer_before_the_classifier() -> None:
    """timm leaves it out; in `vit_jax` it is tanh of a dense layer."""
    config = replace(SMALL, mlp="gelu_tanh", pre_logits=True)
    kernel, bias = np.random.default_rng(1).normal(size=(2, 48, 48)).astype(np.float32)
    arrays = published_vit(config) | {"pre_logits/kernel": kernel, "pre_logits/bias": bias[0]}
    assert google.read_config(from_arrays(arrays).shapes) == config
    ours: Any = network(config, imported("google", config, from_arrays(arrays)).tensors)
    with torch.no_grad():
        features = ours.forward_features(images(32))
        hidden = np.tanh(features[:, 0].numpy() @ kernel + bias[0])
        expected = hidden @ arrays["head/kernel"] + arrays["head/bias"]
        assert np.abs(ours(images(32)).numpy() - expected).max() <= 1e-5


def test_google_s_mixer() -> None:
    """Against its formula in numpy: x + MLP(norm(x)ᵀ)ᵀ, then x + MLP(norm(x)); exact GELU, as timm has it."""
    config = MixerConfig(
        img_size=16, patch_size=4, depth=1, width=24, tokens_width=12, channels_width=40, num_classes=5
    )
    generator = np.random.default_rng(0)
    shapes = {
        "stem": (4, 4, 3, 24),
        "MixerBlock_0/token_mixing/Dense_0": (16, 12),
        "MixerBlock_0/token_mixing/Dense_1": (12, 16),
        "MixerBlock_0/channel_mixing/Dense_0": (24, 40),
        "MixerBlock_0/channel_mixing/Dense_1": (40, 24),
        "head": (24, 5),
    }
    arrays = {}
    for name, shape in shapes.items():
        arrays[f"{name}/kernel"] = generator.normal(size=shape).astype(np.float32) * 0.3
        arrays[f"{name}/bias"] = generator.normal(size=shape[-1:]).astype(np.float32)
    for name in ("MixerBlock_0/LayerNorm_0", "MixerBlock_0/LayerNorm_1", "pre_head_layer_norm"):
        arrays[f"{name}/scale"] = generator.normal(size=24).astype(np.float32)
        arrays[f"{name}/bias"] = generator.normal(size=24).astype(np.float32)
    assert google.read_config({name: value.shape for name, value in arrays.items()}) == config
    ours = network(config, imported("google", config, from_arrays(arrays)).tensors)

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ torch.from_numpy(arrays[f"{name}/kernel"]) + torch.from_numpy(arrays[f"{name}/bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        scale, bias = (torch.from_numpy(arrays[f"{name}/{kind}"]) for kind in ("scale", "bias"))
        return nn.functional.layer_norm(x, (24,), scale, bias, 1e-6)

    def mlp(x: Tensor, name: str) -> Tensor:
        return dense(nn.functional.gelu(dense(x, f"{name}/Dense_0")), f"{name}/Dense_1")

    pixels = images(16)
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(1, 2)  # (B, N, P, P, C)
    stem = torch.from_numpy(arrays["stem/kernel"])
    x = torch.einsum("bnyxc,yxcd->bnd", patches, stem) + torch.from_numpy(arrays["stem/bias"])
    x = x + mlp(norm(x, "MixerBlock_0/LayerNorm_0").transpose(1, 2), "MixerBlock_0/token_mixing").transpose(1, 2)
    x = x + mlp(norm(x, "MixerBlock_0/LayerNorm_1"), "MixerBlock_0/channel_mixing")
    expected = dense(norm(x, "pre_head_layer_norm").mean(dim=1), "head")
    with torch.no_grad():
        assert (ours(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()
    written = read_all(exported("google", config, tensors(ours.state_dict())))
    assert written.keys() == arrays.keys()
    assert all(np.array_equal(value.numpy(), arrays[name]) for name, value in written.items())


def test_bit_s_files_are_the_same_here_and_in_timm(tmp_path: Path) -> None:
    timm = import_timm()
    config = ResNetConfig(img_size=224, depths=(1, 2), factor=1, num_classes=5)
    ours = randomised(build_network(config))
    written = read_all(exported("google", config, tensors(ours.state_dict())))
    arrays: dict[str, Any] = {f"resnet/{name}": value.numpy() for name, value in written.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    convolution = partial(timm.layers.StdConv2d, eps=1e-8)
    theirs = timm.models.ResNetV2((1, 2), num_classes=5, stem_type="fixed", conv_layer=convolution)
    with torch.no_grad():
        theirs.load_pretrained(str(tmp_path / "a.npz"))
        pixels = images(64)
        expected = theirs.eval()(pixels)
        assert (ours(pixels) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max().item())
    found = google.familiar(from_arrays(arrays))
    assert google.read_config(found.shapes) == config
    again = read_all(imported("google", config, found).tensors)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in again.items())


@pytest.mark.parametrize(
    ("layout", "config", "setting"),
    [
        ("google", SMALL, "model.mlp"),
        ("google", replace(SMALL, mlp="gelu_tanh", registers=1), "model.registers"),
        ("google", replace(SMALL, mlp="gelu_tanh", img_size=(32, 72)), "model.img_size"),
        ("hugging_face", replace(SMALL, layer_scale=1.0, img_size=(32, 72)), "model.img_size"),
        ("google", SwinConfig(32, 4, 4, 16, (1, 1), (1, 1), 3), "model"),
        ("timm", replace(SMALL, positions="rotary", heads=6), "model.positions"),
        ("timm", replace(SMALL, norm_eps=1e-12), "model.norm_eps"),
        ("timm", replace(SMALL, pre_logits=True), "model.pre_logits"),
        ("timm", replace(SMALL, distilled=True, registers=1), "model.registers"),
        ("timm", ResNetConfig(32, (1, 1), 1, 3), "model.depths"),
        ("timm", MixerConfig(32, 16, 2, 64, 32, 256, 3), "model.width"),
        ("hugging_face", MixerConfig(32, 16, 2, 64, 32, 256, 3), "model"),
        ("hugging_face", SwinConfig(32, 4, 4, 16, (1, 1), (1, 1), 3, norm_eps=1e-6), "model.norm_eps"),
    ],
)
def test_what_a_layout_does_not_have_is_refused(layout: str, config: Any, setting: str) -> None:
    with pytest.raises(UserError) as error:
        exported(layout, config, Tensors(our_shapes(config), lambda _: pytest.fail("read")))
    assert error.value.setting == setting
    with pytest.raises(UserError):
        described(layout, config, ["a"], View())


def test_tensors_are_read_when_asked_for_and_no_others() -> None:
    """So that a network larger than memory can be converted tensor by tensor."""
    state, asked = build_network(SMALL).state_dict(), list[str]()

    def read(name: str) -> Tensor:
        asked.append(name)
        return state[name]

    theirs = exported("hugging_face", SMALL, Tensors(our_shapes(SMALL), read))
    ours = imported("hugging_face", SMALL, theirs).tensors
    assert asked == []
    assert ours.shapes == our_shapes(SMALL)
    assert torch.equal(ours.read("blocks.1.attn.qkv.bias"), state["blocks.1.attn.qkv.bias"])
    assert set(asked) == {"blocks.1.attn.qkv.bias"}


def change(state: dict[str, Tensor], what: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    what(state)
    return state


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda state: state.pop("blocks.1.norm1.bias"), "blocks.1.norm1.bias is missing;"),
        (lambda state: state.update(surprise=torch.zeros(1)), "surprise is unexpected;"),
        (lambda state: state.update({"norm.bias": torch.zeros(3)}), r"norm.bias is \(3,\), not \(48,\);"),
        (lambda state: [state.pop(name) for name in list(state) if "mlp" in name], "and 4 more;"),
        (lambda state: state.update(pos_embed=torch.zeros(48)), r"pos_embed is \(48,\), not \(1, 17, 48\);"),
    ],
)
def test_weights_that_do_not_fit_are_named(what: Callable[[dict], object], said: str) -> None:
    state = change(dict(build_network(SMALL).state_dict()), what)
    with pytest.raises(UserError, match=said) as error:
        imported("timm", SMALL, tensors(state))
    assert error.value.setting == "weights"


def test_depth_that_is_only_claimed_costs_nothing() -> None:
    swin = SwinConfig(32, 4, 4, 16, (1024, 1), (1, 1), 3)
    with pytest.raises(UserError, match="those of"):
        imported("timm", swin, tensors({"head.weight": torch.zeros(1)}))


def test_names_that_early_files_have() -> None:
    """The original Swin's merging of patches ends a stage; DINOv2's and DeiT III's names differ from timm's."""
    config = SwinConfig(32, 4, 4, 16, (1, 1), (1, 2), 3)
    state = randomised(build_network(config)).state_dict()
    old = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): v
        for name, v in state.items()
    }
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49)
    again = read_all(imported("timm", config, tensors(old)).tensors)
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    vit = replace(SMALL, registers=2, mlp="swiglu", layer_scale=1e-5)
    state = randomised(build_network(vit)).state_dict()
    renames = {"reg_token": "register_tokens", "mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3", "ls1.gamma": "gamma_1"}
    old = {re.sub("|".join(renames), lambda match: renames[match[0]], name): value for name, value in state.items()}
    old["mask_token"] = torch.zeros(1, 48)
    again = read_all(imported("timm", vit, tensors(old)).tensors)
    assert all(torch.equal(value, again[name]) for name, value in state.items())
