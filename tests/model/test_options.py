"""What may differ from the plain ViT: tokens, positions, pooling, heads, and images of any size."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vitscale.errors import UserError
from vitscale.model.adapt import adapt_weights, resize_patches
from vitscale.model.build import build_network, create_model
from vitscale.model.config import FAMILIES, ViTConfig, from_dict, to_dict
from vitscale.model.embed import resize_pos_embed, rotary_positions, rotate, sincos_positions
from vitscale.model.flops import forward_macs, parameters
from vitscale.model.registry import ModelConfig, list_models
from vitscale.model.vit import VisionTransformer

SMALL = ViTConfig(img_size=32, patch_size=8, depth=2, width=48, mlp_width=96, heads=4, num_classes=7)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"pool": "avg", "class_token": False},
    "norm of the average": {"pool": "avg", "fc_norm": True},
    "attention pooling": {"pool": "map", "registers": 2},
    "sincos": {"positions": "sincos2d", "pre_norm": True},
    "rotary": {"positions": "rotary", "registers": 3, "qk_norm": True, "layer_scale": 0.5, "mlp": "swiglu"},
    "distilled": {"distilled": True, "pre_logits": True},
    "fourier": {"mixing": "fourier", "mlp": "gelu_tanh"},
    "hybrid": {"stem": (1, 1)},
}


def network(seed: int = 1, **options: Any) -> VisionTransformer:
    """A small network, all of whose weights are random: those that begin at zero would hide what is before them."""
    model, generator = VisionTransformer(replace(SMALL, **options)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ones = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(
                ones, 0.2 if parameter.ndim == 1 else 1 / math.sqrt(parameter[0].numel()), generator=generator
            )
    return model.eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_images_of_any_size_that_consists_of_patches(options: dict[str, Any]) -> None:
    model = network(**options)
    for height, width in ((32, 32), (48, 32), (16, 64), (8, 8)):
        logits = model(torch.randn(2, 3, height, width))
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
    with pytest.raises(UserError, match=r"images.*36×32 px.*multiples of 8 px"):
        model(torch.randn(1, 3, 36, 32))


@pytest.mark.parametrize("options", [o for o in OPTIONS.values() if "mixing" not in o])
def test_attention_is_what_mixes_the_values(options: dict[str, Any]) -> None:
    """The same logits with weights shown as without (fused kernels add in another order), and they do the mixing."""
    model, images = network(**options), torch.randn(2, 3, 32, 48)
    seen: list[torch.Tensor] = []
    block: Any = model.blocks[1]
    block.attn.qkv.register_forward_hook(lambda _, __, qkv: seen.append(qkv))
    block.attn.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain = model(images)
    logits, weights = model(images, return_attention=True)
    assert (logits - plain).abs().max() <= 1e-5
    tokens = 4 * 6 + model.config.prefix
    assert [tuple(each.shape) for each in weights] == [(2, 4, tokens, tokens)] * 2
    assert torch.allclose(weights[0].sum(dim=-1), torch.ones(2, 4, tokens), atol=1e-5)
    values = seen[0].unflatten(-1, (3, 4, 12))[:, :, 2]
    mixed = torch.einsum("bhnm,bmhe->bnhe", weights[1], values).flatten(2)
    assert torch.allclose(mixed, seen[1], atol=1e-5)  # what the fused kernel put out


def test_fourier_mixing_has_no_attention_and_equals_its_definition() -> None:
    model = network(mixing="fourier")
    with pytest.raises(ValueError, match="Fourier transforms has no attention"):
        model(torch.randn(1, 3, 32, 32), return_attention=True)
    from vitscale.model.fnet import mix

    tokens = torch.randn(2, 5, 6, dtype=torch.float32)
    n, d = torch.arange(5.0), torch.arange(6.0)
    tokens_angle, width_angle = (2 * math.pi * torch.outer(k, k) / len(k) for k in (n, d))
    phase = tokens_angle[:, None, :, None] + width_angle[None, :, None, :]  # of every output with every input
    expected = torch.einsum("nmae,bae->bnm", phase.cos(), tokens) / math.sqrt(30)
    assert torch.allclose(mix(tokens), expected, atol=1e-5)


def test_fixed_positions_of_another_resolution_are_those_between() -> None:
    """A network made for larger images, with the weights and the grid of a smaller one, computes what that does."""
    before = network(**OPTIONS["sincos"])
    after = VisionTransformer(replace(before.config, img_size=(48, 32), sincos_grid=before.config.grid))
    after.load_state_dict(before.state_dict())
    images = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        assert torch.equal(after.forward_features(images), before.forward_features(images))
    assert replace(before.config, sincos_grid=before.config.grid) == before.config
    for wrong in ({"sincos_grid": (4,)}, {"sincos_grid": (3, 3), "positions": "learned"}):
        with pytest.raises(UserError, match=r"model\.sincos_grid"):
            replace(before.config, **wrong)


def test_positions_follow_their_place() -> None:
    """A constant image's patches differ by their position alone: twice the resolution lies between the old places."""
    fixed = sincos_positions((8, 8), 16, (8, 8), torch.device("cpu")).unflatten(0, (8, 8))
    finer = sincos_positions((24, 24), 16, (8, 8), torch.device("cpu")).unflatten(0, (24, 24))
    assert torch.allclose(finer[1::3, 1::3], fixed, atol=1e-6)  # the middle one of three lies on the old one's place
    rows, columns, omega = torch.arange(8.0), torch.arange(8.0), 10_000 ** -(torch.arange(4) / 3)
    at = fixed[3, 5]  # big_vision: sines and cosines of the column first
    expected = torch.cat([f(place * omega) for place in (columns[5], rows[3]) for f in (torch.sin, torch.cos)])
    assert torch.allclose(at, expected, atol=1e-6)


