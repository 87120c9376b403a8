"""Groups of parameters; every optimizer against its formulas in numpy, on flat partitions, and gone on with."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitscale.model.config import ViTConfig
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline.config import OPTIMIZERS, OptimConfig
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.optim import build_optimizer, fresh_state, parameter_groups, state_tensors
from vitscale.pipeline.optimizers import Lamb

CPU = torch.device("cpu")
MODEL = ViTConfig(img_size=16, patch_size=4, depth=2, width=32, mlp_width=64, heads=4, num_classes=5, pre_logits=True)
SHAPES = {  # of a network with one block; each optimizer treats some of them in a way of its own
    "model.patch_embed.proj.weight": (36, 2, 33, 32),  # factored over the first and the third dimension
    "model.pos_embed": (1, 33, 40),
    "model.blocks.0.attn.qkv.weight": (96, 32),
    "model.blocks.0.mlp.fc1.weight": (64, 32),
    "model.blocks.0.mlp.fc2.weight": (32, 64),
    "model.blocks.0.norm1.weight": (32,),
    "model.head.weight": (5, 32),
}
DECAYS = {name: 0.1 for name in SHAPES if name.endswith(("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight"))}
DECAYS["model.head.weight"] = 0.3
SCALES = {name: 0.9 if "blocks" in name else 1.0 if "head" in name else 0.81 for name in SHAPES}
STEPS, BETA1, BETA2, EPS, MOMENTUM = 25, 0.9, 0.98, 1e-6, 0.8


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are only held up by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(name: str) -> OptimConfig:
    return OptimConfig(
        name=name, beta1=BETA1, beta2=BETA2, eps=EPS, momentum=MOMENTUM, weight_decay=0.1, head_weight_decay=0.3,
        layer_decay=0.9,
    )  # fmt: skip


def network(shapes: dict[str, tuple[int, ...]] = SHAPES) -> nn.Module:
    """A module with parameters of these names, N(0, 0.5²), the same every time."""
    root, generator = nn.Module(), torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.randn(shape, generator=generator) / 2))
    return root


def noise(step: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """The gradient of one parameter at one step, of a size of its own."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(shape, generator=generator) * 10.0 ** (number % 3 - 2)


def rate(step: int) -> float:
    return 0.01 * (1 + step % 5)


def advance(optimizer: torch.optim.Optimizer, parameters: list[Tensor], first: int, last: int) -> None:
    """Steps `first` to `last`, with `noise` for gradients."""
    for step in range(first, last):
        for number, p in enumerate(parameters):
            p.grad = noise(step, number, tuple(p.shape))
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group["lr_scale"]
        optimizer.step()


def test_two_groups_without_layer_decay() -> None:
    objective = nn.ModuleDict({"model": VisionTransformer(MODEL, seed=1)})
    names = {id(p): name for name, p in objective.named_parameters()}
    for config in (OptimConfig(weight_decay=0.1), OptimConfig(weight_decay=0.0, head_weight_decay=0.0)):
        decayed, spared = parameter_groups(objective, config)
        kept = [n for n in names.values() if n.endswith("weight") and "norm" not in n]
        assert [names[id(p)] for p in decayed["params"]] == kept
        assert [names[id(p)] for p in spared["params"]] == [n for n in names.values() if n not in kept]
        assert (decayed["weight_decay"], spared["weight_decay"]) == (config.weight_decay, 0.0)
        assert decayed["lr_scale"] == spared["lr_scale"] == 1.0


