"""Images with several labels: read, batched, evaluated."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.decode import encode
from vitscale.data_prep.shard import shard
from vitscale.errors import UserError
from vitscale.pipeline.config import AugmentConfig
from vitscale.pipeline.data import order
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.data.loader import (
    EvaluationView,
    LoaderSettings,
    TrainingView,
    evaluation_batches,
    training_batches,
)
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.evaluation import classification as evaluation
from vitscale.pipeline.evaluation.classification import average_precision, classification

NAMES = ["blue", "green", "grey", "red", "striped"]
IMAGES = 60


def labels_of(number: int) -> list[int]:
    """Every seventh image has none, the others one to three, some of them twice."""
    if number % 7 == 0:
        return []
    return sorted({number % 4, number % 3, number * 5 % 4}) + ([number % 4] if number % 5 == 0 else [])


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of noise with labels by name, in three shards. No image is striped."""
    root = tmp_path_factory.mktemp("several")
    random = np.random.default_rng(0)
    images = [encode(random.integers(0, 256, (20, 20, 3), dtype=np.uint8), "png") for _ in range(IMAGES)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    feature = '{"info": {"features": {"labels": {"feature": {"names": ["blue", "green", "grey", "red", "striped"]}}}}}'
    schema = pa.schema(
        [("image", kind), ("labels", pa.list_(pa.int64())), ("number", pa.int64())], metadata={"huggingface": feature}
    )
    rows = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(images)]
    table = pa.table([rows, [labels_of(number) for number in range(IMAGES)], list(range(IMAGES))], schema=schema)
    pq.write_table(table, root / "table.parquet")
    shard(str(root / "table.parquet"), str(root / "shards"), ShardConfig(shard_samples=20))
    return root / "shards"