def test_rotary_positions_are_those_of_dinov3() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.dinov3_vit import modeling_dinov3_vit as theirs

    settings = transformers.DINOv3ViTConfig(image_size=64, patch_size=8, hidden_size=48, num_attention_heads=4)
    cos, sin = theirs.DINOv3ViTRopePositionEmbedding(settings).eval()(torch.randn(1, 3, 64, 40))
    rope = rotary_positions((8, 5), 12, torch.device("cpu"))
    assert torch.allclose(rope[0, 0], sin, atol=1e-6)
    assert torch.allclose(rope[1, 0], cos, atol=1e-6)
    values = torch.randn(2, 4, 3 + 40, 12)
    turned, _ = theirs.apply_rotary_pos_emb(values, values, cos, sin)
    assert torch.allclose(rotate(values, rope), turned, atol=1e-6)


def test_scores_of_rotary_positions_depend_on_distance_alone() -> None:
    rope, one = rotary_positions((6, 6), 12, torch.device("cpu")), torch.randn(1, 1, 1, 12).expand(1, 1, 36, 12)
    turned = rotate(one, rope)[0, 0].unflatten(0, (6, 6))
    scores = torch.einsum("yxe,vue->yxvu", turned, turned)
    assert torch.allclose(scores[:5, :5, :5, :5], scores[1:, 1:, 1:, 1:], atol=1e-4)
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 0, 2], atol=1e-3)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["rotary"], OPTIONS["sincos"]])
def test_all_patches_by_number_are_all_patches_and_left_out_ones_do_not_count(options: dict[str, Any]) -> None:
    model, images = network(**options), torch.randn(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, 16)
    assert torch.allclose(model(images, patches_BM=everything), model(images), atol=1e-6)
    kept = torch.tensor([[0, 3, 7], [2, 9, 15]])
    before = model(images, patches_BM=kept)
    grid = images.clone().unflatten(2, (4, 8)).unflatten(4, (4, 8))  # (B, 3, rows, 8, columns, 8)
    for image, row in enumerate(kept.tolist()):
        for patch in set(range(16)) - set(row):
            grid[image, :, patch // 4, :, patch % 4] = 9.0
    assert torch.equal(model(grid.flatten(4, 5).flatten(2, 3), patches_BM=kept), before)
    assert not torch.allclose(before, model(images), atol=1e-3)


def test_both_heads_of_a_distilled_network_are_averaged() -> None:
    model, images = network(distilled=True), torch.randn(2, 3, 32, 32)
    one, other = model.heads(model.forward_features(images))
    assert torch.allclose(model(images), (one + other) / 2)
    assert not torch.allclose(one, other)


def test_resizing_positions_is_linear_and_reaches_the_embeddings() -> None:
    """As one matrix for rows and one for columns it equals torch's interpolation of the whole, gradient included."""
    pos_embed = torch.randn(1, 1 + 49, 6, requires_grad=True)
    for grid in ((7, 7), (12, 12), (5, 9), (3, 14)):
        for antialias in (True, False):
            got = resize_pos_embed(pos_embed, (7, 7), grid, 1, antialias)
            patches = pos_embed[:, 1:].unflatten(1, (7, 7)).permute(0, 3, 1, 2)
            wanted = F.interpolate(patches, size=grid, mode="bicubic", antialias=antialias).flatten(2).transpose(1, 2)
            if grid == (7, 7):
                wanted = pos_embed[:, 1:]
            assert torch.allclose(got[:, 1:], wanted, atol=1e-6)
            factors = torch.randn_like(wanted)
            ours, theirs = (torch.autograd.grad((x * factors).sum(), pos_embed)[0] for x in (got[:, 1:], wanted))
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_resized_patches_give_resized_images_the_same_tokens() -> None:
    """Exactly where patches grow: what is enlarged holds all of what it was."""
    weight, patches = torch.randn(5, 3, 8, 8), torch.randn(4, 3, 8, 8)
    larger = F.interpolate(patches, size=(16, 16), mode="bilinear")
    tokens = torch.einsum("bcyx,dcyx->bd", patches, weight)
    got = torch.einsum("bcyx,dcyx->bd", larger, resize_patches(weight, (16, 16)))
    assert torch.allclose(got, tokens, atol=1e-4)
    assert resize_patches(weight, (4, 6)).shape == (5, 3, 4, 6)


def test_weights_of_another_patch_size_are_fitted() -> None:
    before = network()
    after = VisionTransformer(replace(SMALL, patch_size=16, img_size=64, num_classes=3))
    shapes, own = ({name: tuple(w.shape) for name, w in model.state_dict().items()} for model in (before, after))
    kept, read, notes = adapt_weights(shapes, before.state_dict().__getitem__, before.config.grid, after.config, own)
    after.load_state_dict({name: read(name) for name in kept}, strict=False)
    assert notes[0] == "patches resized from 8×8 to 16×16 px"
    images = torch.randn(2, 3, 32, 32)
    patches = images.unflatten(2, (4, 8)).unflatten(4, (4, 8)).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 8, 8)
    larger = F.interpolate(patches, size=(16, 16), mode="bilinear")  # each patch on its own
    whole = larger.unflatten(0, (2, 4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)
    assert torch.allclose(after.forward_features(whole), before.forward_features(images), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"pool": "token", "class_token": False}, "model.class_token"),
        ({"pool": "mean"}, "model.pool"),
        ({"distilled": True, "pool": "avg"}, "model.distilled"),
        ({"fc_norm": True}, "model.fc_norm"),
        ({"positions": "rotary", "heads": 96}, "model.positions"),
        ({"positions": "rotary", "mixing": "fourier"}, "model.positions"),
        ({"patch_drop": 1.0}, "model.patch_drop"),
        ({"stem": [2, 2, 2, 2], "patch_size": 16}, "model.patch_size"),
        ({"stem": 3}, "model.stem"),
        ({"registers": -1}, "model.registers"),
        ({"window": 7}, "model.window"),
        ({"name": "swin_tiny_patch4_window7_224", "pool": "avg"}, "model.pool"),
        ({"name": "swin_tiny_patch4_window7_224", "heads": 4}, "model.heads"),
        ({"name": "swin_tiny_patch4_window7_220"}, "model.img_size"),
        ({"name": "mixer_b16_224", "pre_logits": True}, "model.pre_logits"),
        ({"name": "vit_base_r50_s8_224"}, "model.name"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], setting: str) -> None:
    with pytest.raises(UserError) as refused:
        ModelConfig(**{"name": "vit_tiny_patch16_224", **options})
    assert refused.value.setting == setting