def test_groups_by_layer_and_head() -> None:
    objective = nn.ModuleDict({"model": VisionTransformer(MODEL, seed=1)})
    objective.get_parameter("model.norm.bias").requires_grad_(False)
    names = {id(p): name.removeprefix("model.") for name, p in objective.named_parameters()}
    groups = parameter_groups(objective, OptimConfig(weight_decay=0.05, head_weight_decay=3.0, layer_decay=0.5))

    def block(i: int, *ends: str) -> list[str]:
        return [f"blocks.{i}.{end}" for end in ends]

    matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    vectors = (
        "norm1.weight", "norm1.bias", "attn.qkv.bias", "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.bias",
        "mlp.fc2.bias",
    )  # fmt: skip
    got = [(g["weight_decay"], g["lr_scale"], {names[id(p)] for p in g["params"]}) for g in groups]
    assert got == [
        (0.05, 0.125, {"patch_embed.proj.weight"}),
        (0.05, 0.25, set(block(0, *matrices))),
        (0.05, 0.5, set(block(1, *matrices))),
        (0.05, 1.0, {"pre_logits.fc.weight"}),
        (3.0, 1.0, {"head.weight"}),
        (0.0, 0.125, {"cls_token", "pos_embed", "patch_embed.proj.bias"}),
        (0.0, 0.25, set(block(0, *vectors))),
        (0.0, 0.5, set(block(1, *vectors))),
        (0.0, 1.0, {"norm.weight", "pre_logits.fc.bias", "head.bias"}),
    ]
    assert [g["spared"] for g in groups] == [False] * 5 + [True] * 4
    assert groups[1]["name"] == "decayed by 0.05, at 0.25 of the rate"
    assert len({g["name"] for g in groups}) == len(groups)


