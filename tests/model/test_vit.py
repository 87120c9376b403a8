"""The Vision Transformer against the paper, transformers' implementation, and its own rules."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscale.errors import UserError
from vitscale.model.adapt import adapt_weights
from vitscale.model.build import create_model
from vitscale.model.config import ViTConfig, from_dict, to_dict
from vitscale.model.embed import resize_pos_embed
from vitscale.model.initial import initial_weight
from vitscale.model.registry import ModelConfig, list_models
from vitscale.model.vit import VisionTransformer

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


# first, second and last value of weights of `SMALL` with `pre_logits`, seed 5: they are the same in every version
GOLDEN_WEIGHTS = {
    "pos_embed": (-0.008805525489151478, -0.05088605359196663, -0.0016294379020109773),
    "patch_embed.proj.weight": (0.013620368205010891, -0.051322538405656815, -0.04137526452541351),
    "blocks.1.attn.qkv.weight": (0.1528809368610382, -0.12069675326347351, -0.1686277985572815),
    "blocks.1.attn.proj.weight": (-0.190325528383255, -0.06378251314163208, 0.10300514101982117),
    "blocks.1.mlp.fc1.weight": (0.09169960767030716, 0.07434775680303574, -0.044419337064027786),
    "blocks.0.mlp.fc2.bias": (9.177481885558336e-09, -1.4948220439237048e-07, -4.6206255888137093e-07),
    "pre_logits.fc.weight": (0.049427397549152374, -0.012414003722369671, -0.18912090361118317),
}


def test_initial_weights_are_functions_of_name_shape_and_seed() -> None:
    model = VisionTransformer(replace(SMALL, pre_logits=True), seed=5)
    for name, tensor in model.state_dict().items():
        torch.manual_seed(len(name))
        with torch.device("meta"):  # whatever else goes on
            weight = initial_weight(name, tuple(tensor.shape), 5, VisionTransformer.rules(SMALL))
        assert torch.equal(weight, tensor), name
        if name in GOLDEN_WEIGHTS:
            # logarithms and cosines of the vector units of other CPUs differ in the last bits
            assert weight.flatten()[[0, 1, -1]].tolist() == pytest.approx(GOLDEN_WEIGHTS[name], rel=1e-5), name


def test_weights_can_be_left_as_torch_makes_them() -> None:
    torch.manual_seed(0)
    left = VisionTransformer(SMALL, seed=None)
    assert left.head.weight.abs().max() > 0  # ours would be zero


def test_positions_follow_their_place_in_the_image() -> None:
    ramp = torch.arange(8, dtype=torch.float32)
    grid = torch.stack([ramp[:, None].expand(8, 8), ramp[None].expand(8, 8)], dim=-1)  # (row, column)
    class_token = torch.full((1, 1, 2), 99.0)
    pos_embed = torch.cat([class_token, grid.reshape(1, 64, 2)], dim=1)
    resized = resize_pos_embed(pos_embed, (8, 8), (12, 12))
    assert torch.equal(resized[:, :1], class_token)
    inner = resized[0, 1:].reshape(12, 12, 2)[3:9, 3:9]
    places = (torch.arange(3, 9) + 0.5) * 8 / 12 - 0.5  # centres of the new patches, in old patches
    # bicubic filtering reproduces a ramp away from the borders, up to float32 rounding
    assert torch.allclose(inner[..., 0], places[:, None].expand(6, 6), atol=1e-5)
    assert torch.allclose(inner[..., 1], places[None].expand(6, 6), atol=1e-5)
    assert resize_pos_embed(pos_embed, (8, 8), (8, 8)) is pos_embed
    assert resize_pos_embed(pos_embed, (8, 8), (4, 6)).shape == (1, 25, 2)


def test_positions_of_an_oblong_keep_their_rows_and_columns() -> None:
    """A grid of 6×4 turned into one of 4×6, as many patches, is interpolated all the same."""
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(4.0), indexing="ij")
    pos_embed = torch.stack([rows, columns], dim=-1).reshape(1, 24, 2)
    turned = resize_pos_embed(pos_embed, (6, 4), (4, 6), prefix=0)[0].unflatten(0, (4, 6))
    assert torch.allclose(turned[..., 0], turned[:, :1, 0].expand(4, 6))  # one row of patches has one height
    assert torch.allclose(turned[..., 1], turned[:1, :, 1].expand(4, 6))
    assert (turned[1:, 0, 0] > turned[:-1, 0, 0]).all()
    assert (turned[0, 1:, 1] > turned[0, :-1, 1]).all()


def test_adapting_tells_grids_of_as_many_patches_apart() -> None:
    tall, wide = (VisionTransformer(replace(SMALL, img_size=size), seed=1) for size in ((48, 32), (32, 48)))
    shapes = shapes_of(tall)
    assert shapes == shapes_of(wide)
    _, adapted, notes = adapt_weights(shapes, tall.get_parameter, tall.config.grid, wide.config, shapes)
    assert notes[0] == "position embeddings interpolated from 6×4 to 4×6"
    places = tall.get_parameter("pos_embed")
    assert torch.equal(adapted("pos_embed"), resize_pos_embed(places, (6, 4), (4, 6)))


def test_sizes_of_images() -> None:
    assert replace(SMALL, img_size=(32, 32)) == SMALL
    oblong = replace(SMALL, img_size=(32, 48))
    assert (oblong.grid, oblong.patches, oblong.height_width) == ((4, 6), 24, (32, 48))
    assert from_dict(json.loads(json.dumps(to_dict(oblong)))) == oblong
    for size, said in (((32, 44), "44 with patches of 8 px"), ((32, 48, 3), "[32, 48, 3]"), ((32, "a"), "'a'")):
        with pytest.raises(UserError) as error:
            replace(SMALL, img_size=size)
        assert (error.value.setting, said in str(error.value.got)) == ("model.img_size", True)


def shapes_of(model: VisionTransformer) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_adapting_keeps_the_encoder_and_starts_the_head_at_zero() -> None:
    before = VisionTransformer(replace(SMALL, pre_logits=True), seed=1)
    after = VisionTransformer(replace(SMALL, img_size=48, num_classes=3), seed=2)
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return before.state_dict()[name]

    kept, adapted, notes = adapt_weights(shapes_of(before), read, (4, 4), after.config, shapes_of(after))
    assert asked == []  # nothing is read before it is needed
    missing = after.load_state_dict({name: adapted(name) for name in kept}, strict=False).missing_keys
    assert missing == ["head.weight", "head.bias"]
    assert sorted(asked) == sorted(kept)
    name = "blocks.1.mlp.fc1.weight"
    assert torch.equal(after.state_dict()[name], before.state_dict()[name])
    places = after.get_parameter("pos_embed"), before.get_parameter("pos_embed")
    assert torch.equal(places[0], resize_pos_embed(places[1], (4, 4), (6, 6)))
    assert after(torch.randn(2, 3, 48, 48)).abs().max() == 0
    assert notes == [
        "position embeddings interpolated from 4×4 to 6×6",
        "dropped head.bias, head.weight, pre_logits.fc.bias, pre_logits.fc.weight; "
        "the new head for 3 classes starts at zero",
    ]


def test_adapting_names_the_tensors_that_do_not_fit() -> None:
    model = VisionTransformer(SMALL)
    shapes = {**shapes_of(model), "extra": (1,), "norm.weight": (5,)}
    del shapes["cls_token"]
    with pytest.raises(
        ValueError, match=r"cls_token is missing; extra is unexpected; norm.weight is \(5,\), not \(48,"
    ):
        adapt_weights(shapes, model.get_parameter, (4, 4), SMALL, shapes_of(model))
    shapes = {**shapes_of(model), "pos_embed": (1, 15, 48)}
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 15, 48\), not \(1, 17, 48\)"):
        adapt_weights(shapes, model.get_parameter, (4, 4), SMALL, shapes_of(model))


def train_once(model: VisionTransformer, keep: torch.Tensor | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and gradients of a step in training mode, dropout drawn from one seed."""
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    logits = model.train()(images, keep)
    return logits.detach(), list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))