def test_every_name_is_built_and_described() -> None:
    """On the meta device; JSON and back leaves each as it is."""
    seen = set()
    for name in list_models():
        config = ModelConfig(name).resolve(10)
        seen.add(config.family)
        assert from_dict(to_dict(config)) == config
        if "gigantic" not in name and "giant" not in name and config.img_size == 224:
            with torch.device("meta"):
                assert build_network(config, seed=None)(torch.empty(1, 3, 224, 224)).shape == (1, 10)
    assert seen == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [
        ("vit_giant_patch14_224", 1011, 257),  # Zhai et al. 2022, table 2: 1,011 M; 533.1 GFLOP at 224 px
        ("vit_gigantic_patch14_224", 1843, 471),  # 1,843 M; 965.3 GFLOP
        ("deit_base_distilled_patch16_224", 87.3, 17.7),  # Touvron et al. 2020, with the second head
        ("vit_base_r50_s16_224", 98.7, 21.0),  # timm: 97.95 M features, 21.66 GMACs with norms
        ("swin_tiny_patch4_window7_224", 28.3, 4.5),
        ("mixer_b16_224", 59.9, 12.6),
        ("resnetv2_50x1_bit", 25.55, 4.1),
    ],
)
def test_sizes_of_the_family_are_the_published_ones(name: str, millions: float, gmacs: float) -> None:
    """Within what the published figures count besides, such as heads and norms."""
    config = ModelConfig(name).resolve(1000)
    assert parameters(config) / 1e6 == pytest.approx(millions, rel=0.01)
    assert forward_macs(config) / 1e9 == pytest.approx(gmacs, rel=0.05)


@pytest.mark.parametrize("described", [{"family": "rnn"}, {"depth": "2"}, {"depth": True}, {"stem": 5}, {"odd": 1}])
def test_descriptions_that_others_made_are_checked(described: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        from_dict({**to_dict(SMALL), **described})


def test_initial_weights_of_options() -> None:
    model = create_model("vit_small_patch16_224", 10, positions="learned", registers=4, pool="map", layer_scale=1e-5,
                         head_bias=-2.3, qk_norm=True)  # fmt: skip
    weights = model.state_dict()
    assert weights["head.bias"].unique().tolist() == pytest.approx([-2.3])
    assert weights["blocks.3.ls2.gamma"].unique().tolist() == pytest.approx([1e-5])
    assert (weights["blocks.0.attn.q_norm.weight"] == 1).all()
    assert weights["reg_token"].std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(weights["reg_token"][:, 0], weights["reg_token"][:, 1])  # alike they would stay alike
    assert weights["attn_pool.kv.weight"].std().item() == pytest.approx(math.sqrt(2 / (384 + 384)), rel=0.01)
    assert weights["attn_pool.mlp.fc1.weight"].std().item() == pytest.approx(math.sqrt(2 / (384 + 1536)), rel=0.01)
