"""ViT-H/14: its first steps in 16 bits, and exports of its checkpoints in little memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitscale.model.build import build_network, initial_rules
from vitscale.model.initial import initial_weight
from vitscale.model.registry import ModelConfig
from vitscale.pipeline.config import EngineConfig, OptimConfig
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.engine import Engine
from vitscale.pipeline.objectives.supervised import Supervised
from vitscale.pipeline.saver import Saver
from vitscale.pipeline.weights import describe

pytestmark = pytest.mark.slow
NAME, CLASSES, STEPS = "vit_huge_patch14_224", 1000, 3
MODEL = ModelConfig(NAME).resolve(CLASSES)


def train_and_save(world: World, folder: str, stage: int) -> list[dict[str, float]]:
    """The first steps of a stage in bf16, of an image a rank and noise for a classifier, and a checkpoint."""

    def build() -> Supervised:
        network = build_network(MODEL, seed=None)
        network.recompute = "blocks"
        return Supervised(network, Preprocess(MODEL.img_size, 0.875))

    rules = (
        (r"^head\.weight$", lambda weight, generator: weight.normal_(std=0.01, generator=generator)),
        *initial_rules(MODEL),
    )
    engine = Engine(build, EngineConfig(zero_stage=stage, dtype="bf16"), OptimConfig(), world, accumulation=1)
    engine.load(lambda name: initial_weight(name.removeprefix("model."), engine.shapes[name], 0, rules))
    rows = []
    for step in range(STEPS if stage == 3 else 1):
        generator = torch.Generator().manual_seed(step * world.size + world.rank)
        side = MODEL.img_size
        batch = {
            "pixels": torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8, generator=generator),
            "label": torch.randint(0, CLASSES, (1,), generator=generator),
            "weight": torch.ones(1),
        }
        taken = engine.train_step([batch], world.size, lr=1e-4)
        assert not taken.refused
        rows.append(taken.means)
    told = describe(MODEL, [str(number) for number in range(CLASSES)], Preprocess(MODEL.img_size, 0.875))
    state = {"step": len(rows), "averaged": False, "dataset": {"fingerprint": "noise"}, **told}
    Saver(Path(folder) / "checkpoints", world, keep=1, background=False).save(engine, state)
    gather(None)
    return rows


EXPORT = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
if sys.argv[3] == "timm":
    from tests.peers import import_timm
    import_timm()
from vitscale.pipeline.export import export
made = export(sys.argv[1], sys.argv[2], [sys.argv[3]])[0]
size = (Path(sys.argv[2]) / "model.safetensors").stat().st_size
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"difference": made.difference, "reader": made.reader, "peak": peak / size}))
"""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_first_steps_and_exports(ranks: Callable[..., Any], tmp_path: Path, stage: int) -> None:
    """Exports take at most 1.5 times the file at any moment, Python, torch and mapped files included."""
    rows = ranks(__file__, "train_and_save", 2, str(tmp_path / "run"), stage, limit=1800)
    # the loss of a classifier that knows nothing: ln 1000 = 6.9, and what its weights of deviation 0.01 √1280 add
    assert all(3 < row["loss"] < 10 and 0 < row["grad_norm"] < 100 for row in rows), rows
    for name in ("safetensors", "hf", "timm"):
        out, root = tmp_path / name, Path(__file__).parents[2]
        command = [sys.executable, "-c", EXPORT, str(tmp_path / "run"), str(out), name, str(root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        print(stage, name, told)
        assert told["difference"] <= 1e-5
        assert told["peak"] <= 1.5, told
        assert {"safetensors": "vitscale", "hf": "transformers", "timm": "timm"}[name] in told["reader"]
        (out / "model.safetensors").unlink()
