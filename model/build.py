"""From a configuration to its network."""

from typing import Any

from vitscale.model.config import ArchitectureConfig
from vitscale.model.initial import Rules
from vitscale.model.mixer import MLPMixer
from vitscale.model.network import Network
from vitscale.model.registry import ModelConfig
from vitscale.model.resnet import ResNet
from vitscale.model.swin import SwinTransformer
from vitscale.model.vit import VisionTransformer

NETWORKS: dict[str, type[Any]] = {
    "vit": VisionTransformer,
    "swin": SwinTransformer,
    "mixer": MLPMixer,
    "resnet": ResNet,
}


def build_network(config: ArchitectureConfig, seed: int | None = 0) -> Network:
    """The network of a configuration, with the initial weights of `seed`; None leaves them as torch makes them."""
    return NETWORKS[config.family](config, seed)


def initial_rules(config: ArchitectureConfig) -> Rules:
    """How its weights begin, for `initial_weight`."""
    return NETWORKS[config.family].rules(config)


def create_model(name: str, num_classes: int = 1000, seed: int = 0, **options: Any) -> Network:
    """Build a named architecture with the initialisation of its paper.

    `options` are the other fields of `ModelConfig`, such as `img_size=384`. Raises `UserError` as that class does.
    """
    return build_network(ModelConfig(name=name, **options).resolve(num_classes), seed)
