"""The MLP-Mixer against timm's implementation, the paper's tables, and its own rules."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.peers import import_timm
from vitscale.errors import UserError
from vitscale.model.config import MixerConfig
from vitscale.model.initial import initial_weight
from vitscale.model.mixer import MLPMixer

SMALL = MixerConfig(
    img_size=32, patch_size=8, depth=3, width=48, tokens_width=24, channels_width=96, num_classes=7
)  # fmt: skip
FULL = {  # Tolstikhin et al. 2021, table 1
    "mixer_s16_224": MixerConfig(224, 16, 8, 512, 256, 2048, 1000),
    "mixer_b16_224": MixerConfig(224, 16, 12, 768, 384, 3072, 1000),
    "mixer_l16_224": MixerConfig(224, 16, 24, 1024, 512, 4096, 1000),
}
# Parameters and multiply-accumulates of one forward, as in timm's table; the paper rounds to 18M, 59M, 207M
PUBLISHED = {
    "mixer_s16_224": (18.53e6, 3.79e9),
    "mixer_b16_224": (59.88e6, 12.61e9),
    "mixer_l16_224": (208.20e6, 44.60e9),
}
# The same operations, to the bit on one machine; sums of another order leave logits of about 1 within 1e-6.
LOGITS, GRADIENTS = 1e-5, 1e-4


def with_weights(config: MixerConfig) -> MLPMixer:
    """A network all of whose weights are noise."""
    model, generator = MLPMixer(config).eval(), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = noise + 1 if re.search(r"norm\d?\.weight", name) else noise
    return model


def images_of(config: MixerConfig, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *config.height_width, generator=torch.Generator().manual_seed(1))


def gradients_of(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(logits.square().sum(), parameters), strict=True))


def test_equals_timm_for_the_same_weights() -> None:
    ours = with_weights(SMALL)
    theirs = import_timm().models.mlp_mixer.MlpMixer(
        img_size=32, patch_size=8, num_blocks=3, embed_dim=48, mlp_ratio=(0.5, 2.0), num_classes=7
    )
    theirs.eval().load_state_dict(ours.state_dict())
    images = images_of(SMALL)
    got, expected = ours(images), theirs(images)
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= LOGITS
    gradients, expected_gradients = gradients_of(ours, got), gradients_of(theirs, expected)
    assert list(gradients) == list(expected_gradients)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= GRADIENTS * gradient.abs().max(), name


@pytest.mark.parametrize("name", ["mixer_b16_224", "mixer_l16_224"])
def test_names_and_shapes_are_timms(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = MLPMixer(FULL[name]).state_dict(), import_timm().create_model(name).state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = MLPMixer(FULL[name])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    parameters, macs = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=3e-4)  # rounded to 0.01 M
    # matrix products alone; published figures also count norms, 0.2%
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=5e-3)


def test_images_of_another_size_are_refused() -> None:
    model = MLPMixer(SMALL)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    for shape in ((40, 40), (16, 64), (32, 30)):  # the second of as many patches
        with pytest.raises(UserError, match=f"{shape[0]}×{shape[1]} px; expected 32×32 px"):
            model(torch.zeros(1, 3, *shape))


def test_there_is_no_attention_to_return() -> None:
    with pytest.raises(ValueError, match="MLP-Mixer has no attention"):
        MLPMixer(SMALL)(images_of(SMALL), return_attention=True)


def test_initial_weights_have_the_papers_statistics() -> None:
    weights = MLPMixer(replace(SMALL, head_bias=-2.5), seed=5).state_dict()
    for name, inputs in {
        "stem.proj.weight": 3 * 8 * 8,
        "blocks.1.mlp_tokens.fc1.weight": 16,
        "blocks.1.mlp_tokens.fc2.weight": 24,
        "blocks.1.mlp_channels.fc1.weight": 48,
        "blocks.1.mlp_channels.fc2.weight": 96,
    }.items():
        error = 4 / math.sqrt(2 * weights[name].numel())  # four deviations of an estimated deviation
        assert weights[name].std().item() == pytest.approx(inputs**-0.5, rel=error), name
        assert weights[name].abs().max() <= 2 * inputs**-0.5 / 0.8796  # cut at two deviations of the uncut normal
    ones = [name for name in weights if re.search(r"norm\d?\.weight$", name)]
    assert len(ones) == 3 * 2 + 1
    assert all((weights[name] == 1).all() for name in ones)
    zeros = [name for name in weights if name.endswith(".bias") and name != "head.bias"]
    assert all((weights[name] == 0).all() for name in [*zeros, "head.weight"])
    assert (weights["head.bias"] == -2.5).all()


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    one, third = MLPMixer(SMALL, seed=5).state_dict(), MLPMixer(SMALL, seed=6).state_dict()
    for name, tensor in one.items():
        torch.manual_seed(len(name))
        assert torch.equal(initial_weight(name, tuple(tensor.shape), 5, MLPMixer.rules(SMALL)), tensor), name
    name = "blocks.0.mlp_tokens.fc1.weight"
    assert not torch.equal(one[name], third[name])
    assert not torch.equal(one[name], one[name.replace("blocks.0", "blocks.1")])


def test_dropped_branches_pass_an_image_by() -> None:
    model, images = with_weights(SMALL), images_of(SMALL)
    keep = torch.ones(3, 2, 3)
    assert torch.equal(model(images, keep), model(images))
    keep[:, :, 1] = 0  # the second image: no branch at all
    keep[1, 0, 2] = 0  # the third: tokens are not mixed in the second block
    logits = model(images, keep)
    bare = with_weights(SMALL)
    for name in ("weight", "bias"):
        bare.get_parameter(f"blocks.1.mlp_tokens.fc2.{name}").data.zero_()
    tokens = model.norm(model.stem(images[1:2]))
    assert torch.equal(logits[0], model(images)[0])
    # the same sums, of one image instead of three
    assert torch.allclose(logits[1], model.head(model.representation(tokens))[0], atol=LOGITS)
    assert torch.allclose(logits[2], bare(images)[2], atol=LOGITS)
    assert not torch.allclose(logits[2], model(images)[2], atol=1e-2)
    assert not torch.allclose(model(images, torch.full((3, 2, 3), 2.0)), model(images), atol=1e-2)


@pytest.mark.parametrize("recompute", ["blocks", "selective"])
def test_recomputed_blocks_give_the_same_bits(recompute: str) -> None:
    model = with_weights(replace(SMALL, dropout=0.2)).train()
    images, keep = images_of(SMALL), torch.tensor([0.0, 2.0, 2.0]).expand(3, 2, 3)
    results = []
    for model.recompute in ("none", recompute):
        torch.manual_seed(3)
        logits = model(images, keep)
        results.append([logits, *gradients_of(model, logits).values()])
    assert all(map(torch.equal, *results))