def test_muon_has_the_matrices_of_the_blocks_apart() -> None:
    objective = nn.ModuleDict({"model": VisionTransformer(MODEL, seed=1)})
    names = {id(p): name.removeprefix("model.") for name, p in objective.named_parameters()}
    groups = parameter_groups(objective, OptimConfig(name="muon"))
    assert [group.get("parts", 0) for group in groups] == [0, 3, 1, 0]
    other, qkv, matrices, spared = ([names[id(p)] for p in group["params"]] for group in groups)
    assert other == ["patch_embed.proj.weight", "pre_logits.fc.weight", "head.weight"]
    assert qkv == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    ends = ("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    assert matrices == [f"blocks.{i}.{end}" for i in range(2) for end in ends]
    assert len(other + qkv + matrices + spared) == len(names)


def test_a_partitioned_parameter_is_grouped_by_the_shape_it_had() -> None:
    """ZeRO stage 3 leaves an empty vector in its place."""
    objective, whole = network(), network()
    for p in objective.parameters():
        vars(p)["ds_shape"] = p.shape
        p.data = torch.empty(0)
    sizes = [len(g["params"]) for g in parameter_groups(objective, settings("adamw"))]
    assert sizes == [len(g["params"]) for g in parameter_groups(whole, settings("adamw"))]


# In float64, each from its paper: (weight, gradient, what is kept, step from 1, rate, decay, parameter's name) → weight
Array = np.ndarray
Kept = dict[str, Any]  # by a formula, of one parameter
Formula = Callable[[Array, Array, Kept, int, float, float, str], Array]


def adam(g: Array, kept: Kept, t: int) -> Array:
    kept["m"] = BETA1 * kept.get("m", 0.0) + (1 - BETA1) * g
    kept["v"] = BETA2 * kept.get("v", 0.0) + (1 - BETA2) * g**2
    return kept["m"] / (1 - BETA1**t) / (np.sqrt(kept["v"] / (1 - BETA2**t)) + EPS)


def adamw(w: Array, g: Array, kept: Kept, t: int, lr: float, decay: float, _: str) -> Array:
    return w - lr * (adam(g, kept, t) + decay * w)


def sgd(w: Array, g: Array, kept: Kept, t: int, lr: float, decay: float, _: str) -> Array:
    kept["b"] = MOMENTUM * kept.get("b", 0.0) + g + decay * w
    return w - lr * kept["b"]


def lion(w: Array, g: Array, kept: Kept, t: int, lr: float, decay: float, _: str) -> Array:
    c = BETA1 * kept.get("m", 0.0) + (1 - BETA1) * g
    kept["m"] = BETA2 * kept.get("m", 0.0) + (1 - BETA2) * g
    return w - lr * (np.sign(c) + decay * w)


def lamb(w: Array, g: Array, kept: Kept, t: int, lr: float, decay: float, _: str) -> Array:
    update = adam(g, kept, t) + decay * w
    ratio = np.sqrt((w**2).sum()) / np.sqrt((update**2).sum()) if decay else 1.0
    return w - lr * ratio * update


def adafactor(w: Array, g: Array, kept: Kept, t: int, lr: float, decay: float, name: str) -> Array:
    """Shazeer and Stern's R C / 1ᵀR with sums, matrix by matrix over the two axes that are factored."""
    beta2 = min(BETA2, 1 - t**-0.8)
    axes = {"model.patch_embed.proj.weight": (0, 2), "model.pos_embed": (1, 2)}.get(name, (0, 1))
    if name in ("model.blocks.0.norm1.weight", "model.head.weight"):
        kept["v"] = beta2 * kept.get("v", 0.0) + (1 - beta2) * g**2
        v = kept["v"]
    else:
        square = np.moveaxis(g**2, axes, (-2, -1))
        kept["R"] = beta2 * kept.get("R", 0.0) + (1 - beta2) * square.sum(-1)
        kept["C"] = beta2 * kept.get("C", 0.0) + (1 - beta2) * square.sum(-2)
        v = np.einsum("...r,...c->...rc", kept["R"], kept["C"]) / kept["R"].sum(-1)[..., None, None]
        v = np.moveaxis(v, (-2, -1), axes)
    m = BETA1 * kept.get("m", 0.0) + (1 - BETA1) * g / np.sqrt(v)
    kept["m"] = torch.from_numpy(m).to(torch.bfloat16).double().numpy()
    return w - lr * (m + decay * w)


def muon(w: Array, g: Array, kept: Kept, t: int, lr: float, decay: float, name: str) -> Array:
    """The quintic of Newton and Schulz acts on singular values, which are here at hand."""
    if "blocks" not in name or g.ndim < 2:
        return adamw(w, g, kept, t, lr, decay, name)
    kept["b"] = MOMENTUM * kept.get("b", 0.0) + g
    updates = []
    for matrix in np.split(g + MOMENTUM * kept["b"], 3 if "qkv" in name else 1):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        s = s / np.sqrt((s**2).sum())
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        updates.append(0.2 * np.sqrt(max(matrix.shape)) * (u * s) @ vt)
    return w - lr * (np.concatenate(updates) + decay * w)


FORMULAS: dict[str, Formula] = {
    "adamw": adamw, "sgd": sgd, "lion": lion, "lamb": lamb, "adafactor": adafactor, "muon": muon,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_equal_their_formulas(name: str) -> None:
    """Over 25 steps at rates up to 0.05. Each rounds weights and updates of some units to 24 bits: 25 × 2⁻²⁴ × 2.

    bfloat16 moments are the exception: where the last bit of float32 decides how one is rounded, 2⁻⁸ of it (it is at
    most of order 1) is off, and makes 0.05 × 2⁻⁸ of difference for a step, then less by 0.9 each.
    """
    objective = network()
    named = dict(objective.named_parameters())
    weights = {key: p.detach().double().numpy().copy() for key, p in named.items()}
    kept: dict[str, dict[str, Any]] = {key: {} for key in weights}
    for step in range(STEPS):
        for number, (key, w) in enumerate(weights.items()):
            g = noise(step, number, w.shape).double().numpy()
            lr, decay = rate(step) * SCALES[key], DECAYS.get(key, 0.0)
            weights[key] = FORMULAS[name](w, g, kept[key], step + 1, lr, decay, key)
    advance(build_optimizer(objective, settings(name)), list(named.values()), 0, STEPS)
    tolerance = 10 * 0.05 * 2**-8 if name == "adafactor" else 3e-6
    for key, p in named.items():
        difference = np.abs(p.detach().double().numpy() - weights[key])
        assert difference.max() < tolerance, key
        assert np.median(difference) < 3e-6, key  # few are rounded the other way


def test_lamb_leaves_spared_groups_and_zero_weights_at_adams_step() -> None:
    """A ratio to a norm of 0 would keep a zero-initialised classifier at zero; matrices are scaled at no decay too."""
    shapes = {"model.norm.weight": (6,), "model.head.weight": (5, 6), "model.blocks.0.mlp.fc1.weight": (7, 6)}
    objective = network(shapes)
    with torch.no_grad():
        objective.get_parameter("model.head.weight").zero_()
    before = copy.deepcopy(objective)
    optimizer = build_optimizer(objective, OptimConfig(name="lamb", weight_decay=0.0, eps=1e-12))
    advance(optimizer, list(objective.parameters()), 0, 1)
    for number, (name, p) in enumerate(objective.named_parameters()):
        moved = (before.get_parameter(name) - p).detach()
        sign = noise(0, number, tuple(p.shape)).sign()  # Adam's first update
        ratio = before.get_parameter(name).norm() / sign.norm() if "fc1" in name else 1.0
        torch.testing.assert_close(moved, rate(0) * ratio * sign, rtol=0, atol=1e-7)  # 2⁻²⁴ of weights of order 1


def partition(sizes: list[int], rank: int, ranks: int, stage: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """What a rank's flat holds, (parameter, its first element there, offset, elements), and its length, as ZeRO has it.

    Stage 2 cuts all parameters, one after the other, into equal ranges; stage 3 cuts each of them.
    """
    parts, start, offset = [], 0, 0
    length = -(-sum(sizes) // ranks) if stage == 2 else sum(-(-size // ranks) for size in sizes)
    for index, size in enumerate(sizes):
        if stage == 2:
            low, high = (min(max(edge * length - start, 0), size) for edge in (rank, rank + 1))
            parts.append((index, low, max(start - rank * length, 0), high - low))
            start += size
        else:
            share = -(-size // ranks)
            low, high = min(rank * share, size), min((rank + 1) * share, size)
            parts.append((index, low, offset, high - low))
            offset += share
    return parts, length


def partitioned_lamb(world: World, stage: int) -> dict[str, list[float]]:
    """All weights after `STEPS` steps of this rank's flat tensors, one for each group."""
    objective = network()
    named = list(objective.named_parameters())
    numbers = {id(p): number for number, (_, p) in enumerate(named)}
    optimizer = build_optimizer(objective, settings("lamb"))
    assert isinstance(optimizer, Lamb)
    held: list[tuple[Tensor, list[Tensor], list[tuple[int, int, int, int]]]] = []
    for group in optimizer.param_groups:
        whole = [p.detach().view(-1) for p in group["params"]]
        parts, length = partition([len(p) for p in whole], world.rank, world.size, stage)
        flat = torch.zeros(length)
        for index, start, offset, size in parts:
            flat[offset : offset + size] = whole[index][start : start + size]
        optimizer.place(flat, [(index, offset, size) for index, _, offset, size in parts], len(whole))
        fresh_state(optimizer, flat, 0)
        held.append((flat, group["params"], parts))
        group["params"] = [flat]
    for step in range(STEPS):
        for (flat, params, parts), group in zip(held, optimizer.param_groups, strict=True):
            group["lr"] = rate(step) * group["lr_scale"]
            flat.grad = torch.zeros_like(flat)
            for index, start, offset, size in parts:
                gradient = noise(step, numbers[id(params[index])], tuple(params[index].shape)).view(-1)
                flat.grad[offset : offset + size] = gradient[start : start + size]
        optimizer.step()
    pieces = [
        (numbers[id(params[index])], start, flat[offset : offset + size].tolist())
        for flat, params, parts in held
        for index, start, offset, size in parts
    ]
    weights: dict[int, list[float]] = {}
    for number, _, values in sorted(piece for rank in gather(pieces) for piece in rank):
        weights.setdefault(number, []).extend(values)
    return {named[number][0]: values for number, values in weights.items()}


def both_partitions(world: World) -> list[dict[str, list[float]]]:
    return [partitioned_lamb(world, stage) for stage in (2, 3)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_partitioned_lamb_equals_whole(ranks: Callable[..., Any], world_size: int) -> None:
    """A norm added up in another order is off by 2⁻²³ or so, and with it the step of at most 0.05 × the weight."""
    objective = network()
    advance(build_optimizer(objective, settings("lamb")), list(objective.parameters()), 0, STEPS)
    alone = World(rank=0, size=1, local_rank=0, device=CPU)
    for weights in both_partitions(alone) if world_size == 1 else ranks(__file__, "both_partitions", world_size):
        assert weights.keys() == SHAPES.keys()
        for name, p in objective.named_parameters():
            got = torch.tensor(weights[name]).view(p.shape)
            assert (got - p.detach()).abs().max() < 1e-6, name


def test_segments_that_cannot_be_are_refused() -> None:
    optimizer = Lamb([{"params": [torch.zeros(10)]}], lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    for segments in ([(0, 0, 6), (1, 5, 2)], [(0, 8, 3)], [(2, 0, 1)], [(0, -1, 2)]):
        with pytest.raises(ValueError, match="segment"):
            optimizer.place(torch.zeros(10), segments, count=2)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_flat_tensors_step_as_parameters_do(name: str) -> None:
    """But for the last bit: elements at the end of a tensor are computed one by one, and may be rounded otherwise."""
    whole, parted = network(), network()
    advance(build_optimizer(whole, settings(name)), list(whole.parameters()), 0, STEPS)
    numbers = {id(p): number for number, p in enumerate(parted.parameters())}
    optimizer = build_optimizer(parted, settings(name))
    params = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [torch.cat([p.detach().view(-1) for p in group["params"]])]
        fresh_state(optimizer, group["params"][0], 0)
    for step in range(STEPS):
        for group, own in zip(optimizer.param_groups, params, strict=True):
            group["lr"] = rate(step) * group["lr_scale"]
            gradients = [noise(step, numbers[id(p)], tuple(p.shape)).view(-1) for p in own]
            group["params"][0].grad = torch.cat(gradients)
        optimizer.step()
    stepped = list(whole.parameters())
    for group, own in zip(optimizer.param_groups, params, strict=True):
        expected = torch.cat([stepped[numbers[id(p)]].detach().view(-1) for p in own])
        torch.testing.assert_close(group["params"][0], expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_begun_and_gone_on_with(name: str) -> None:
    """Zero moments are what the first step finds; and what is read after some steps goes on bit for bit."""
    untouched, begun = network(), network()
    advance(build_optimizer(untouched, settings(name)), list(untouched.parameters()), 0, 6)
    optimizer = build_optimizer(begun, settings(name))
    for p in begun.parameters():
        fresh_state(optimizer, p, 0)
    advance(optimizer, list(begun.parameters()), 0, 3)
    resumed = copy.deepcopy(begun)
    restored = build_optimizer(resumed, settings(name))
    for before, p in zip(begun.parameters(), resumed.parameters(), strict=True):
        fresh_state(restored, p, 3)
        count = optimizer.state[before].get("step")
        assert name == "sgd" or (count.dtype, count.ndim, float(count)) == (torch.float32, 0, 3.0)
        saved, own = state_tensors(optimizer, before), state_tensors(restored, p)
        assert saved.keys() == own.keys()
        assert not any(tensor.any() for tensor in own.values())
        for key, tensor in own.items():
            assert tensor.is_floating_point()
            tensor.view(-1).copy_(saved[key].view(-1))
    for module, going_on in ((begun, optimizer), (resumed, restored)):
        advance(going_on, list(module.parameters()), 3, 6)
        for expected, p in zip(untouched.parameters(), module.parameters(), strict=True):
            assert torch.equal(expected, p)


def test_what_is_kept_of_each_weight() -> None:
    """Float32 numbers a weight: 2, 1, 1, 2; Adafactor half of one and the factors; Muon 1 for the blocks' matrices."""
    expected = {"adamw": 2, "sgd": 1, "lion": 1, "lamb": 2, "adafactor": 0.5 + (32 + 64) / (32 * 64), "muon": 1}
    for name, count in expected.items():
        objective = network()
        optimizer, p = (
            build_optimizer(objective, settings(name)),
            objective.get_parameter("model.blocks.0.mlp.fc2.weight"),
        )
        fresh_state(optimizer, p, 0)
        assert sum(t.numel() * t.element_size() for t in state_tensors(optimizer, p).values()) == 4 * count * p.numel()
    objective = network()
    plain = build_optimizer(objective, OptimConfig(name="sgd", momentum=0.0))
    for p in objective.parameters():
        fresh_state(plain, p, 0)
    advance(plain, list(objective.parameters()), 0, 1)
    assert not any(state_tensors(plain, p) for p in objective.parameters())


@pytest.mark.parametrize(
    ("name", "lr"),
    [("adamw", 3e-3), ("sgd", 3e-2), ("lion", 3e-3), ("lamb", 3e-2), ("adafactor", 3e-3), ("muon", 3e-3)],
)
def test_optimizers_learn_noise_by_heart(name: str, lr: float) -> None:
    """10 images of 5 classes, at first as likely as each other: from ln 5 to less than half of it in 40 steps."""
    model = VisionTransformer(MODEL, seed=1)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(10, 3, 16, 16, generator=generator), torch.arange(10) % 5
    optimizer = build_optimizer(nn.ModuleDict({"model": model}), OptimConfig(name=name))
    for group in optimizer.param_groups:
        group["lr"] = lr

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(41)]
    assert losses[0] == pytest.approx(np.log(5), abs=1e-6)  # the classifier starts at zero
    assert losses[-1] < losses[0] / 2
