"""Calibration, accuracy by class, intervals and reassessed labels, beside naive loops in float64."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.decode import encode
from vitscale.data_prep.shard import shard
from vitscale.errors import UserError
from vitscale.pipeline.data.augment import Preprocess
from vitscale.pipeline.data.loader import EvaluationView, LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation import bootstrap
from vitscale.pipeline.evaluation.bootstrap import interval, mean_intervals, resampled_sums
from vitscale.pipeline.evaluation.calibration import (
    calibration,
    ece_interval,
    per_class,
    read_real,
    real,
    reliability,
    reliability_plot,
)
from vitscale.pipeline.evaluation.outcomes import Outcomes, outcomes

ALONE = World(0, 1, 0, torch.device("cpu"))
EDGES = [number / 15 for number in range(16)]


def drawn(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, some of them on the edges of bins, and whether they were right."""
    random = np.random.default_rng(images)
    confidence = random.beta(4, 2, images)
    confidence[: len(EDGES)] = EDGES
    return confidence, (random.random(images) < confidence**1.3).astype(np.float64)


@pytest.mark.parametrize("images", [16, 1_000])
def test_calibration_error_is_that_of_a_naive_loop(images: int) -> None:
    confidence, right = drawn(images)
    table, error = reliability(confidence, right), 0.0
    for number in range(15):
        inside = [
            i for i in range(images)
            if EDGES[number] < confidence[i] <= EDGES[number + 1] or (number == 0 and confidence[i] == 0)
        ]  # fmt: skip
        assert table.images[number] == len(inside)
        if inside:
            mean, share = (math.fsum(of[i] for i in inside) / len(inside) for of in (confidence, right))
            assert table.confidence[number] == pytest.approx(mean, abs=1e-14)
            assert table.accuracy[number] == pytest.approx(share, abs=1e-14)
            error += len(inside) / images * abs(mean - share)
    assert table.ece == pytest.approx(error, abs=1e-14)
    found = ece_interval(confidence, right)
    assert found.value == pytest.approx(error, abs=1e-14)
    assert found.low < found.high
    assert reliability(np.array([1.0, 1.0]), np.array([1.0, 1.0])).ece == 0
    assert reliability(np.array([1.0, 1.0]), np.array([0.0, 0.0])).ece == 1


def test_accuracy_by_class_leaves_out_classes_without_images() -> None:
    random = np.random.default_rng(0)
    label, best = random.integers(0, 6, 200), random.integers(0, 6, 200)
    label[label == 4] = 3
    right = (label == best).astype(np.float64)
    accuracy, images = per_class(label, right, 7)
    for number in (0, 1, 2, 3, 5):
        own = [b == number for a, b in zip(label, best, strict=True) if a == number]
        assert (images[number], accuracy[number]) == (len(own), sum(own) / len(own))
    assert images[[4, 6]].tolist() == [0, 0]
    assert np.isnan(accuracy[[4, 6]]).all()
    shares = np.full(200, 0.5)
    got = dict(calibration(Outcomes(label, label, best, shares, shares, shares), list("abcdefg")))
    assert got["mean_per_class"] == pytest.approx(np.nanmean(accuracy), abs=1e-15)
    assert [name for name in got if name.startswith("class/")] == [f"class/{name}" for name in "abcdf"]
    assert [name for name in got if name.startswith("bin")] == ["bin08_images", "bin08_confidence", "bin08_accuracy"]


