"""Compiled blocks against uncompiled ones."""

import pytest
import torch
from torch._dynamo.utils import counters

from vitscale.model.config import ViTConfig
from vitscale.model.network import compile_blocks
from vitscale.model.vit import VisionTransformer

MODEL = ViTConfig(img_size=32, patch_size=8, depth=3, width=48, mlp_width=96, heads=4, num_classes=7)


def make() -> VisionTransformer:
    """A model whose classifier is not zero, so that gradients reach all of it."""
    model = VisionTransformer(MODEL, seed=1)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model


def step(model: VisionTransformer, number: int, keep: torch.Tensor | None) -> list[torch.Tensor]:
    """Logits and gradients of images of noise."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(number))
    logits = model(images, keep)
    return [logits.detach(), *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_by_one_graph() -> None:
    eager, compiled = make(), make()
    hooked: list[int] = []
    compiled.blocks[2].register_forward_hook(lambda *_: hooked.append(2))
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    keep = torch.tensor([0.0, 1.25]).repeat(3, 2, 2)
    torch._dynamo.reset()
    counters.clear()
    # steps without stochastic depth, then with it, then by recomputation of the same graph
    for number, factors in enumerate([None, None, keep, keep] * 2):
        compiled.recompute = "blocks" if number > 3 else "none"
        for got, expected in zip(step(compiled, number, factors), step(eager, number, factors), strict=True):
            # fused sums in another order leave a few parts in 10⁷ of the largest value
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert counters["stats"]["unique_graphs"] == (1 if factors is None and number < 4 else 2)
    assert not counters["graph_break"]
    larger = torch.randn(2, 3, 48, 48)
    compiled(larger)  # another size: another graph
    with torch._dynamo.config.patch(error_on_recompile=True):  # sizes seen before come back: none
        compiled(torch.randn(4, 3, 32, 32))
        compiled(larger)
    with (
        pytest.raises(RuntimeError, match=r"size mismatch at index 0\. expected 4, actual 5"),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        compiled(torch.randn(5, 3, 32, 32))
    assert len(hooked) >= 8
