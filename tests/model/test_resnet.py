"""The ResNet and the hybrid's stem against timm's, and by their own rules."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.peers import import_timm
from vitscale.model.config import ResNetConfig, ViTConfig
from vitscale.model.layers import Block
from vitscale.model.resnet import Bottleneck, PostNormBottleneck, ResNet, StdConv, Stem
from vitscale.model.vit import VisionTransformer

timm = import_timm()

SMALL = ResNetConfig(img_size=64, depths=(1, 1, 1, 1), factor=1, num_classes=7)
UNEVEN = ResNetConfig(img_size=32, depths=(2, 1), factor=1, num_classes=7)
HYBRID = ViTConfig(
    img_size=64, patch_size=16, stem=(1, 1, 1), depth=2, width=48, mlp_width=96, heads=4, num_classes=7
)  # fmt: skip


def draw(model: nn.Module) -> dict[str, Tensor]:
    """Weights in which nothing is zero or alike: initial ones would hide branches and the classifier."""
    generator, drawn = torch.Generator().manual_seed(0), {}
    for name, value in sorted(model.state_dict().items()):
        drawn[name] = torch.randn(value.shape, generator=generator) * (0.2 if value.ndim == 1 else 0.03)
        if "norm" in name and name.endswith("weight"):
            drawn[name] += 1
    return drawn


def drawn(model: Any) -> Any:
    model.load_state_dict(draw(model))
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def timm_resnet(depths: tuple[int, ...], num_classes: int) -> Any:
    """BiT's, of as many stages as are given."""
    convolution = partial(timm.layers.StdConv2d, eps=1e-8)
    return timm.models.ResNetV2(depths, num_classes=num_classes, stem_type="fixed", conv_layer=convolution)


def timm_stem(depths: tuple[int, ...]) -> Any:
    """The hybrid's, as `_resnetv2` of timm's vision_transformer_hybrid makes it."""
    convolution = partial(timm.layers.StdConv2dSame, eps=1e-8)
    return timm.models.ResNetV2(
        depths, num_classes=0, global_pool="", preact=False, stem_type="same", conv_layer=convolution
    )


def timm_hybrid() -> Any:
    backbone = partial(timm.layers.HybridEmbed, backbone=timm_stem(HYBRID.stem))
    return timm.models.VisionTransformer(
        img_size=64, patch_size=1, embed_dim=48, depth=2, num_heads=4, mlp_ratio=2, num_classes=7, embed_layer=backbone
    )


def assert_same(ours: nn.Module, theirs: nn.Module, images: Tensor) -> None:
    """Of results of order 1, float32 rounding in another order of operations leaves some 1e-6, and so of gradients."""
    ours.load_state_dict(weights := draw(theirs))
    theirs.load_state_dict(weights)
    images.requires_grad_()
    got, expected = ours.eval()(images), theirs.eval()(images)
    assert 0.1 < expected.std() < 2
    assert (got - expected).abs().max() <= 1e-5
    gradients = [torch.autograd.grad(out.square().sum(), images)[0] for out in (got, expected)]
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[1].abs().max()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (61, 47)])
def test_equals_timm(height: int, width: int) -> None:
    assert_same(ResNet(SMALL), timm_resnet(SMALL.depths, 7), noise(2, 3, height, width))


def test_hybrid_equals_timm() -> None:
    assert_same(VisionTransformer(HYBRID), timm_hybrid(), noise(2, 3, 64, 64))


@pytest.mark.parametrize(("height", "width"), [(32, 48), (61, 43)])
def test_stem_equals_timm_where_padding_is_uneven(height: int, width: int) -> None:
    """In float64: of a feature map's largest values, near 10, float32 rounding would leave more than the tolerance."""
    assert_same(Stem((1, 2)).double(), timm_stem((1, 2)).double(), noise(2, 3, height, width).double())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "depths", "factor", "parameters"),
    [  # numbers as in timm's tables of results
        ("resnetv2_50x1_bit", (3, 4, 6, 3), 1, 25.55e6),
        ("resnetv2_50x3_bit", (3, 4, 6, 3), 3, 217.32e6),
    ],
)
def test_names_shapes_and_number_of_parameters(
    name: str, depths: tuple[int, ...], factor: int, parameters: float
) -> None:
    with torch.device("meta"):
        ours = ResNet(ResNetConfig(img_size=224, depths=depths, factor=factor, num_classes=1000))
        theirs = timm.create_model(name)
    assert shapes(ours) == shapes(theirs)
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(parameters, rel=5e-4)  # 4 digits


