"""The Vision Transformer against the paper, transformers' implementation, and its own rules."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitscale.errors import UserError
from vitscale.model.embed import resize_pos_embed
from vitscale.model.registry import ModelConfig, ViTConfig, create_model, list_models
from vitscale.model.vit import VisionTransformer, adapt_weights

SMALL = ViTConfig(img_size=32, patch_size=8, depth=2, width=48, mlp_width=96, heads=4, num_classes=7)

# Parameters (1000 classes, 224 px) and multiply-accumulates of one forward, Dosovitskiy et al. 2020 and
# google-research/vision_transformer; the paper rounds to 86M, 307M, 632M.
PUBLISHED = {
    "vit_tiny_patch16_224": (5.72e6, 1.26e9),
    "vit_small_patch16_224": (22.05e6, 4.61e9),
    "vit_base_patch16_224": (86.57e6, 17.58e9),
    "vit_large_patch16_224": (304.33e6, 61.60e9),
    "vit_huge_patch14_224": (632.05e6, 167.4e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    parameters, macs = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    # matrix products alone; published figures also count norms and softmax, 0.5% of the smallest model
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=6e-3)


def test_equals_transformers_for_the_same_weights() -> None:
    """Logits and gradients. Float32 rounding of another order of operations leaves about 1e-6."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=32, patch_size=8, num_hidden_layers=2, hidden_size=48, intermediate_size=96,
            num_attention_heads=4, num_labels=7, layer_norm_eps=1e-6, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()  # fmt: skip
    weights = {name: torch.randn_like(value) * 0.1 for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    ours = VisionTransformer(SMALL).eval()
    ours.load_state_dict(renamed(weights, depth=2))
    images = torch.randn(3, 3, 32, 32, requires_grad=True)
    expected = theirs(images).logits
    got = ours(images)
    assert (got - expected).abs().max() <= 1e-5
    gradients = [torch.autograd.grad(logits.square().sum(), images)[0] for logits in (got, expected)]
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[1].abs().max()


def renamed(theirs: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """transformers' names of ViT weights → ours."""
    ours = {
        "cls_token": theirs["vit.embeddings.cls_token"],
        "pos_embed": theirs["vit.embeddings.position_embeddings"],
    }
    pairs = {
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "vit.layernorm": "norm",
        "classifier": "head",
    }
    for i in range(depth):
        layer = next(n for n in theirs if f"layer.{i}." in n or f"layers.{i}." in n).split(f".{i}.")[0] + f".{i}."
        names = {name.removeprefix(layer).rsplit(".", 1)[0] for name in theirs if name.startswith(layer)}

        def find(*endings: str, names: set[str] = names) -> str:
            return next(name for ending in endings for name in names if name.endswith(ending))

        pairs |= {
            layer + find("layernorm_before"): f"blocks.{i}.norm1",
            layer + find("layernorm_after"): f"blocks.{i}.norm2",
            layer + find("attention.output.dense", "o_proj"): f"blocks.{i}.attn.proj",
            layer + find("intermediate.dense", "fc1"): f"blocks.{i}.mlp.fc1",
        }
        mlp_out = [n for n in names if n.endswith(("output.dense", "fc2")) and "attention" not in n]
        pairs[layer + mlp_out[0]] = f"blocks.{i}.mlp.fc2"
        parts = [find(f"{long}", f"{long[0]}_proj") for long in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([theirs[f"{layer}{part}.{kind}"] for part in parts])
    for their_name, our_name in pairs.items():
        for kind in ("weight", "bias"):
            ours[f"{our_name}.{kind}"] = theirs[f"{their_name}.{kind}"]
    return ours


def test_initial_weights_have_the_papers_statistics() -> None:
    model = create_model("vit_small_patch16_224", num_classes=10, pre_logits=True)
    weights = model.state_dict()
    width, hidden = 384, 1536
    for name, std in {
        "blocks.3.attn.qkv.weight": math.sqrt(2 / (width + width)),  # xavier for q, k, v on their own
        "blocks.3.attn.proj.weight": math.sqrt(2 / (width + width)),
        "blocks.3.mlp.fc1.weight": math.sqrt(2 / (width + hidden)),
        "blocks.3.mlp.fc2.weight": math.sqrt(2 / (width + hidden)),
        "patch_embed.proj.weight": math.sqrt(1 / (3 * 16 * 16)),
        "pre_logits.fc.weight": math.sqrt(1 / width),
        "pos_embed": 0.02,
        "blocks.3.mlp.fc1.bias": 1e-6,
    }.items():
        error = 4 / math.sqrt(2 * weights[name].numel())  # four deviations of an estimated deviation
        assert weights[name].std().item() == pytest.approx(std, rel=error), name
    for name in ("cls_token", "head.weight", "head.bias", "blocks.3.attn.qkv.bias", "patch_embed.proj.bias"):
        assert weights[name].abs().max() == 0, name
    assert (weights["blocks.3.norm1.weight"] == 1).all()


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    one = VisionTransformer(SMALL, seed=5).state_dict()
    torch.manual_seed(2)
    other = VisionTransformer(SMALL, seed=5).state_dict()
    third = VisionTransformer(SMALL, seed=6).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["pos_embed"], third["pos_embed"])
    assert not torch.equal(one["blocks.0.mlp.fc1.weight"], one["blocks.1.mlp.fc1.weight"])


def test_positions_follow_their_place_in_the_image() -> None:
    ramp = torch.arange(8, dtype=torch.float32)
    grid = torch.stack([ramp[:, None].expand(8, 8), ramp[None].expand(8, 8)], dim=-1)  # (row, column)
    class_token = torch.full((1, 1, 2), 99.0)
    pos_embed = torch.cat([class_token, grid.reshape(1, 64, 2)], dim=1)
    resized = resize_pos_embed(pos_embed, (12, 12))
    assert torch.equal(resized[:, :1], class_token)
    inner = resized[0, 1:].reshape(12, 12, 2)[3:9, 3:9]
    places = (torch.arange(3, 9) + 0.5) * 8 / 12 - 0.5  # centres of the new patches, in old patches
    # bicubic filtering reproduces a ramp away from the borders, up to float32 rounding
    assert torch.allclose(inner[..., 0], places[:, None].expand(6, 6), atol=1e-5)
    assert torch.allclose(inner[..., 1], places[None].expand(6, 6), atol=1e-5)
    assert resize_pos_embed(pos_embed, (8, 8)) is pos_embed
    assert resize_pos_embed(pos_embed, (4, 6)).shape == (1, 25, 2)


def test_adapting_keeps_the_encoder_and_starts_the_head_at_zero() -> None:
    before = VisionTransformer(ViTConfig(**{**vars(SMALL), "pre_logits": True}), seed=1)
    after = VisionTransformer(ViTConfig(**{**vars(SMALL), "img_size": 48, "num_classes": 3}), seed=2)
    weights, notes = adapt_weights(before.state_dict(), after)
    missing = after.load_state_dict(weights, strict=False).missing_keys
    assert missing == ["head.weight", "head.bias"]
    name = "blocks.1.mlp.fc1.weight"
    assert torch.equal(after.state_dict()[name], before.state_dict()[name])
    assert after(torch.randn(2, 3, 48, 48)).abs().max() == 0
    assert "4×4 to 6×6" in notes[0]
    assert "pre_logits.fc.weight" in notes[1]


def test_adapting_names_the_tensors_that_do_not_fit() -> None:
    model = VisionTransformer(SMALL)
    weights = {**model.state_dict(), "extra": torch.zeros(1), "norm.weight": torch.zeros(5)}
    del weights["cls_token"]
    with pytest.raises(
        ValueError, match=r"cls_token is missing; extra is unexpected; norm.weight is \(5,\), not \(48,"
    ):
        adapt_weights(weights, model)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"name": "vit_base_patch15_224"}, "model.img_size"),
        ({"name": "vit_bse_patch16_224"}, "model.name"),
        ({"heads": 7}, "model.heads"),
        ({"depth": 0}, "model.depth"),
        ({"dropout": 1.0}, "model.dropout"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict, setting: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig(**options)
    assert error.value.setting == setting


def test_every_listed_model_resolves() -> None:
    assert all(ModelConfig(name=name).resolve(1000).num_classes == 1000 for name in list_models())
