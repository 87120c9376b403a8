"""Fine-tuning: what of trained weights is kept, frozen or changed in a few numbers, at every ZeRO stage.

Each test starts its ranks once and goes through all stages in them: starting is what costs.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.pipeline.runs import TINY, losses
from tests.pipeline.test_micro_batch import SMALL, allocated, image, make_plan
from vitscale.errors import UserError
from vitscale.launch.recipes import RECIPES
from vitscale.model import lora
from vitscale.model.build import build_network
from vitscale.model.config import MixerConfig, ResNetConfig, SwinConfig, ViTConfig
from vitscale.model.flops import forward_macs
from vitscale.model.initial import Rules, initial_weight
from vitscale.model.interop import Tensors, View, described, exported
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline import checkpoint
from vitscale.pipeline.config import Config, EngineConfig, FinetuneConfig, OptimConfig
from vitscale.pipeline.console import OUT
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.engine import EMA, Engine
from vitscale.pipeline.estimate import estimate
from vitscale.pipeline.export import export
from vitscale.pipeline.finetune import check_architecture, check_trained, choose_trained, image_flops
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.optim import build_optimizer
from vitscale.pipeline.placement import States, place
from vitscale.pipeline.planner import Plan, plan
from vitscale.pipeline.recipe import load_recipe
from vitscale.pipeline.saver import Saver
from vitscale.pipeline.train import make_objective
from vitscale.pipeline.weights import Trained, open_trained

MODEL = ViTConfig(img_size=16, patch_size=4, depth=3, width=32, mlp_width=64, heads=4, num_classes=5)
OPTIM = OptimConfig(weight_decay=0.1, clip=0.5, layer_decay=0.8, ema=0.9)
LR = 1e-2
BATCH = 12
# at stage 3, else all of so small a model would be held whole on every rank; some of it is
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}
RULES: Rules = (
    (r"^head\.weight$", lambda weight, generator: weight.normal_(std=0.1, generator=generator)),  # of zeros nothing
    (r"\.lora_b$", lambda weight, generator: weight.normal_(std=0.1, generator=generator)),  # would come back
    *lora.RULES,
    *VisionTransformer.rules(MODEL),
)
CHOICES = {
    "one": FinetuneConfig(freeze=1),
    "all": FinetuneConfig(freeze="all"),
    "lora": FinetuneConfig(lora_rank=2, lora_alpha=4.0),
    "every": FinetuneConfig(lora_rank=2, lora_on="all"),
}
# stage, type, and whether blocks are computed again in the backward pass
ENGINES = [(0, "fp32", "none"), (1, "fp32", "none"), (2, "fp32", "none"), (3, "fp32", "none"), (3, "fp32", "blocks"),
           (2, "bf16", "none"), (3, "bf16", "none")]  # fmt: skip


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return initial_weight(name, shape, 1, RULES)


def objective(chosen: FinetuneConfig, recompute: str = "none") -> Supervised:
    network = VisionTransformer(MODEL, seed=None)
    choose_trained(network, chosen)
    network.recompute = recompute
    return Supervised(network, Preprocess(16, 1.0))


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (BATCH, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return {
        "pixels": pixels,
        "label": torch.randint(0, 5, (BATCH,), generator=generator),
        "weight": torch.ones(BATCH),
    }


def batches(step: int, world: World) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's two micro batches."""
    own = {key: value[world.rank :: world.size] for key, value in batch(step).items()}
    for half in range(2):
        yield {key: value[half::2] for key, value in own.items()}


def make_engine(world: World, stage: int, chosen: FinetuneConfig, dtype: str = "fp32", **more: Any) -> Engine:
    recompute = more.get("recompute", "none")
    size = BATCH // world.size // 2
    config = EngineConfig(zero_stage=stage, dtype=dtype, micro_batch=size, deepspeed=PARTITIONED, **more)
    made = Engine(lambda: objective(chosen, recompute), config, OPTIM, world, accumulation=2)
    made.load(lambda name: weight(name.removeprefix("model."), made.shapes[name]))
    return made


def steps(engine: Engine, world: World, first: int, last: int) -> list[float]:
    taken = [engine.train_step(batches(step, world), BATCH, LR) for step in range(first, last)]
    assert not any(step.refused for step in taken)
    return [step.means["loss"] for step in taken]