def number_of(folder: Path) -> dict[str, int]:
    """Key of each sample → its number in the source."""
    rows = [row for part in sorted((folder / "manifest").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    return {row["key"]: number for number, row in enumerate(rows)}


def test_the_store_reads_all_labels(several: Path) -> None:
    store, numbers = Store(str(several), "data.train"), number_of(several)
    assert store.multi
    assert store.classes == NAMES
    for place in range(len(store)):
        sample = store.read(place)
        assert list(sample.labels) == labels_of(numbers[sample.key])
    assert not any(sample.label >= 0 for sample in map(store.read, range(len(store))) if len(sample.labels) != 1)


def test_labels_that_cannot_be_are_refused(several: Path, tmp_path: Path) -> None:
    folder = copytree(several, tmp_path / "shards")
    sidecar = sorted(folder.glob("*.samples.parquet"))[0]
    table = pq.read_table(sidecar)
    at = table.column_names.index("labels")
    for bad in ([5], [None], [-1]):
        lists = pa.array([bad, *table.column("labels").to_pylist()[1:]], pa.list_(pa.int32()))
        pq.write_table(table.set_column(at, "labels", lists), sidecar)
        with pytest.raises(UserError, match="cannot be in its sidecar"):
            Store(str(folder), "data.train").read(0)
    lists = pa.array([None] * len(table), pa.list_(pa.int32()))
    pq.write_table(table.set_column(at, "labels", lists), sidecar)
    assert Store(str(folder), "data.train").read(0).labels == ()


def test_kinds_of_labels_do_not_mix(several: Path, digits: Any) -> None:
    assert not Store(str(digits.train), "data.train").multi
    with pytest.raises(UserError, match=r"^data\.train: .* of which one has several labels an image"):
        Store([str(several), str(digits.train)], "data.train")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_a_column_for_each_class(several: Path, workers: int) -> None:
    store, numbers = Store(str(several), "data.train"), number_of(several)
    plan = order.Order(store.sizes, [1], seed=3, streams=2, window=64, size=14)
    view, world = TrainingView(16, AugmentConfig(), 0), World(0, 1, 0, torch.device("cpu"))
    seen = 0
    for batch in training_batches(store, plan, view, LoaderSettings(5, workers), world, range(8)):
        assert (batch["targets"].shape, batch["targets"].dtype) == ((5, 5), torch.bool)
        assert "labels" not in batch
        for row in range(5):
            expected = labels_of(numbers[store.read(int(batch["number"][row])).key]) if batch["weight"][row] else []
            assert batch["targets"][row].nonzero()[:, 0].tolist() == sorted(set(expected))
            seen += int(batch["weight"][row])
    assert seen == 8 * 14


def test_average_precision_is_scikit_learns() -> None:
    """Also where scores are equal. Ours adds in float64, as theirs does."""
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    for levels in (2, 5, 1000):
        scores = random.integers(0, levels, (12, 300)).astype(np.float32)
        targets = random.random((12, 300)) < np.linspace(0.01, 0.9, 12)[:, None]
        targets[0] = False
        targets[0, 17] = True
        got = average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
        expected = [average_precision_score(targets[k], scores[k]) for k in range(12)]
        assert got.tolist() == pytest.approx(expected, abs=1e-12)
    assert average_precision(torch.randn(1, 4), torch.zeros(1, 4, dtype=torch.bool)).isnan().all()


class Scores(nn.Module):
    """An objective that knows one image from another by its pixels, and scores it with few levels."""

    def forward(self, batch: dict[str, Tensor], predict: bool = False) -> Tensor:
        assert predict
        pixels = batch["pixels"].flatten(1).double()
        waves = torch.sin(pixels[:, :50] @ torch.arange(50 * 5).reshape(50, 5).double())
        return (waves * 4).round().float()


def evaluate(world: World, folder: str, loss: str = "sigmoid") -> list[dict[str, Any]]:
    """What every rank gets."""
    batches = evaluation_batches(
        Store(folder, "data.val"), EvaluationView(Preprocess(16, 1.0)), LoaderSettings(7, 0), world
    )
    return gather(dict(classification(Scores(), batches, 5, loss)))


def test_evaluation_is_exact_at_any_number_of_ranks(several: Path, ranks: Callable[..., Any]) -> None:
    from sklearn.metrics import average_precision_score

    store, numbers = Store(str(several), "data.val"), number_of(several)
    view = EvaluationView(Preprocess(16, 1.0))
    samples = [store.read(place) for place in range(len(store))]
    pixels = torch.from_numpy(np.stack([view(sample.data, 0, sample.key) for sample in samples]))
    scores = Scores()({"pixels": pixels}, predict=True)
    targets = torch.zeros(len(samples), 5)
    for row, sample in enumerate(samples):
        targets[row, labels_of(numbers[sample.key])] = 1
    expected = np.mean([average_precision_score(targets[:, k], scores[:, k]) for k in range(4)])  # none is striped
    one = evaluate(World(0, 1, 0, torch.device("cpu")), str(several))[0]
    assert one["map"] == pytest.approx(expected, abs=1e-12)
    best = scores.argmax(dim=1)
    assert one["images"] == len(samples)
    assert one["top1"] == sum(targets[row, best[row]].item() for row in range(len(samples))) / len(samples)
    mean = nn.functional.binary_cross_entropy_with_logits(scores, targets, reduction="sum").item() / len(samples)
    assert one["loss"] == pytest.approx(mean, rel=1e-6)
    assert one["top5"] is None
    assert one["confusion"] is None
    for size in (2, 3):
        for got in ranks(__file__, "evaluate", size, str(several)):
            assert got["loss"] == pytest.approx(one["loss"], rel=1e-6)  # sums of float32 in another order
            assert {**got, "loss": 0} == {**one, "loss": 0}


def test_too_many_scores_are_not_kept(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    whole = evaluate(world, str(several))[0]
    monkeypatch.setattr(evaluation, "SORTED_SCORES", 100)  # a class at a time
    assert evaluate(world, str(several))[0] == whole
    monkeypatch.setattr(evaluation, "MOST_SCORES", 200)
    got = evaluate(world, str(several))[0]
    assert got == {**whole, "map": None}
