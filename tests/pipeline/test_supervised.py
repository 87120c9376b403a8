"""The supervised objective: its losses, and stochastic depth."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.errors import UserError
from vitscale.model.config import ViTConfig
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline.config import AugmentConfig
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.data.device_augment import DeviceAugment
from vitscale.pipeline.objectives.dropping import keep_factors
from vitscale.pipeline.objectives.supervised import Supervised, check_loss, label_losses, sigmoid_cross_entropy

MODEL = ViTConfig(
    img_size=16, patch_size=4, depth=3, width=32, mlp_width=64, heads=4, num_classes=5, drop_path=0.5
)  # fmt: skip
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
GOLDEN_KEPT = [[[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]], [[0, 1, 0, 0, 1, 1], [1, 0, 1, 1, 1, 0]]]


def keys(count: int) -> tuple[Tensor, Tensor]:
    """Keys of samples, and their epoch."""
    key = torch.arange(count) * 0x1234567_89ABCDE - 2**61
    return key, torch.full_like(key, 3)


def batch_of(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    key, epoch = keys(rows)
    return {
        "pixels": torch.randint(0, 256, (rows, 16, 16, 3), dtype=torch.uint8, generator=generator),
        "label": torch.arange(rows) % 5,
        "weight": torch.ones(rows),
        "key": key,
        "epoch": epoch,
        "row": torch.arange(rows),
    }


def network(config: ViTConfig = MODEL) -> VisionTransformer:
    """A network whose classifier is not zero."""
    model = VisionTransformer(config, seed=1)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model


def loss_of(objective: Supervised, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss sum and correct rows."""
    returned = objective(batch)
    assert isinstance(returned, tuple)
    return returned[0], returned[1]["top1"]


# Stochastic depth


def test_branches_drop_at_their_rates_and_keep_their_mean() -> None:
    keep = keep_factors(7, 0.4, 5, *keys(20_000))
    assert (keep.shape, keep.dtype) == ((5, 2, 20_000), torch.float32)
    for block, rate in enumerate([0.0, 0.1, 0.2, 0.3, 0.4]):  # linear from the first to the last
        for branch in keep[block]:
            assert branch[branch > 0].unique().tolist() == pytest.approx([1 / (1 - rate)], rel=1e-7)
            error = 5 * math.sqrt(rate * (1 - rate) / 20_000)  # five deviations of a count
            assert abs((branch == 0).float().mean().item() - rate) <= error
            assert abs(branch.mean().item() - 1) <= error / (1 - rate) + 1e-6


def test_branches_are_drawn_on_their_own() -> None:
    """Correlations of 20,000 draws deviate by 1/√20,000; none of 28 pairs exceeds five of it."""
    dropped = (keep_factors(0, 0.5, 5, *keys(20_000))[1:] == 0).flatten(0, 1).double()
    correlation = torch.corrcoef(dropped) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)
    key, epoch = keys(20_000)
    first = keep_factors(0, 0.5, 2, key, epoch)[1] == 0
    for seed, other in ((1, epoch), (0, epoch + 1)):
        again = keep_factors(seed, 0.5, 2, key, other)[1] == 0
        assert abs((first == again).double().mean().item() - 0.5) < 5 * math.sqrt(0.25 / 40_000)


def test_one_block_is_never_dropped() -> None:
    assert torch.equal(keep_factors(0, 0.9, 1, *keys(50)), torch.ones(1, 2, 50))


@pytest.mark.parametrize("where", ["cpu", CUDA])
def test_factors_are_the_same_in_any_batch_and_place(where: str) -> None:
    key, epoch = (tensor.to(where) for tensor in keys(31))
    whole = keep_factors(11, 0.3, 12, key, epoch)
    parts = [keep_factors(11, 0.3, 12, key[rows], epoch[rows]) for rows in (slice(0, 4), slice(4, 5), slice(5, 31))]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert torch.equal(keep_factors(11, 0.3, 12, key.flip(0), epoch), whole.flip(2))
    assert torch.equal(whole.cpu(), keep_factors(11, 0.3, 12, *keys(31)))
    key, epoch = (tensor.to(where) for tensor in keys(6))
    assert (keep_factors(0, 0.5, 3, key, epoch) > 0).int().tolist() == [[[1] * 6] * 2, *GOLDEN_KEPT]


