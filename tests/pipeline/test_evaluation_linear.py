"""Few-shot least squares and linear classifiers, beside scikit-learn and plain loops."""

import math

import numpy as np
import pytest
import torch

from vitscale.pipeline.data.order import mixed
from vitscale.pipeline.evaluation import linear as probes
from vitscale.pipeline.evaluation.features import Features, of_arrays
from vitscale.pipeline.evaluation.fewshot import BIAS, GRID, L2, LeastSquares, chosen, fewshot
from vitscale.pipeline.evaluation.linear import Scale, linear, logistic, sgd


@pytest.fixture(scope="module")
def blobs() -> tuple[Features, Features]:
    """Features of 5 classes that overlap: 300 to train on, 200 to judge by, 12 wide, on very different scales."""
    random = np.random.default_rng(0)
    centres, scales = 1.5 * random.standard_normal((5, 12)), 10.0 ** random.uniform(-2, 2, 12)
    found = []
    for images in (300, 200):
        labels = random.integers(0, 5, images)
        values = (centres[labels] + random.standard_normal((images, 12))) * scales + 3 * scales
        found.append(of_arrays(values.astype(np.float32), labels, random.integers(-(2**63), 2**63 - 1, images)))
    return found[0], found[1]


@pytest.mark.parametrize("images", [8, 40])  # fewer than features, and more
def test_least_squares_are_ridge_regression(blobs: tuple[Features, Features], images: int) -> None:
    from sklearn.linear_model import Ridge

    train, test = blobs
    values, labels = train.rows(0, images), train.labels[:images]
    fit = LeastSquares(values, labels, 5)
    wide = values.astype(np.float64)
    scaled, other = ((x - wide.mean(axis=0)) / (wide.std(axis=0) + 1e-5) for x in (wide, test.rows(0, 200)))
    x, x_test = (np.pad(each, ((0, 0), (0, 1)), constant_values=BIAS) for each in (scaled, other))
    targets = np.where(labels[:, None] == np.arange(5), 1.0, -1.0)
    for l2 in (2.0**-3, L2, 2.0**20):
        ridge = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(x, targets)
        # the smallest eigenvalues are off by 1e-16 of the largest, 4e5, beside a penalty of 0.1
        np.testing.assert_allclose(fit.weights(l2).numpy(), ridge.coef_.T, atol=1e-8)
        assert (fit.best(test.rows(0, 200), fit.weights(l2)) == ridge.predict(x_test).argmax(axis=1)).all()


