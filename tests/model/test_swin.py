"""The Swin Transformer against timm's and transformers' implementations, the paper's tables, and its own rules."""

import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from tests.peers import import_timm
from vitscale.errors import UserError
from vitscale.model.config import SwinConfig
from vitscale.model.initial import initial_weight
from vitscale.model.network import compile_blocks
from vitscale.model.swin import SwinBlock, SwinTransformer

# maps of 16×16 and 8×8: whole windows, shifted in every second block of both
SMALL = SwinConfig(img_size=64, patch=4, window=4, width=24, depths=(2, 2), heads=(2, 4), num_classes=7)
# maps of 16×16, 8×8 and 4×4: larger than a window, as large, and smaller
THREE = replace(SMALL, window=8, depths=(2, 1, 2), heads=(2, 4, 3))
TINY = SwinConfig(224, 4, 7, 96, (2, 2, 6, 2), (3, 6, 12, 24), 1000)
FULL = {
    "swin_tiny_patch4_window7_224": TINY,
    "swin_small_patch4_window7_224": replace(TINY, depths=(2, 2, 18, 2)),
    "swin_base_patch4_window7_224": replace(TINY, width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    "swin_large_patch4_window7_224": replace(TINY, width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48)),
    "swin_large_patch4_window12_384": SwinConfig(384, 4, 12, 192, (2, 2, 18, 2), (6, 12, 24, 48), 1000),
}
# Parameters, and multiply-accumulates of one forward (Liu et al. 2021, table 1; large at 224 px: timm's table)
PUBLISHED = {
    "swin_tiny_patch4_window7_224": (28.29e6, 4.5e9),
    "swin_small_patch4_window7_224": (49.61e6, 8.7e9),
    "swin_base_patch4_window7_224": (87.77e6, 15.4e9),
    "swin_large_patch4_window7_224": (196.53e6, 34.5e9),
}
# Float32 sums in another order: logits of up to 3 differ by 2e-6 at most, gradients by 5 parts in 10⁶.
LOGITS, GRADIENTS = 1e-5, 1e-4


def with_weights(config: SwinConfig) -> SwinTransformer:
    """A network all of whose weights are noise; of biases of attention so much that it is far from uniform."""
    model, generator = SwinTransformer(config).eval(), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * (1 if name.endswith("table") else 0.2)
        parameter.data = noise + 1 if re.search(r"norm\d?\.weight", name) else noise
    return model


def images_of(config: SwinConfig, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *config.height_width, generator=torch.Generator().manual_seed(1))


def gradients_of(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(logits.square().sum(), parameters), strict=True))


def centre(table: Tensor, rows: int) -> Tensor:
    """The biases of offsets within a smaller window, whose table has so many rows."""
    side, inner = math.isqrt(len(table)), math.isqrt(rows)
    cut = slice((side - inner) // 2, (side + inner) // 2)
    return table.unflatten(0, (side, side))[cut, cut].flatten(0, 1)


@pytest.mark.parametrize("config", [SMALL, THREE], ids=["shifted", "smaller than a window"])
def test_equals_timm_for_the_same_weights(config: SwinConfig) -> None:
    ours = with_weights(config)
    theirs = import_timm().models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, window_size=config.window, embed_dim=24, depths=config.depths,
        num_heads=config.heads, num_classes=7, drop_path_rate=0.0,
    ).eval()  # fmt: skip
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}

    def as_theirs(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: centre(v, shapes[name][0]) if "table" in name else v for name, v in values.items()}

    theirs.load_state_dict(as_theirs(ours.state_dict()))
    images = images_of(config)
    got, expected = ours(images), theirs(images)
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= LOGITS
    gradients, expected_gradients = as_theirs(gradients_of(ours, got)), gradients_of(theirs, expected)
    assert list(gradients) == list(expected_gradients)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= GRADIENTS * gradient.abs().max(), name


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_large_patch4_window12_384"])
def test_names_and_shapes_are_timms(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = SwinTransformer(FULL[name]).state_dict(), import_timm().create_model(name).state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = SwinTransformer(FULL[name])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    parameters, macs = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-4)  # rounded to 0.01 M
    # given to the last of two digits, and with norms, 0.5% of the smallest model; here matrix products alone
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=1e-2)


