"""Every architecture through the same engine: partitioned over ranks it trains as it does alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from vitscale.model.build import build_network, initial_rules
from vitscale.model.config import ArchitectureConfig, MixerConfig, ResNetConfig, SwinConfig, ViTConfig
from vitscale.model.initial import initial_weight
from vitscale.pipeline.config import EngineConfig, OptimConfig
from vitscale.pipeline.data.augment import Preprocess, normalise
from vitscale.pipeline.distributed import World
from vitscale.pipeline.engine import Engine
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.optim import build_optimizer

BATCH, STEPS, SIDE, LR = 8, 4, 32, 1e-3
SIZES: dict[str, Any] = {"img_size": SIDE, "patch_size": 8, "depth": 2, "width": 32, "num_classes": 5}
VIT: dict[str, Any] = {**SIZES, "mlp_width": 48, "heads": 4}
FAMILIES: dict[str, ArchitectureConfig] = {
    "vit": ViTConfig(**VIT, pool="map", registers=2, qk_norm=True, layer_scale=0.1, patch_drop=0.5, drop_path=0.3),
    "rotary": ViTConfig(**VIT, positions="rotary", pool="avg", mlp="swiglu", patch_drop=0.25),
    "sincos": ViTConfig(**VIT, positions="sincos2d", pool="avg", class_token=False, fc_norm=True, head_bias=-1.6),
    "deit": ViTConfig(**VIT, distilled=True, drop_path=0.3),
    "fnet": ViTConfig(**VIT, mixing="fourier"),
    "hybrid": replace(ViTConfig(**VIT), patch_size=4, stem=(1,)),
    "swin": SwinConfig(SIDE, 4, 4, 16, (2, 2), (2, 4), 5, drop_path=0.3),
    "mixer": MixerConfig(**SIZES, tokens_width=24, channels_width=48, drop_path=0.3),
    "resnet": ResNetConfig(SIDE, (1, 1), 1, 5),
}
OPTIM = OptimConfig(layer_decay=0.8)


def batch(step: int, rank: int = 0, size: int = 1) -> dict[str, torch.Tensor]:
    """This rank's rows of a step's noise."""
    generator = torch.Generator().manual_seed(step)
    whole = {
        "pixels": torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator),
        "label": torch.randint(0, 5, (BATCH,), generator=generator),
        "key": torch.randint(0, 2**60, (BATCH,), generator=generator),
        "weight": torch.ones(BATCH),
        "epoch": torch.zeros(BATCH, dtype=torch.int64),
    }
    return {name: tensor[rank::size] for name, tensor in whole.items()}


def weights_of(config: ArchitectureConfig) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """The initial weights, but for classifiers of zeros, which would hide the rest of the network at first."""
    rules = ((r"^head.*weight$", lambda weight, generator: weight.normal_(std=0.1, generator=generator)),)
    return lambda name, shape: initial_weight(name.removeprefix("model."), shape, 1, (*rules, *initial_rules(config)))


def train_all(world: World) -> dict[str, list[float]]:
    """Losses of each family at stages 2 and 3, no weight whole on a rank at the latter, and with recomputation."""
    losses = {}
    for name, config in FAMILIES.items():
        for stage, recompute in ((2, "selective"), (3, "blocks")):

            def build(config: ArchitectureConfig = config, recompute: str = recompute) -> Supervised:
                network = build_network(config, seed=None)
                network.recompute = recompute
                return Supervised(network, Preprocess(SIDE, 1.0), seed=7)

            partitioned = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
            settings = EngineConfig(zero_stage=stage, deepspeed=partitioned if stage == 3 else {})
            engine = Engine(build, settings, OPTIM, world, accumulation=1)
            weights = weights_of(config)
            engine.load(lambda name, engine=engine, weights=weights: weights(name, engine.shapes[name]))
            rows = [engine.train_step([batch(i, world.rank, world.size)], BATCH, LR) for i in range(STEPS)]
            losses[f"{name} at stage {stage}"] = [row.means["loss"] for row in rows]
    return losses


def plain(config: ArchitectureConfig) -> Iterator[float]:
    """Losses of a plain loop on whole batches."""
    objective, weights = Supervised(build_network(config), Preprocess(SIDE, 1.0), seed=7), weights_of(config)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            parameter.copy_(weights(name, tuple(parameter.shape)))
    optimizer = build_optimizer(objective, OPTIM)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * group["lr_scale"]
        loss = objective(batch(step))[0] / BATCH
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), OPTIM.clip)
        optimizer.step()
        yield loss.item()


@pytest.mark.slow
def test_every_family_trains_partitioned_as_alone(ranks: Callable[..., Any]) -> None:
    """Sums in another order leave some 1e-7 in a loss, which a few steps of Adam carry to about 1e-5."""
    got = ranks(__file__, "train_all", 2)
    for name, config in FAMILIES.items():
        expected = list(plain(config))
        assert len(set(expected)) == STEPS
        for stage in (2, 3):
            assert got[f"{name} at stage {stage}"] == pytest.approx(expected, abs=1e-4), f"{name} at stage {stage}"


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_what_the_classifier_sees(name: str) -> None:
    network: Any = build_network(FAMILIES[name], seed=0)
    objective = Supervised(network, Preprocess(SIDE, 1.0)).eval()
    with torch.no_grad():
        found = objective(batch(0), predict="features")
        images_BCYX = normalise(batch(0)["pixels"], objective.preprocess, torch.float32)
        assert torch.equal(found, network.representation(network.forward_features(images_BCYX)))
    assert found.shape[0] == BATCH
    assert found.dtype == torch.float32