@pytest.mark.parametrize(
    ("name", "stem", "patch_size", "depth", "width", "heads"),
    [
        ("vit_base_r50_s16_224", (3, 4, 9), 16, 12, 768, 12),
        ("vit_large_r50_s32_224", (3, 4, 6, 3), 32, 24, 1024, 16),
        ("vit_small_r26_s32_224", (2, 2, 2, 2), 32, 12, 384, 6),
    ],
)
def test_names_and_shapes_of_hybrids(
    name: str, stem: tuple[int, ...], patch_size: int, depth: int, width: int, heads: int
) -> None:
    config = ViTConfig(
        img_size=224, patch_size=patch_size, stem=stem, depth=depth, width=width, mlp_width=4 * width, heads=heads,
        num_classes=1000,
    )  # fmt: skip
    with torch.device("meta"):
        ours, theirs = VisionTransformer(config), timm.create_model(name, num_classes=1000)
    assert shapes(ours) == shapes(theirs)


def assert_alike(ours: nn.Module, theirs: nn.Module, prefix: str = "") -> None:
    """Initial weights: constants the same, others of one distribution, by its first two moments."""
    weights = dict(ours.named_parameters())
    compared = 0
    for name, expected in theirs.named_parameters():
        got = weights[name]
        if not name.startswith(prefix) or name.startswith("head."):
            continue
        compared += 1
        std, number = expected.std(), expected.numel()
        if std == 0:
            assert torch.equal(got, expected), name
            continue
        assert not torch.equal(got, expected), name
        assert abs(got.mean()) <= 5 * std / number**0.5, name  # 5 deviations of the estimate
        assert abs(got.std() / std - 1) <= 5 / number**0.5, name  # the same, of two estimates
        assert got.abs().max() > 3 * std, name  # a uniform distribution ends at √3
    assert compared > 20


def test_initial_weights_are_distributed_as_in_timm() -> None:
    torch.manual_seed(0)
    assert_alike(ResNet(SMALL), timm_resnet(SMALL.depths, 7))
    hybrid = timm_hybrid()
    assert_alike(VisionTransformer(HYBRID), hybrid, "patch_embed.backbone.")
    last = dict(hybrid.named_parameters())["patch_embed.backbone.stages.1.blocks.0.norm3.weight"]
    assert not last.any()  # so that what was compared has the zeros of the paper's code


