"""Occlusion, shuffled patches and resolution, beside loops over patches."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vitscale.model.build import build_network
from vitscale.model.config import MixerConfig, SwinConfig, ViTConfig
from vitscale.pipeline.data.augment import Preprocess, key_number, normalise
from vitscale.pipeline.data.loader import EvaluationView, LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation.outcomes import outcomes
from vitscale.pipeline.evaluation.robustness import (
    OCCLUSION,
    class_attention,
    drawn_order,
    occluded,
    resolutions,
    robustness,
    shuffled,
)
from vitscale.pipeline.objectives.supervised import Supervised

ALONE = World(0, 1, 0, torch.device("cpu"))
PREPROCESS = Preprocess(32, 1.0)
MODEL = ViTConfig(img_size=32, patch_size=8, depth=2, width=16, mlp_width=32, heads=2, num_classes=10, registers=1)


def classifier(config: Any = MODEL) -> Supervised:
    """One whose classifier, which starts at zero, tells images apart."""
    network = build_network(config, seed=1)
    head = next(each for name, each in network.named_parameters() if name in ("head.weight", "head.fc.weight"))
    nn.init.normal_(head, generator=torch.Generator().manual_seed(0))
    return Supervised(network, PREPROCESS).eval()


def test_patches_are_blackened_and_moved_as_a_loop_would() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (3, 24, 32, 3), dtype=torch.uint8, generator=generator)
    order = drawn_order(torch.tensor([5, -7, 2**62]), 16, OCCLUSION)
    assert order.sort(dim=1).values.tolist() == [list(range(16))] * 3
    assert order.tolist() != drawn_order(torch.tensor([5, -7, 2**62]), 16, OCCLUSION + 1).tolist()
    assert order[1:2].tolist() == drawn_order(torch.tensor([-7]), 16, OCCLUSION).tolist()
    black, moved = occluded(pixels, order[:, :5], (4, 4)), shuffled(pixels, order, 4)
    for image in range(3):
        for place in range(16):
            y, x = divmod(place, 4)
            here = (image, slice(6 * y, 6 * y + 6), slice(8 * x, 8 * x + 8))
            gone = place in order[image, :5].tolist()
            assert torch.equal(black[here], torch.zeros_like(pixels[here]) if gone else pixels[here])
            v, u = divmod(int(order[image, place]), 4)
            assert torch.equal(moved[here], pixels[image, 6 * v : 6 * v + 6, 8 * u : 8 * u + 8])
    assert torch.equal(occluded(pixels, order[:, :0], (4, 4)), pixels)


def test_attention_is_that_of_the_last_block() -> None:
    objective = classifier()
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, weights = objective.model(normalise(pixels, PREPROCESS), return_attention=True)
        found = class_attention(objective, pixels)
    assert found.shape == (3, 16)
    assert torch.equal(found, weights[-1][:, :, 0, 2:].mean(dim=1))  # behind the class token and a register


def test_values_are_of_changed_images(digits: Any) -> None:
    objective, store = classifier(), Store(str(digits.test), "DATASET")
    got = dict(robustness(objective, store, LoaderSettings(100, 0), ALONE))
    kinds = [
        f"occlusion_{kind}_{share}" for kind in ("random", "salient", "nonsalient") for share in range(10, 100, 10)
    ]
    parts = [f"shuffle_{n}x{n}" for n in (2, 4, 8, 16)]
    assert list(got) == [*kinds, *parts, "resolution_16", "resolution_24", "resolution_40", "resolution_48"]
    view, same = EvaluationView(PREPROCESS), 0
    for number in (0, 150, 358):
        sample = store.read(number)
        pixels = torch.from_numpy(np.array(view(sample.data, 0, sample.key)))[None]
        order = drawn_order(torch.tensor([key_number(sample.key)]), 16, OCCLUSION)
        with torch.no_grad():
            attention = class_attention(objective, pixels)[0]
            for name, gone in (
                ("random_30", order[:, :5]),  # of 16 patches
                ("salient_50", attention.argsort(descending=True)[None, :8]),
                ("nonsalient_90", attention.argsort()[None, :14]),
            ):
                best = objective({"pixels": occluded(pixels, gone, (4, 4))}, predict=True).argmax()
                assert got[f"occlusion_{name}"][number] == (best == sample.label)
                same += 1
    assert same == 9
    larger = EvaluationView(Preprocess(48, 1.0))
    seen = outcomes(objective, store, larger, LoaderSettings(100, 0), ALONE)
    assert (got["resolution_48"] == (seen.best == seen.label)).all()


SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 1, "width": 16, "num_classes": 10}
VIT: dict[str, Any] = {**SIZES, "mlp_width": 32, "heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        SwinConfig(32, 4, 4, 16, (1, 1), (2, 4), 10),
        MixerConfig(**SIZES, tokens_width=8, channels_width=8),
        ViTConfig(**VIT, mixing="fourier"),
        ViTConfig(**VIT, pool="avg", class_token=False),
    ],
)
def test_networks_without_a_class_token_or_attention(digits: Any, config: Any) -> None:
    store = Store(str(digits.test), "DATASET")
    got = list(robustness(classifier(config), store, LoaderSettings(359, 0), ALONE))
    assert len(got) == 9 + 4 + len(resolutions(config))
    assert all(value.shape == (359,) for _, value in got)
    assert bool(resolutions(config)) == (config.family != "mixer")