def test_few_shots_are_the_mean_over_the_choices(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    got = dict(fewshot(train, test, 6, shots=(1, 5)))  # a class that no image has does no harm
    assert list(got) == ["1shot", "5shot"]
    for shots in (1, 5):
        expected = np.zeros(200)
        for seed in range(3):
            numbers = chosen(train.keys, train.labels, shots, seed)
            fit = LeastSquares(train.take(numbers), train.labels[numbers], 6)
            expected += fit.best(test.rows(0, 200), fit.weights(L2)) == test.labels
        assert got[f"{shots}shot"].tolist() == (expected / 3).tolist()
    assert 0.3 < np.mean(got["1shot"]) < np.mean(got["5shot"])  # a fifth by chance
    whole = dict(fewshot(train, test, 6, shots=(5,), l2s=GRID))
    assert len(whole) == 31
    assert (whole["5shot_l2_2^10"] == got["5shot"]).all()
    least = np.bincount(train.labels).min()
    told = dict(fewshot(train, test, 6, shots=(1, least, least + 1)))  # of one class there are fewer
    assert list(told) == ["1shot", f"{least}shot"]


def test_choices_are_of_keys_and_seed_alone() -> None:
    random = np.random.default_rng(1)
    keys, labels = random.integers(-(2**63), 2**63 - 1, 500), random.integers(0, 7, 500)
    labels[labels == 3] = 4
    labels[17] = 3
    one = chosen(keys, labels, 5, 0)
    assert np.bincount(labels[one]).tolist() == [5, 5, 5, 1, 5, 5, 5]
    assert set(chosen(keys, labels, 1, 0)) < set(one)
    assert set(chosen(keys, labels, 5, 1)) != set(one)
    shuffled = random.permutation(500)
    assert set(keys[shuffled][chosen(keys[shuffled], labels[shuffled], 5, 0)]) == set(keys[one])
    for label in range(7):  # a draw for each, the smallest ones taken
        drawn = sorted(
            (int(mixed(mixed(keys[i : i + 1].view(np.uint64)))[0]), i) for i in np.flatnonzero(labels == label)
        )
        assert {i for _, i in drawn[:5]} == set(one[labels[one] == label])


def test_logistic_regression_is_scikit_learns(
    blobs: tuple[Features, Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr(probes, "CHUNK", 64)
    train, _ = blobs
    rows = np.arange(0, 300, 2)
    scale = Scale.of(train)
    wide = train.rows(0, 300).astype(np.float64)
    np.testing.assert_allclose(scale.mean, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(scale.deviation, wide.std(axis=0), rtol=1e-12)
    scaled = (wide - wide.mean(axis=0)) / wide.std(axis=0)
    head: torch.Tensor | None = None
    for l2 in (1e-1, 1e-3):
        head = logistic(train, rows, 5, scale, l2, head)
        theirs = LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-10, max_iter=10_000)
        theirs.fit(scaled[rows], train.labels[rows])
        # both stop where a gradient is below 1e-8, at a curvature of 1e-3 and more: 1e-5; measured 4e-6
        np.testing.assert_allclose(head[:-1].T, theirs.coef_, atol=2e-5)
        bias = theirs.intercept_ - np.mean(theirs.intercept_)  # a constant added to all of them changes nothing
        np.testing.assert_allclose(head[-1] - torch.mean(head[-1]), bias, atol=2e-5)


def test_sgd_is_that_of_torch(blobs: tuple[Features, Features]) -> None:
    train, _ = blobs
    rows, rates = np.arange(10, 290), (0.03, 0.3)
    scale = Scale.of(train)
    heads = sgd(train, rows, 5, scale, rates, least_steps=12, dtype=torch.float64)
    x, labels = scale.padded(train.take(rows), torch.float64), torch.from_numpy(train.labels[rows])
    for rate, head in zip(rates, heads, strict=True):
        weight = torch.zeros(13, 5, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.SGD([weight], lr=rate, momentum=0.9)
        for step in range(12):
            solver.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / 12)) / 2
            solver.zero_grad()
            torch.nn.functional.cross_entropy(x @ weight, labels).backward()
            solver.step()
        torch.testing.assert_close(head, weight.detach(), atol=1e-12, rtol=0)  # 12 steps of float64


def test_batches_of_an_epoch_are_all_of_it(blobs: tuple[Features, Features], monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = blobs
    seen: list[int] = []
    take = Features.take

    def noting(self: Features, numbers: np.ndarray) -> np.ndarray:
        seen.extend(numbers.tolist())
        return take(self, numbers)

    monkeypatch.setattr(Features, "take", noting)
    monkeypatch.setattr(probes, "BATCH", 70)
    sgd(train, np.arange(290), 5, Scale.of(train), (0.1,), least_steps=1)
    assert len(seen) == 10 * 4 * 70  # ten epochs, each without the ragged rest
    assert all(len(set(seen[epoch * 280 :][:280])) == 280 for epoch in range(10))
    assert seen[:280] != seen[280:560]


def test_probes_are_as_good_as_scikit_learns(blobs: tuple[Features, Features]) -> None:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.preprocessing import StandardScaler

    train, test = blobs
    got = dict(linear(train, test, 5))
    assert list(got) == ["sgd_rate", "sgd_top1", "lbfgs_l2", "lbfgs_top1"]
    scaler = StandardScaler().fit(train.rows(0, 300))
    options = {"max_iter": 2_000, "scoring": "accuracy", "l1_ratios": (0,), "use_legacy_attributes": False}
    theirs = LogisticRegressionCV(**options)  # pyright: ignore[reportArgumentType]
    theirs.fit(scaler.transform(train.rows(0, 300)), train.labels)
    expected = theirs.score(scaler.transform(test.rows(0, 200)), test.labels)
    for name in ("sgd_top1", "lbfgs_top1"):
        assert abs(np.mean(got[name]) - expected) <= 0.02  # four of 200 images: other penalties were tried