def plain_loop(chosen: FinetuneConfig, count: int) -> list[float]:
    """The same training by PyTorch alone, on whole batches."""
    made = objective(chosen)
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            p.copy_(weight(name, tuple(p.shape)))
    optimizer, rows = build_optimizer(made, OPTIM), []
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = LR * group["lr_scale"]
        loss = made(batch(step))[0] / BATCH
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in made.parameters() if p.requires_grad], OPTIM.clip)
        optimizer.step()
        rows.append(loss.item())
    return rows


def kept_as_they_were(engine: Engine, chosen: FinetuneConfig) -> bool:
    """Whether the frozen weights that this rank holds are those of the start, bit for bit in their type, and the only
    ones without state or average."""
    frozen = {f"model.{name}" for name, p in objective(chosen).model.named_parameters() if not p.requires_grad}
    for fragment in engine.fragments():
        if (set(fragment.tensors) == {"weight"}) != (fragment.name in frozen):
            return False
        if fragment.name in frozen:
            view = fragment.tensors["weight"]
            begun = weight(fragment.name.removeprefix("model."), engine.shapes[fragment.name]).reshape(-1)
            if not torch.equal(view, begun[fragment.start :][: len(view)].to(view.dtype)):
                return False
    return True


def train_at_all_stages(world: World, names: list[str], count: int) -> dict[str, Any]:
    """Losses for each choice by each engine, of the second choice by every third, the norms of the weights, and whether
    all else was as it is to be."""
    rows: dict[str, Any] = {}
    sound: list[bool] = []
    for name in names:
        for stage, dtype, recompute in ENGINES[:: 1 if name == names[0] else 3]:
            engine = make_engine(world, stage, CHOICES[name], dtype, recompute=recompute)
            losses = steps(engine, world, 0, count)
            rows[f"{name} {stage} {dtype} {recompute}"] = [losses, engine.weight_norm()]
            sound.append(kept_as_they_were(engine, CHOICES[name]))
            sound.append(len(set(gather(engine.checksum()))) == 1)
            with engine.averaged():
                sound.append(kept_as_they_were(engine, CHOICES[name]))
    return {**rows, "sound": all(all(each) for each in gather(sound))}


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (2, ["one", "lora"]),
        *(pytest.param(size, [name, "every"], marks=pytest.mark.slow) for size in (1, 3) for name in ("lora", "all")),
    ],
)
def test_stages_equal_a_plain_loop(ranks: Callable[..., Any], world_size: int, names: list[str]) -> None:
    """Over 8 steps at a rate of 1e-2, in bf16 over 4, before what is rounded has grown; the tolerances are those of
    tests/pipeline/test_engine.py."""
    got = ranks(__file__, "train_at_all_stages", world_size, names, 8)
    assert got.pop("sound")
    for name in names:
        expected = plain_loop(CHOICES[name], 8)
        norm = got[f"{name} 0 fp32 none"][1]
        for stage, dtype, recompute in ENGINES[:: 1 if name == names[0] else 3]:
            losses, held = got[f"{name} {stage} {dtype} {recompute}"]
            exact = dtype == "fp32"
            wanted = pytest.approx(expected if exact else expected[:4], abs=1e-4 if exact else 4e-2)
            assert losses[: 8 if exact else 4] == wanted, (name, stage, dtype, recompute)
            assert held == pytest.approx(norm, rel=1e-5 if exact else 4e-3), (name, stage)  # 2⁻⁸, in bf16


RESUMED = [(0, 3, "fp32"), (3, 2, "bf16")]  # stage saved, gone on at, type
MORE = [(2, 0, "fp32"), (3, 1, "fp32"), (1, 3, "bf16"), (2, 3, "bf16")]


def save_at(world: World, folder: str, resumed: list[list[Any]]) -> dict[str, list[float]]:
    """3 steps, save, 3 steps at each stage, then `resume`."""
    rows = {}
    for saved, _, dtype in resumed:
        engine = make_engine(world, saved, CHOICES["one"], dtype)
        steps(engine, world, 0, 3)
        Saver(Path(folder) / f"{saved} {dtype}", world, keep=1, background=False).save(engine, {"step": 3})
        rows[f"{saved} {dtype}"] = go_on(engine, world)
    return rows | resume(world, folder, resumed, same=True)