def test_initial_weights_follow_the_seed() -> None:
    config = ResNetConfig(img_size=32, depths=(1,), factor=1, num_classes=7, head_bias=-2.0)
    one, same, other = (ResNet(config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["stem.conv.weight"], other["stem.conv.weight"])
    assert not one["head.fc.weight"].any()
    assert (one["head.fc.bias"] == -2).all()
    assert not torch.equal(
        VisionTransformer(HYBRID, 1).state_dict()["patch_embed.backbone.stem.conv.weight"],
        VisionTransformer(HYBRID, 2).state_dict()["patch_embed.backbone.stem.conv.weight"],
    )


def test_dropped_branches_are_those_of_the_numbered_block_and_image() -> None:
    model = drawn(ResNet(UNEVEN)).eval()
    images = noise(3, 3, 32, 32)
    complete = model(images)
    for number, name in enumerate(["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"]):
        without, halved = copy.deepcopy(model), copy.deepcopy(model)
        without.get_submodule(name).conv3.weight.data.zero_()  # the branch ends there; standardised, zeros stay
        halved.get_submodule(name).conv3.register_forward_hook(lambda _, __, out: out * 0.5)
        keep_L2B = torch.ones(3, 2, 3)
        keep_L2B[number, 0] = torch.tensor([0.0, 1.0, 0.5])
        keep_L2B[:, 1] = 9.0  # of a second branch, which there is not
        expected = torch.stack([without(images)[0], complete[1], halved(images)[2]])
        assert (expected - complete)[[0, 2]].abs().max() > 1e-2  # the branch matters
        assert (model(images, keep_L2B) - expected).abs().max() <= 1e-6  # rounding of a product with 1


def test_stem_block_drops_its_branch() -> None:
    block = drawn(PostNormBottleneck(64, 256, 1, project=True))
    x = noise(2, 64, 8, 8)
    got = block(x, torch.tensor([[0.0, 1.0], [9.0, 9.0]]))
    assert (got[0] - block.downsample(x)[0].relu()).abs().max() <= 1e-6
    assert torch.equal(got[1], block(x)[1])


def test_recomputation_changes_no_gradient_and_selective_repeats_no_convolution() -> None:
    model, images = drawn(ResNet(UNEVEN)).train(), noise(2, 3, 32, 32)
    keep_L2B = torch.tensor([0.0, 1.25]).repeat(3, 2, 1)
    flops, gradients = {}, {}
    for recompute in ("none", "blocks", "selective"):
        model.recompute = recompute
        with FlopCounterMode(display=False) as counter:
            loss = model(images, keep_L2B).square().sum()
            gradients[recompute] = torch.autograd.grad(loss, list(model.parameters()))
        flops[recompute] = counter.get_total_flops()
    for recompute in ("blocks", "selective"):
        assert all(torch.equal(a, b) for a, b in zip(gradients[recompute], gradients["none"], strict=True))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for number, block in enumerate(block for block in model.modules() if isinstance(block, Block)):
            block(noise(2, (64, 256, 256)[number], 8, 8))
    assert flops["blocks"] == flops["none"] + counter.get_total_flops()
    assert flops["selective"] == flops["none"]


@pytest.mark.parametrize(("side", "other"), [(1, 1), (7, 33), (64, 65)])
def test_images_of_any_size(side: int, other: int) -> None:
    model, images = drawn(ResNet(SMALL)).eval(), noise(2, 3, side, other)
    features = model.forward_features(images)
    assert features.shape == (2, 2048, -(-side // 32), -(-other // 32))
    assert features.min() == 0  # behind the ReLU
    pooled = model.representation(features)
    logits = pooled @ model.head.fc.weight[:, :, 0, 0].T + model.head.fc.bias
    assert (model(images) - logits).abs().max() <= 1e-5  # rounding of sums of 2048
    stem = Stem((1, 1))
    assert stem(images).shape == (2, stem.channels, -(-side // 8), -(-other // 8))


def test_no_attention_to_return() -> None:
    with pytest.raises(ValueError, match="ResNet has no attention"):
        ResNet(UNEVEN)(noise(1, 3, 32, 32), return_attention=True)


def test_kernels_are_standardised_in_float32_under_bfloat16_weights() -> None:
    convolution = StdConv(64, 32)
    weights = (1 + 0.02 * noise(32, 64, 1, 1)).bfloat16()  # of bfloat16 sums nothing but the mean would be left
    convolution.load_state_dict({"weight": weights})
    unit_BCYX = torch.eye(64)[:, :, None, None].bfloat16()
    kernels = convolution.bfloat16()(unit_BCYX)[:, :, 0, 0].T
    exact = weights.double().flatten(1)
    exact = (exact - exact.mean(1, keepdim=True)) / exact.std(1, correction=0, keepdim=True)
    assert kernels.dtype == torch.bfloat16
    assert (kernels - exact).abs().max() <= 2**-8 * exact.abs().max()  # one rounding of the result
    hybrid, images = drawn(VisionTransformer(HYBRID)), noise(2, 3, 64, 64)
    expected = hybrid(images)
    # 8 bits through a score of layers: about 1%
    assert (hybrid.bfloat16()(images.bfloat16()) - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("bottleneck", [Bottleneck, PostNormBottleneck])
def test_a_block_is_one_graph(bottleneck: type[Block]) -> None:
    """Of the compiler's front, which is what breaks graphs; what it makes of them is its own affair."""
    block = drawn(bottleneck(64, 256, 2, True))  # pyright: ignore[reportCallIssue]
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager")
    x, keep_2B = noise(2, 64, 9, 8), torch.tensor([[0.0, 1.25]] * 2)
    for keep in (None, keep_2B):
        results = [
            torch.autograd.grad(run(x, keep).square().sum(), list(block.parameters())) for run in (block, compiled)
        ]
        for expected, got in zip(*results, strict=True):
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()  # float32 sums in another order


def test_exports_for_any_size() -> None:
    dim = torch.export.Dim
    sizes = {0: dim("b"), 2: 8 * dim("y", min=2, max=64), 3: 8 * dim("x", min=2, max=64)}
    for model in (drawn(ResNet(UNEVEN)).eval(), drawn(Stem((1, 1))).eval()):
        exported = torch.export.export(model, (noise(2, 3, 64, 64),), dynamic_shapes=(sizes,)).module()
        images = noise(3, 3, 40, 72)
        assert (exported(images) - model(images)).abs().max() <= 1e-6