def test_objective_drops_branches_in_training_alone() -> None:
    batch = batch_of(8)
    dropping = Supervised(network(), Preprocess(16, 1.0), seed=4)
    plain = Supervised(network(replace(MODEL, drop_path=0.0)), Preprocess(16, 1.0), seed=4)
    assert not torch.equal(loss_of(dropping, batch)[0], loss_of(plain, batch)[0])
    assert torch.equal(dropping(batch, predict=True), plain(batch, predict=True))
    kept = keep_factors(4, 0.5, 3, batch["key"], batch["epoch"])
    images = (batch["pixels"].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    expected = F.cross_entropy(dropping.model(images, kept), batch["label"], reduction="sum")
    assert torch.allclose(loss_of(dropping, batch)[0], expected, rtol=1e-6)
    dropping.eval()
    plain.eval()
    assert torch.equal(loss_of(dropping, batch)[0], loss_of(plain, batch)[0])


def test_gradients_do_not_depend_on_micro_batches() -> None:
    """But for sums in another order, which leave 1e-6 of the largest."""
    batch, gradients = batch_of(12), []
    for size in (12, 5, 1):
        objective = Supervised(network(), Preprocess(16, 1.0), seed=4)
        for low in range(0, 12, size):
            loss_of(objective, {name: tensor[low : low + size] for name, tensor in batch.items()})[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() <= 1e-5 * gradients[0].abs().max()


def test_nothing_to_drop_makes_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale.pipeline.objectives.supervised.keep_factors", None)
    objective = Supervised(network(replace(MODEL, drop_path=0.0)), Preprocess(16, 1.0))
    batch = {name: tensor for name, tensor in batch_of(4).items() if name not in ("key", "epoch")}
    loss_of(objective, batch)
    with pytest.raises((TypeError, KeyError)):
        loss_of(Supervised(network(), Preprocess(16, 1.0)), batch)


# Losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_loss_is_the_binary_one_summed_over_classes(smoothing: float) -> None:
    """Against the definition in float64: float32 keeps 7 digits of a sum of 11 terms."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 11, generator=generator) * 4
    label = torch.randint(11, (20,), generator=generator)
    got = label_losses(logits, label, None, "sigmoid", smoothing)
    p = logits.double().sigmoid()
    target = torch.full((20, 11), smoothing / 11, dtype=torch.float64)
    target[torch.arange(20), label] = 1 - smoothing + smoothing / 11
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(dim=1)
    assert got.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    one_hot = F.one_hot(label, 11)
    assert torch.equal(label_losses(logits, label, one_hot, "sigmoid", smoothing), got)


def test_smoothing_and_mixing_labels_take_either_order() -> None:
    logits, one, other = torch.randn(4, 6), F.one_hot(torch.arange(4), 6).float(), torch.eye(6)[5].expand(4, 6)
    mixed = sigmoid_cross_entropy(logits, 0.3 * one + 0.7 * other, 0.2)
    apart = 0.3 * sigmoid_cross_entropy(logits, one, 0.2) + 0.7 * sigmoid_cross_entropy(logits, other, 0.2)
    assert torch.allclose(mixed, apart, rtol=1e-5)  # the loss is linear in its targets


def test_several_labels_are_learnt_and_counted() -> None:
    batch = batch_of(40)
    targets = torch.zeros(40, 5, dtype=torch.bool)
    targets[torch.arange(40), batch["label"]] = True
    targets[::2, 4] = True  # a second label, or the same again
    targets[7] = False  # none at all
    batch = {**batch, "label": torch.full((40,), -1), "targets": targets}
    batch["weight"][30:] = 0
    objective = Supervised(network(), Preprocess(16, 1.0), 0.1, loss="sigmoid").eval()
    logits = objective(batch, predict=True)
    assert isinstance(logits, Tensor)
    loss, top1 = loss_of(objective, batch)
    smooth = 0.9 * targets + 0.1 / 5
    expected = F.binary_cross_entropy_with_logits(logits[:30], smooth[:30], reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert top1 == sum(bool(targets[i, logits[i].argmax()]) for i in range(30))


def test_several_labels_are_mixed_as_their_images_are() -> None:
    batch = batch_of(40)
    targets = torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    single = DeviceAugment(AugmentConfig(mixup=0.8, cutmix=1.0), 0, 5)(batch)
    several = DeviceAugment(AugmentConfig(mixup=0.8, cutmix=1.0), 0, 5)({**batch, "targets": targets})
    assert single[1] is not None
    assert several[1] is not None
    assert torch.equal(single[0], several[0])
    partner = torch.arange(40) ^ 1
    share = single[1].gather(1, batch["label"][:, None])  # the labels of neighbours differ
    assert torch.allclose(several[1], share * targets.float() + (1 - share) * targets[partner].float(), atol=1e-6)
    objective = Supervised(
        network(), Preprocess(16, 1.0), 0.0, DeviceAugment(AugmentConfig(mixup=0.8), 0, 5), "sigmoid"
    )
    loss, top1 = loss_of(objective, {**batch, "targets": targets})
    loss.backward()
    assert math.isfinite(loss.item())
    assert 0 <= top1 <= 40


def test_sigmoid_counts_as_softmax_does() -> None:
    batch = batch_of(30)
    augment = DeviceAugment(AugmentConfig(mixup=0.8), 0, 5)
    kinds: Any = ("softmax", "sigmoid")
    softmax, sigmoid = (
        loss_of(Supervised(network(), Preprocess(16, 1.0), 0.1, augment, kind), batch) for kind in kinds
    )
    assert softmax[1] == sigmoid[1]
    assert softmax[0] != sigmoid[0]


def test_softmax_is_refused_for_several_labels() -> None:
    with pytest.raises(UserError, match=r"^objective\.loss: got softmax for data with several labels an image"):
        check_loss("softmax", multi=True)
    check_loss("softmax", multi=False)
    check_loss("sigmoid", multi=True)