@pytest.mark.parametrize("images", [1, 37, 200])
def test_resampling_is_that_of_a_naive_loop(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(images).random((images, 3))
    sums = resampled_sums(values, seed=5, resamples=11)
    for number in range(11):
        words = np.random.Philox(key=[5, 3], counter=[0, 0, number, 0]).random_raw(images // 2 + 1).tolist()
        halves = [half for word in words for half in (word >> 32, word % 2**32)][:images]
        expected = np.sum([values[half * images // 2**32] for half in halves], axis=0)
        np.testing.assert_allclose(sums[number], expected, rtol=1e-13)  # float64 sums in another order
    monkeypatch.setattr(bootstrap, "TOGETHER", 2 * images)
    np.testing.assert_allclose(resampled_sums(values, seed=5, resamples=11), sums, rtol=1e-13)


def test_intervals_are_percentiles_and_as_wide_as_theory_has_it() -> None:
    right = np.zeros((900, 2))
    right[:630, 0], right[:, 1] = 1, 1
    found, certain = mean_intervals(right, seed=1)
    assert found == mean_intervals(right, seed=1)[0] != mean_intervals(right, seed=2)[0]
    assert (found.value, certain) == (0.7, (1, 1, 1))
    deviation = math.sqrt(0.7 * 0.3 / 900)
    # an end of 1,000 resamples has a standard error of 0.09 deviations
    assert found.low == pytest.approx(0.7 - 1.96 * deviation, abs=0.3 * deviation)
    assert found.high == pytest.approx(0.7 + 1.96 * deviation, abs=0.3 * deviation)
    means = np.sort(resampled_sums(right, seed=1)[:, 0] / 900)
    assert found.low == pytest.approx(np.percentile(means, 2.5), abs=1e-15)
    ratio = interval(right, lambda means: means[:, 0] / means[:, 1], seed=1)
    assert ratio == pytest.approx(found, abs=1e-15)


class Scores(nn.Module):
    """An objective that knows one image from another by its pixels; times `factor`."""

    def __init__(self, factor: float = 1) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, batch: dict[str, Tensor], predict: bool = False) -> Tensor:
        assert predict
        return self.factor * torch.sin(
            batch["pixels"].flatten(1)[:, :300].double() @ torch.arange(3000).reshape(300, 10).double()
        )


def test_outcomes_are_those_of_the_classifier(digits: Any) -> None:
    store, view = Store(str(digits.test), "DATASET"), EvaluationView(Preprocess(16, 1.0))
    got = outcomes(Scores(), store, view, LoaderSettings(50, 0), ALONE)
    for number in range(0, len(store), 7):
        sample = store.read(number)
        pixels = torch.from_numpy(np.array(view(sample.data, 0, sample.key)))[None]
        logits = Scores()({"pixels": pixels}, predict=True)[0].tolist()
        powers = [math.exp(value) for value in logits]
        shares = [power / math.fsum(powers) for power in powers]
        assert (got.label[number], got.best[number]) == (sample.label, shares.index(max(shares)))
        assert got.confidence[number] == pytest.approx(max(shares), abs=1e-14)
        assert got.loss[number] == pytest.approx(-math.log(shares[sample.label]), abs=1e-13)
        brier = math.fsum((share - (place == sample.label)) ** 2 for place, share in enumerate(shares))
        assert got.brier[number] == pytest.approx(brier, abs=1e-14)

    with pytest.raises(UserError, match=r"^CHECKPOINT: got logits that are not finite"):
        outcomes(Scores(math.nan), store, view, LoaderSettings(50, 0), ALONE)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images with names as ImageNet's, in no order, of two classes."""
    root = tmp_path_factory.mktemp("named")
    for number in (5, 2, 4, 1, 6, 3):
        folder = root / "images" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        (folder / f"ILSVRC2012_val_{number:08d}.png").write_bytes(encode(noise, "png"))
    shard(str(root / "images"), str(root / "shards"), ShardConfig())
    return root / "shards"


def test_reassessed_labels_are_found_by_number_key_and_name(named: Path, tmp_path: Path) -> None:
    store, file = Store(str(named), "DATASET"), tmp_path / "real.json"
    found = outcomes(Scores(), store, EvaluationView(Preprocess(16, 1.0)), LoaderSettings(4, 0), ALONE)
    file.write_text(json.dumps([[0], [], [0, 1], [1], ["dog"], []]))
    labels = read_real(str(file), str(named), store.classes)
    by_key = {key: labels[key] for key in found.key.tolist()}
    assert sorted(map(sorted, by_key.values())) == [[], [], [0], [0, 1], [1], [1]]
    odd = [key for key, label in zip(found.key.tolist(), found.label.tolist(), strict=True) if label == 0]
    assert sorted(sorted(by_key[key]) for key in odd) == [[0], [0, 1], [1]]  # numbers 1, 3 and 5
    judged = Outcomes(found.key, found.label, found.label, *[found.loss] * 3)
    right = [
        label in by_key[key] for key, label in zip(found.key.tolist(), found.label.tolist(), strict=True) if by_key[key]
    ]
    got = dict(real(judged, labels))
    assert got["real_images"] == 4
    assert got["real_top1"].tolist() == right
    keys = {store.read(number).key: [1] for number in range(3)}
    file.write_text(json.dumps({**keys, "dog/ILSVRC2012_val_00000002.png": [0], "ILSVRC2012_val_00000004.png": [0]}))
    assert 4 <= len(read_real(str(file), str(named), store.classes)) <= 5
    with pytest.raises(UserError, match="real labels of none"):
        dict(real(judged, {}))
    for none in ({"nowhere": [0]}, [[]] * 6):
        file.write_text(json.dumps(none))
        with pytest.raises(UserError, match="labels of none of the images"):
            read_real(str(file), str(named), store.classes)


@pytest.mark.parametrize("text", ["{", "3", "[3]", "[[2]]", "[[-1]]", '[["cow"]]', "[[[0]]]"])
def test_reassessed_labels_that_cannot_be_are_refused(named: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "real.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"^--suite: got real="):
        read_real(str(file), str(named), ["cat", "dog"])


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert reliability_plot(tmp_path / "plot.png", reliability(*drawn(300)), "digits")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