TO_TRANSFORMERS = {
    r"^layers\.1\.downsample": "layers.0.downsample",  # there part of the stage before
    r"\.attn\.proj": ".attn.o_proj",
    r"\.attn\.relative": ".attn.relative_position_bias.relative",
    r"\.attn\.": ".attention.",
    r"\.norm1": ".layernorm_before",
    r"\.norm2": ".layernorm_after",
    r"^layers": "swin.encoder.layers",
    r"^norm": "swin.layernorm",
    r"^patch_embed\.proj": "swin.embeddings.patch_embeddings.projection",
    r"^patch_embed": "swin.embeddings",
    r"^head\.fc": "classifier",
}


def renamed(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names of weights of two stages → transformers'."""
    theirs = {}
    for name, tensor in ours.items():
        parts = dict.fromkeys("qkv") if ".qkv." in name else [""]
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            their_name = name.replace(".qkv.", f".{part}_proj.")
            for pattern, replacement in TO_TRANSFORMERS.items():
                their_name = re.sub(pattern, replacement, their_name)
            theirs[their_name] = piece
    return theirs


# maps of 16×24 and 8×12; of 18×10 and 9×5, filled to 20×12 and 12×8; of 9×21, filled to 12×24 and, to merge, 10×22
@pytest.mark.parametrize("shape", [(64, 96), (72, 40), (36, 84)])
def test_equals_transformers_at_any_image_size(shape: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=64, patch_size=4, window_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], num_labels=7,
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    ours = with_weights(SMALL)
    theirs.load_state_dict(renamed(ours.state_dict()))
    images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = theirs(images, output_attentions=True)
    got, (openly, weights) = ours(images), ours(images, return_attention=True)
    assert expected.logits.std() > 0.1
    assert max((logits - expected.logits).abs().max() for logits in (got, openly)) <= LOGITS
    one, other = (torch.autograd.grad(logits.square().sum(), images)[0] for logits in (got, expected.logits))
    assert (one - other).abs().max() <= GRADIENTS * other.abs().max()
    assert [each.shape[2] for each in weights] == [2, 2, 4, 4]
    assert all(each.dtype == torch.float32 for each in weights)
    # of the last block of each stage, which is shifted: transformers returns no others
    for mine, attention in zip(weights[1::2], expected.attentions, strict=True):
        # rounding of scores, of about 10, leaves 1.4e-6 of probabilities
        assert (mine.flatten(0, 1) - attention).abs().max() <= 1e-5


def test_maps_narrower_than_a_window_have_windows_of_their_smaller_side() -> None:
    block = with_weights(SMALL).layers[0].blocks[1]
    assert isinstance(block, SwinBlock)
    assert block.shifted
    maps = torch.randn(2, 3, 9, 24, generator=torch.Generator().manual_seed(1))
    for start in (0, 3, 6):  # columns: of one window each, and none shifted
        part = slice(start, start + 3)
        assert torch.allclose(block(maps)[:, :, part], block(maps[:, :, part]), atol=1e-6)
    wide = torch.randn(2, 8, 9, 24)
    assert not torch.allclose(block(wide)[:, :, :4], block(wide[:, :, :4]), atol=1e-2)


def test_images_of_parts_of_patches_are_refused() -> None:
    model = SwinTransformer(SMALL)
    assert model(torch.zeros(1, 3, 4, 20)).shape == (1, 7)
    with pytest.raises(UserError, match=r"62×64 px; expected sides that are multiples of 4 px"):
        model(torch.zeros(1, 3, 62, 64))


def test_initial_weights_have_the_papers_statistics() -> None:
    config = replace(SMALL, width=96, window=7, head_bias=-2.5)
    weights = SwinTransformer(config, seed=5).state_dict()
    for name, std in {
        "patch_embed.proj.weight": (3 * 4 * 4) ** -0.5 / math.sqrt(3),  # uniform
        "layers.0.blocks.1.attn.relative_position_bias_table": 0.02,
        "layers.0.blocks.1.attn.qkv.weight": 0.02,
        "layers.1.blocks.0.attn.proj.weight": 0.02,
        "layers.1.blocks.1.mlp.fc1.weight": 0.02,
        "layers.1.downsample.reduction.weight": 0.02,
    }.items():
        error = 4 / math.sqrt(2 * weights[name].numel())  # four deviations of an estimated deviation
        assert weights[name].std().item() == pytest.approx(std, rel=error), name
    assert 0.9 * 48**-0.5 < weights["patch_embed.proj.weight"].abs().max() <= 48**-0.5
    ones = [name for name in weights if re.search(r"norm\d?\.weight$", name)]
    assert len(ones) == 1 + 8 + 1 + 1
    assert all((weights[name] == 1).all() for name in ones)
    biases = [name for name in weights if name.endswith(".bias") and not name.startswith(("patch_embed.proj", "head"))]
    assert all((weights[name] == 0).all() for name in [*biases, "head.fc.weight"])
    assert (weights["head.fc.bias"] == -2.5).all()


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    one, third = SwinTransformer(SMALL, seed=5).state_dict(), SwinTransformer(SMALL, seed=6).state_dict()
    for name, tensor in one.items():
        torch.manual_seed(len(name))
        assert torch.equal(initial_weight(name, tuple(tensor.shape), 5, SwinTransformer.rules(SMALL)), tensor), name
    name = "layers.0.blocks.0.attn.qkv.weight"
    assert not torch.equal(one[name], third[name])
    assert not torch.equal(one[name], one[name.replace("blocks.0", "blocks.1")])


def test_dropped_branches_pass_an_image_by() -> None:
    model, images = with_weights(SMALL), images_of(SMALL)
    keep = torch.ones(4, 2, 3)
    assert torch.equal(model(images, keep), model(images))
    keep[:, :, 1] = 0  # the second image: no branch at all
    keep[2, 0, 2] = 0  # the third: no attention in the first block of the second stage
    logits = model(images, keep)
    bare = with_weights(SMALL)
    for name in ("weight", "bias"):
        bare.get_parameter(f"layers.1.blocks.0.attn.proj.{name}").data.zero_()
    maps = model.layers[1].downsample(model.patch_embed(images[1:2]))
    assert torch.equal(logits[0], model(images)[0])
    # the same sums, of one image instead of three
    assert torch.allclose(logits[1], model.head(model.representation(model.norm(maps)))[0], atol=LOGITS)
    assert torch.allclose(logits[2], bare(images)[2], atol=LOGITS)
    assert not torch.allclose(logits[2], model(images)[2], atol=1e-2)
    assert not torch.allclose(model(images, torch.full((4, 2, 3), 2.0)), model(images), atol=1e-2)


@pytest.mark.parametrize("recompute", ["blocks", "selective"])
def test_recomputed_blocks_give_the_same_bits(recompute: str) -> None:
    model = with_weights(replace(SMALL, dropout=0.2)).train()
    images, keep = images_of(SMALL), torch.tensor([0.0, 2.0, 2.0]).expand(4, 2, 3)
    results = []
    for model.recompute in ("none", recompute):
        torch.manual_seed(3)
        logits = model(images, keep)
        results.append([logits, *gradients_of(model, logits).values()])
    assert all(map(torch.equal, *results))


# the compiler's own kernels of a backward pass take it a minute
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_train_the_same_without_graph_breaks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    config = replace(SMALL, depths=(3,), heads=(2,))
    eager, compiled = with_weights(config), with_weights(config)
    compile_blocks(compiled)
    torch._dynamo.reset()
    counters.clear()
    for keep in (None, torch.tensor([0.0, 1.25, 1.25]).expand(3, 2, 3)):
        results = []
        for model in (eager, compiled):
            logits = model(images_of(config), keep)
            results.append([logits, *gradients_of(model, logits).values()])
        for expected, got in zip(*results, strict=True):
            assert (got - expected).abs().max() <= GRADIENTS * expected.abs().max()
        # windows shifted or not; once more for stochastic depth
        assert counters["stats"]["unique_graphs"] == (2 if keep is None else 4)
    assert not counters["graph_break"]


def test_a_compiled_block_computes_the_same() -> None:
    eager, compiled = with_weights(SMALL), with_weights(SMALL)
    compile_blocks(compiled)
    maps = torch.randn(2, 10, 13, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = (model.layers[0].blocks[1](maps) for model in (eager, compiled))
    # exponentials of the vector units, and fused sums in another order: of values up to 10
    assert (got - expected).abs().max() <= LOGITS