def with_a_head(config: ViTConfig) -> VisionTransformer:
    """A model whose classifier is not zero, so that gradients reach all of it."""
    model = VisionTransformer(config, seed=1)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model


def test_dropped_branches_pass_an_image_by() -> None:
    model, images = with_a_head(SMALL).eval(), torch.randn(3, 3, 32, 32)
    keep = torch.ones(2, 2, 3)
    assert torch.equal(model(images, keep), model(images))
    keep[:, :, 1] = 0  # the second image: no branch at all
    keep[1, 0, 2] = 0  # the third: no attention in the second block
    logits = model(images, keep)
    tokens, _ = model.embed(images[1:2])
    bare = with_a_head(SMALL).eval()
    bare.get_parameter("blocks.1.attn.proj.weight").data.zero_()
    assert torch.equal(logits[0], model(images)[0])
    # the same sums, of one image instead of three
    assert torch.allclose(logits[1], model.head(model.norm(tokens)[0, 0]), atol=1e-5)
    assert torch.allclose(logits[2], bare(images[2:])[0], atol=1e-5)
    doubled = model(images, torch.full((2, 2, 3), 2.0))
    assert not torch.allclose(doubled, model(images))


@pytest.mark.parametrize(("kind", "every", "dropout"), [("blocks", 1, 0.2), ("blocks", 2, 0.0), ("selective", 1, 0.2)])
def test_recomputed_blocks_give_the_same_bits(kind: str, every: int, dropout: float) -> None:
    model = with_a_head(replace(SMALL, depth=3, dropout=dropout))
    model.recompute_every = every
    keep = torch.rand(3, 2, 5).round() * 2
    for factors in (None, keep):
        expected_logits, expected = train_once(model, factors)
        model.recompute = kind
        logits, gradients = train_once(model, factors)
        model.recompute = "none"
        assert torch.equal(logits, expected_logits)
        assert all(map(torch.equal, gradients, expected))