def go_on(engine: Engine, world: World) -> list[float]:
    """Losses of 3 more steps, and the norms of the average and of the weights."""
    losses = steps(engine, world, 3, 6)
    assert kept_as_they_were(engine, CHOICES["one"])
    with engine.averaged():
        return [*losses, engine.weight_norm()]


def resume(world: World, folder: str, resumed: list[list[Any]], same: bool = False) -> dict[str, list[float]]:
    rows = {}
    for saved, stage, dtype in resumed:
        reader = checkpoint.Reader(checkpoint.checkpoints(Path(folder) / f"{saved} {dtype}")[0])
        for at in (saved, stage) if same else (stage,):
            engine = make_engine(world, at, CHOICES["one"], dtype)
            checkpoint.restore(reader, engine, steps=3)
            rows[f"{saved}→{at} {dtype}"] = go_on(engine, world)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [RESUMED, pytest.param(MORE, marks=pytest.mark.slow)])
def test_a_run_goes_on_at_any_stage_and_world_size(
    ranks: Callable[..., Any], tmp_path: Path, resumed: list[Any]
) -> None:
    """Bit for bit where nothing changed; elsewhere within what another order of sums leaves, in bf16 of 8 bits."""
    rows = ranks(__file__, "save_at", 2, str(tmp_path), resumed)
    again = ranks(__file__, "resume", 1, str(tmp_path), resumed)
    for saved, stage, dtype in resumed:
        assert rows[f"{saved}→{saved} {dtype}"] == rows[f"{saved} {dtype}"]
        for got in (rows, again):
            tolerance = 1e-5 if dtype == "fp32" else 2e-2
            assert got[f"{saved}→{stage} {dtype}"] == pytest.approx(rows[f"{saved} {dtype}"], abs=tolerance)
    for saved, _, dtype in resumed:
        every_weight_once(checkpoint.checkpoints(tmp_path / f"{saved} {dtype}")[0], dtype)


def every_weight_once(path: Path, dtype: str) -> None:
    """Of frozen parameters the weights alone, as float32 of what the network computes with; no element twice."""
    reader = checkpoint.Reader(path)
    made = objective(CHOICES["one"])
    frozen = {name for name, p in made.named_parameters() if not p.requires_grad}
    for name, p in made.named_parameters():
        begun = weight(name.removeprefix("model."), tuple(p.shape))
        read = reader.tensor(name)
        average = reader.tensor(name, EMA)
        if name in frozen:
            assert torch.equal(read, begun.to(torch.bfloat16).float() if dtype == "bf16" else begun)
            assert torch.equal(average, read)
        else:
            assert not torch.equal(average, read)
    for (name, kind), parts in reader._ranges.items():
        assert kind == "weight" or name not in frozen
        ends = [0, *(stop for _, stop, *_ in parts)]
        assert [start for start, *_ in parts] == ends[:-1]


# Whole runs


SHORT = ("data.workers=0", "eval.every=0", "engine.micro_batch=30", "train.duration=6", "checkpoint.every=3",
         "guard.compare_every=2")  # fmt: skip


def run(world: World, digits: list[str], folder: str, *more: str) -> str:
    """Train on the digits as `vitscale` does, in this process; returns what was said."""
    from vitscale.pipeline.train import train

    with OUT.capture() as said:
        train(planned(digits, folder, *more), world)
    return said.get()


def planned(digits: list[str], folder: str, *more: str, force: bool = False) -> Plan:
    data = (f"data.train={digits[0]}", f"data.val='{digits[1]}'", f"run.dir={folder}")
    config = load_recipe("digits-demo", [*TINY, *SHORT, *data, *more], RECIPES)
    return plan(config, 1, force=force)