def saved_elements(depth: int, recompute: str, every: int = 1) -> int:
    """Elements of the activations that a forward keeps for the backward pass."""
    model = VisionTransformer(replace(SMALL, depth=depth)).train()
    model.recompute, model.recompute_every, sizes = recompute, every, []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(0 if tensor.is_leaf else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(torch.randn(4, 3, 32, 32))
    return sum(sizes)


def test_recomputed_blocks_keep_their_input_alone() -> None:
    tokens = 4 * 17 * 48  # B N D
    assert saved_elements(5, "blocks") - saved_elements(2, "blocks") == 3 * tokens
    # two norms, q k v, what they mix, projection's and both MLP layers' inputs: 12 times as much and more
    whole = (saved_elements(5, "none") - saved_elements(2, "none")) / 3
    assert whole > 12 * tokens
    # every other block: of two more one keeps its input alone
    assert saved_elements(6, "blocks", 2) - saved_elements(4, "blocks", 2) == tokens + whole


def test_selective_recomputation_runs_no_matrix_product_again() -> None:
    """Seen by counting: the forward's products once, and twice as many in the backward pass; of others, all again."""
    counts = {}
    for recompute in ("none", "selective", "blocks"):
        model = with_a_head(replace(SMALL, depth=3)).train()
        model.recompute = recompute
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        counts[recompute] = counter.get_total_flops()
    assert counts["selective"] == counts["none"] < 0.85 * counts["blocks"]  # 3 / 4, but for the ends of blocks


def test_nothing_is_recomputed_where_there_is_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale.model.network.checkpoint", None)
    model, images = VisionTransformer(SMALL), torch.randn(1, 3, 32, 32)
    model.recompute = "blocks"
    assert model.eval()(images).requires_grad
    with torch.no_grad():
        model.train()(images)
    with pytest.raises(TypeError):
        model(images)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"name": "vit_base_patch15_224"}, "model.img_size"),
        ({"name": "vit_bse_patch16_224"}, "model.name"),
        ({"heads": 7}, "model.heads"),
        ({"depth": 0}, "model.depth"),
        ({"dropout": 1.0}, "model.dropout"),
        ({"drop_path": 1.0}, "model.drop_path"),
        ({"drop_path": -0.1}, "model.drop_path"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict, setting: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig(**options)
    assert error.value.setting == setting


def test_every_listed_model_resolves() -> None:
    assert all(ModelConfig(name=name).resolve(1000).num_classes == 1000 for name in list_models())