def with_lora(world: World, digits: list[str], folder: str) -> dict[str, Any]:
    """Pretrain, fine-tune by LoRA, go on from the middle of that; export, and start again from it."""
    root, rows = Path(folder), {}
    run(world, digits, f"{root}/a", "train.duration=3")
    chosen = (f"init_from={root}/a", "finetune.lora_rank=2", "finetune.lora_alpha=6", "optim.ema=0.5")
    chosen = (*chosen, "model.img_size=48", "optim.lr=0.01")
    rows["said"] = run(world, digits, f"{root}/b", *chosen)
    shutil.copytree(root / "b", root / "c")
    shutil.rmtree(root / "c" / "checkpoints" / "step-00000006")
    rows["again"] = run(world, digits, f"{root}/c", *chosen)
    made = make_objective(planned(digits, f"{root}/b", *chosen))
    reader = checkpoint.Reader(checkpoint.checkpoints(root / "b" / "checkpoints")[0])
    images = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for kind in ("raw", "ema"):
        made.load_state_dict({name: reader.tensor(name, kind.replace("raw", "weight")) for name in reader.shapes})
        merged = open_trained(f"{root}/b", "x", kind).load()
        with torch.no_grad():
            trained, plain = made.model.eval()(images), merged(images)
        rows[kind] = float((trained - plain).abs().max())
        rows[f"{kind} range"] = float(plain.max() - plain.min())
    export(f"{root}/b", f"{root}/exported", weights="raw")
    rows["plain"] = run(
        world, digits, f"{root}/d", f"init_from={root}/exported", "finetune.freeze=all", "model.img_size=48"
    )
    rows["raw at"] = run(world, digits, f"{root}/e", f"init_from={root}/b", "finetune.weights=raw", "finetune.freeze=1")
    return rows


def test_lora_from_the_first_step_to_an_export(ranks: Callable[..., Any], digits: Any, tmp_path: Path) -> None:
    rows = ranks(__file__, "with_lora", 1, [str(digits.train), str(digits.test)], str(tmp_path))
    assert (
        "LoRA of rank 2, times 3, on attention's matrices of the blocks; frozen: all else but the head" in rows["said"]
    )
    # 2 blocks × (2·32 + 96·2 for queries, keys and values; 2·32 + 32·2 behind them) and a head of 32·10 + 10
    assert f"of which {2 * (256 + 128) + 330:,} are trained" in rows["said"]
    assert "position embeddings interpolated from 4×4 to 6×6" in rows["said"]
    assert "going on from step 3" in rows["again"]
    assert losses(tmp_path / "c") == losses(tmp_path / "b")
    b, c = (checkpoint.Reader(checkpoint.checkpoints(tmp_path / name / "checkpoints")[0]) for name in "bc")
    assert all(torch.equal(b.tensor(name, kind), c.tensor(name, kind)) for name in b.shapes for kind in ("weight", EMA))
    for kind in ("raw", "ema"):  # of logits that differ by
        assert rows[kind] < 1e-5 < 1e-2 < rows[f"{kind} range"]
    # the exported network is the trained one: with all but the head frozen nothing of it changes
    before, after = (dict(open_trained(str(tmp_path / name), "x", "raw").tensors()) for name in ("exported", "d"))
    a = dict(open_trained(str(tmp_path / "a"), "x").tensors())
    for name in a:
        kept = name not in ("pos_embed", "head.weight", "head.bias")
        assert torch.equal(before[name], after[name]) == (not name.startswith("head."))
        assert torch.equal(before[name], a[name]) == (kept and not name.endswith(("qkv.weight", "attn.proj.weight")))
    assert "frozen: all but the head" in rows["plain"]
    e = dict(open_trained(str(tmp_path / "e"), "x").tensors())
    assert torch.equal(e["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    assert not torch.equal(e["blocks.1.attn.qkv.weight"], before["blocks.1.attn.qkv.weight"])
    (state := checkpoint.checkpoints(tmp_path / "c" / "checkpoints")[0] / "state.json").write_text(
        state.read_text().replace('"lora_alpha": 6.0', '"lora_alpha": "six"')
    )
    with pytest.raises(UserError, match="alpha of nan"):
        open_trained(str(tmp_path / "c"), "x").load()
    with pytest.raises(UserError, match=r"finetune\.lora_rank: 2 → 0"):
        planned([str(digits.train), str(digits.test)], str(tmp_path / "b"), force=True)


def test_matrices_that_do_not_fit_are_named() -> None:
    tensors = {"fc.weight": torch.zeros(4, 3), "fc.lora_a": torch.ones(2, 3), "fc.lora_b": torch.ones(4, 2)}
    plain = lora.added_up(opened(tensors), 5.0)
    assert plain.shapes == {"fc.weight": (4, 3)}
    assert torch.equal(plain.read("fc.weight"), torch.full((4, 3), 2 * 5 / 2))
    for name, value in (("fc.lora_b", None), ("fc.lora_a", torch.ones(3, 3)), ("fc.weight", torch.zeros(3, 4))):
        wrong = {**tensors, name: value}
        with pytest.raises(ValueError, match="fc of shape"):
            lora.added_up(opened({key: value for key, value in wrong.items() if value is not None}), 5.0)
    for alpha in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha"):
            lora.added_up(opened(tensors), alpha)


def opened(tensors: dict[str, torch.Tensor]) -> Tensors:
    return Tensors({name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__)


# From other projects' weights

THEIRS = ViTConfig(img_size=32, patch_size=8, depth=2, width=64, mlp_width=96, heads=1, num_classes=7)
OURS = ("model.width=64", "model.mlp_width=96", "model.heads=1", "model.patch_size=8")
VIEW = View(0.8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def foreign(folder: Path, layout: str) -> Path:
    """Weights as another project leaves them, the last of which say nothing of preprocessing."""
    model = replace(THEIRS, mlp="gelu_tanh") if layout == "google" else THEIRS
    theirs = exported(layout, model, opened(VisionTransformer(model, seed=3).state_dict()))
    tensors = {name: theirs.read(name).clone() for name in theirs.shapes}
    folder.mkdir()
    if layout == "google":
        arrays: dict[str, Any] = {name: value.numpy() for name, value in tensors.items()}
        np.savez(folder / "vit.npz", **arrays)
        return folder / "vit.npz"
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, content in described(layout, THEIRS, list("abcdefg"), VIEW).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def from_elsewhere(world: World, digits: list[str], folder: str) -> dict[str, Any]:
    """Fine-tune from what each project leaves; with one, go on from the middle without it."""
    rows = {}
    for layout in ("hugging_face", "timm", "google"):
        source, tuned = foreign(Path(folder) / layout, layout), Path(folder) / f"{layout}-tuned"
        chosen = [*OURS, f"init_from={source}", "train.duration=2", "checkpoint.every=1", "optim.lr=1e-4"]
        chosen += ["model.mlp=gelu_tanh"] if layout == "google" else []
        chosen += ["model.img_size=[32,48]"] if layout == "hugging_face" else []
        rows[layout] = run(world, digits, str(tuned), *chosen)
        if layout == "timm":
            shutil.rmtree(tuned / "checkpoints" / "step-00000002")
            shutil.rmtree(source)
            rows["again"] = run(world, digits, str(tuned), *chosen)
    return rows


def at_fixed_positions(world: World, digits: list[str], folder: str) -> list[Any]:
    """Pretrain, fine-tune at a larger size, and go on from the middle of that without what it came from."""
    fixed = ("model.positions=sincos2d", "train.duration=2", "checkpoint.every=1")
    tuned = (*fixed, f"init_from={folder}/a", "model.img_size=48")
    run(world, digits, f"{folder}/a", *fixed)
    run(world, digits, f"{folder}/b", *tuned)
    shutil.rmtree(f"{folder}/b/checkpoints/step-00000002")
    shutil.rmtree(f"{folder}/a")
    run(world, digits, f"{folder}/b", *tuned)
    return [losses(Path(folder) / "b"), open_trained(f"{folder}/b", "x").model.summary]


def test_fixed_positions_stay_between_those_that_were_trained(
    ranks: Callable[..., Any], digits: Any, tmp_path: Path
) -> None:
    found, summary = ranks(__file__, "at_fixed_positions", 1, [str(digits.train), ""], str(tmp_path))
    assert len(found) == 2
    assert "sincos grid 4-4" in summary


def test_images_are_normalised_as_for_the_weights_it_starts_from(
    ranks: Callable[..., Any], digits: Any, tmp_path: Path
) -> None:
    said = ranks(__file__, "from_elsewhere", 1, [str(digits.train), str(digits.test)], str(tmp_path))
    told = "images are normalised by mean 0.485, 0.456, 0.406 and deviation 0.229, 0.224, 0.225, as for the weights"
    begun = dict(VisionTransformer(THEIRS, seed=3).named_parameters())
    for layout in ("hugging_face", "timm", "google"):
        assert "kept 30 tensors" in said[layout]
        assert "dropped head.bias, head.weight; the new head for 10 classes starts at zero" in said[layout]
        assert (told in said[layout]) == (layout != "google")
        trained = open_trained(str(tmp_path / f"{layout}-tuned"), "x")
        plain = (0.5, 0.5, 0.5)
        expected = (plain, plain) if layout == "google" else (VIEW.mean, VIEW.std)
        assert (trained.preprocess.mean, trained.preprocess.std) == expected
        oblong = layout == "hugging_face"
        assert ("position embeddings interpolated from 4×4 to 4×6" in said[layout]) == oblong
        assert trained.preprocess.img_size == trained.model.img_size == ((32, 48) if oblong else 32)
        for name, value in trained.tensors():  # two steps at 1e-4
            if oblong and name == "pos_embed":
                assert value.shape == (1, 25, 64)
                continue
            assert name.startswith("head.") or (value - begun[name]).abs().max() <= 3e-4
    assert "going on from step 1" in said["again"]
    made = make_objective(
        planned([str(digits.train), ""], str(tmp_path / "n"), *OURS, f"init_from={tmp_path}/hugging_face")
    )
    assert (made.preprocess.mean, made.preprocess.std) == (VIEW.mean, VIEW.std)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("init_from=''", "finetune.freeze=1"), "finetune.freeze: got 1 without init_from"),
        (("init_from=''", "finetune.freeze=all"), "finetune.freeze: got all without init_from"),
        (("init_from=''", "finetune.lora_rank=4"), "finetune.lora_rank: got 4 without init_from"),
        (("finetune.freeze=3",), "finetune.freeze: got 3 blocks; expected at most the 2 that there are"),
        (("finetune.lora_rank=64",), "finetune.lora_rank: got 64 for matrices of 64"),
        (("finetune.lora_rank=4", "model.mixing=fourier"), "Set finetune.lora_on=all"),
        (("model.img_size=44",), "Set model.img_size to 40 or 48"),
        (("model.depth=3",), "model.depth=2"),
        (("finetune.weights=ema",), "where there are no two kinds of weights"),
    ],
)
def test_what_cannot_be_is_refused_before_it_begins(
    digits: Any, tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    source = str(foreign(tmp_path / "theirs", "hugging_face"))
    words = [f"init_from={source}", *(word.replace("SOURCE", source) for word in settings)]
    with pytest.raises(UserError) as error:
        planned([str(digits.train), ""], str(tmp_path / "run"), *OURS, *words)
    assert said in " ".join(str(error.value).split())


def test_architectures_without_what_is_asked_for() -> None:
    chosen = Config(finetune=FinetuneConfig(lora_rank=4, lora_on="all"))
    with pytest.raises(UserError, match=r"Use finetune\.freeze"):
        check_trained(chosen, ResNetConfig(img_size=32, depths=(1, 1), factor=1, num_classes=3))
    mixer = MixerConfig(img_size=32, patch_size=8, depth=1, width=16, tokens_width=16, channels_width=16, num_classes=3)
    trained = Trained(Path("m"), mixer, list("abc"), Preprocess(32, 1.0), {}, lambda: opened({}))
    with pytest.raises(UserError, match=r"Set model\.img_size=32"):
        check_architecture(replace(mixer, img_size=48), trained)
    check_architecture(replace(mixer, img_size=48, patch_size=12), trained)  # as many, of resized patches


def test_arithmetic_is_counted_of_what_is_trained() -> None:
    """Blocks alone all but make up this network: a step of all is 3 forward passes, of none but the head 1."""
    vit = replace(MODEL, depth=8)
    forward = 2 * forward_macs(vit)

    def passes(**chosen: Any) -> float:
        return image_flops(vit, FinetuneConfig(**chosen)) / forward

    assert passes() == 3
    assert passes(freeze="all") == pytest.approx(1, abs=0.01)
    assert passes(freeze=4) == pytest.approx(2, abs=0.05)
    assert passes(freeze=8) == pytest.approx(1, abs=0.01)
    small = image_flops(replace(vit, width=256, mlp_width=1024), FinetuneConfig(lora_rank=1))
    # gradients of activations, of which attention has two products for each of the forward pass, and none of weights
    assert small / (2 * forward_macs(replace(vit, width=256, mlp_width=1024))) == pytest.approx(2, abs=0.1)


def test_what_is_frozen_and_what_lora_is_added_to() -> None:
    def trained(model: Any, **chosen: Any) -> set[str]:
        with torch.device("meta"):
            network = build_network(model, seed=None)
            choose_trained(network, FinetuneConfig(**chosen))
        return {name for name, p in network.named_parameters() if p.requires_grad}

    vit = replace(MODEL, depth=2, pre_norm=True, pool="map", registers=1, pre_logits=True)
    first = trained(vit, freeze=1)
    assert {name.split(".")[0] for name in first} == {"blocks", "norm", "attn_pool", "pre_logits", "head"}
    assert all(name.startswith("blocks.1.") for name in first if name.startswith("blocks."))
    assert {name.split(".")[0] for name in trained(vit, freeze=2)} == {"norm", "attn_pool", "pre_logits", "head"}
    head = {"pre_logits.fc.weight", "pre_logits.fc.bias", "head.weight", "head.bias"}
    assert trained(vit, freeze="all") == head
    both = [f"blocks.0.{layer}.lora_{matrix}" for layer in ("attn.qkv", "attn.proj") for matrix in "ab"]
    assert trained(replace(vit, depth=1), lora_rank=2) == head | set(both)
    more = [f"blocks.0.mlp.{layer}.lora_{matrix}" for layer in ("fc1", "fc2") for matrix in "ab"]
    assert trained(replace(vit, depth=1), lora_rank=2, lora_on="all") == head | {*both, *more}
    swin = SwinConfig(img_size=32, patch=4, window=4, width=16, depths=(1, 1), heads=(2, 2), num_classes=3)
    assert {name.split(".")[1] for name in trained(swin, freeze=1) if name.startswith("layers")} == {"1"}
    assert "layers.1.blocks.0.attn.proj.lora_b" in trained(swin, lora_rank=2)


# Memory


@pytest.mark.parametrize(
    ("chosen", "more"),
    [
        ({"freeze": 4}, ()),
        ({"freeze": 1}, ("engine.recompute=blocks",)),
        ({"freeze": "all"}, ()),
        ({"lora_rank": 4}, ()),
    ],
)
def test_what_an_image_takes_where_little_is_trained(
    digits: Any, tmp_path: Path, chosen: dict[str, Any], more: tuple[str, ...]
) -> None:
    """As tests/pipeline/test_micro_batch.py has it for all that is trained, and by the same figures of torch's."""
    whole = make_plan(digits.train, tmp_path, *SMALL, *more)
    plan = replace(whole, config=replace(whole.config, finetune=FinetuneConfig(**chosen)))
    assert image(plan) == pytest.approx((allocated(plan, 32) - allocated(plan, 16)) / 16, rel=0.05)
    assert image(plan) < image(whole) * 1.05


def test_states_are_of_what_is_trained() -> None:
    states = States("fp32", kept=3, frozen=400)
    assert states.bytes_a_rank(1000, 0, 4) == 1000 * 4 + 600 * (4 + 12)
    assert states.bytes_a_rank(1000, 1, 4) == 1000 * 4 + 600 * (4 + 16 / 4)
    assert states.bytes_a_rank(1000, 3, 4) == (1000 * 4 + 600 * (4 + 16)) / 4
    assert states.on_device(1000, 1, 4, "optimizer") == 1000 * 4 + 600 * 4
    assert states.on_device(1000, 3, 4, "all") == 600 * 4 / 4
    assert "1,000 parameters, of which 600 are trained" in place(EngineConfig(), 1000, 4, states, None).why


def test_an_estimate_counts_what_is_trained() -> None:
    config = load_recipe("vit-b16-i1k-augreg", ["finetune.freeze=all", "engine.zero_stage=1"], RECIPES)
    found = estimate(config, 2, images=1_281_167, classes=1000, memory=80e9)
    head = 769 * 768 + 769 * 1000  # with the hidden layer before it
    states = States(config.engine.dtype, 2 + (config.optim.ema > 0), found.parameters - head)
    assert found.states == states.bytes_a_rank(found.parameters, 1, 2)
    assert found.checkpoint == 4 * (found.parameters + states.kept * head)
    assert found.states < 0.3 * estimate(replace(config, finetune=FinetuneConfig()), 2, 1_281_167, 1000, 80e9).states
    assert f"of which {head:,} are trained" in found.placement.why
