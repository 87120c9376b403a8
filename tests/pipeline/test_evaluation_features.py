"""Frozen features: each image once, in the order of the dataset, the same at any number of ranks; and k-NN on them."""

import json
import math
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from vitscale.errors import UserError
from vitscale.model.config import ViTConfig
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline.data.augment import Preprocess, key_number, normalise
from vitscale.pipeline.data.loader import EvaluationView, LoaderSettings
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.distributed import World
from vitscale.pipeline.evaluation import knn as nearest
from vitscale.pipeline.evaluation.feature_files import create
from vitscale.pipeline.evaluation.features import Features, features, identity, of_arrays, read
from vitscale.pipeline.evaluation.knn import knn, neighbours

MODEL = ViTConfig(img_size=16, patch_size=8, depth=1, width=16, mlp_width=32, heads=2, num_classes=10)
PREPROCESS = Preprocess(16, 1.0)
ALONE = World(0, 1, 0, torch.device("cpu"))


def extract(world: World, dataset: str, root: str, dtype: str = "float32", seed: int = 0) -> list[str]:
    network = VisionTransformer(MODEL, seed=seed).eval()
    settings = LoaderSettings(50, 0)
    features(network, Store(dataset, "DATASET"), PREPROCESS, settings, world, Path(root), dtype=dtype)
    return sorted(path.name for path in Path(root).iterdir())


def test_features_are_those_of_the_network_in_order(digits: Any, tmp_path: Path, ranks: Callable[..., Any]) -> None:
    store, network = Store(str(digits.test), "DATASET"), VisionTransformer(MODEL, seed=0).eval()
    names = {2: ranks(__file__, "extract", 2, str(digits.test), str(tmp_path / "2"))}
    names[1] = extract(ALONE, str(digits.test), str(tmp_path / "1"))
    samples = [store.read(number) for number in range(len(store))]
    view = EvaluationView(PREPROCESS)
    pixels = torch.from_numpy(np.stack([view(sample.data, 0, sample.key) for sample in samples]))
    with torch.inference_mode():
        expected = network.representation(network.forward_features(normalise(pixels, PREPROCESS))).numpy()
    for size, name in names.items():
        assert len(name) == 1
        assert name == names[1]
        found = read(tmp_path / str(size) / name[0])
        assert found is not None
        assert len(found.parts) == size
        # values of up to 3; products of batches of other sizes may round otherwise, and here did not
        np.testing.assert_allclose(found.rows(0, len(store)), expected, atol=2e-6)
        assert found.labels.tolist() == [sample.label for sample in samples]
        assert found.keys.tolist() == [key_number(sample.key) for sample in samples]
        some = np.array([358, 0, 119, 120, 179, 180, 5])
        assert (found.take(some) == found.rows(0, 359)[some]).all()
        assert (np.concatenate([rows for _, rows in found.chunks(100)]) == found.rows(0, 359)).all()
        files = sorted((tmp_path / str(size) / name[0]).glob("*.safetensors"))
        assert [file.name for file in files] == [f"features-{n:05d}-of-{size:05d}.safetensors" for n in range(size)]
        loaded = [load_file(file) for file in files]  # by the library
        assert (np.concatenate([each["features"] for each in loaded]) == found.rows(0, 359)).all()
        for kind in ("labels", "keys"):
            assert np.concatenate([each[kind] for each in loaded]).tolist() == getattr(found, kind).tolist()


def test_features_are_used_again_only_where_they_are_the_same(digits: Any, tmp_path: Path) -> None:
    first = extract(ALONE, str(digits.test), str(tmp_path))
    file = tmp_path / first[0] / "features-00000-of-00001.safetensors"
    written = file.stat().st_mtime_ns
    assert extract(ALONE, str(digits.test), str(tmp_path)) == first
    assert file.stat().st_mtime_ns == written
    assert len(extract(ALONE, str(digits.test), str(tmp_path), seed=1)) == 2
    assert len(extract(ALONE, str(digits.test), str(tmp_path), dtype="float16")) == 3
    assert len(extract(ALONE, str(digits.train), str(tmp_path))) == 4
    (tmp_path / first[0] / "features.json").unlink()  # as if it had been killed
    assert read(tmp_path / first[0]) is None
    assert len(extract(ALONE, str(digits.test), str(tmp_path))) == 4
    assert file.stat().st_mtime_ns > written
    network = VisionTransformer(MODEL, seed=0)
    told = identity(network, PREPROCESS, Store(str(digits.test), "x"))
    with torch.no_grad():
        network.get_parameter("norm.bias")[3] += 1e-7
    assert identity(network, PREPROCESS, Store(str(digits.test), "x")) != told


def garbled(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    assert len(old) == len(new)
    return data.replace(old, new)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "the header alone": lambda data: data[:200],
    "cut short": lambda data: data[:-1],
    "too long": lambda data: data + b" ",
    "length of the header": lambda data: b"\xff" * 8 + data[8:],
    "no JSON": lambda data: data[:8] + b"\0" * 100 + data[108:],
    "other shape": lambda data: garbled(data, b"[359, 16]", b"[16, 359]"),
    "other type": lambda data: garbled(data, b'"F32"', b'"I32"'),
    "other place": lambda data: garbled(data, b"[2872, 5744]", b"[0002, 5744]"),
}


def test_damaged_features_are_computed_again(digits: Any, tmp_path: Path) -> None:
    folder = tmp_path / extract(ALONE, str(digits.test), str(tmp_path))[0]
    file, done = folder / "features-00000-of-00001.safetensors", folder / "features.json"
    whole, told = file.read_bytes(), json.loads(done.read_text())
    for name, damage in DAMAGE.items():
        file.write_bytes(damage(whole))
        assert read(folder) is None, name
    extract(ALONE, str(digits.test), str(tmp_path))
    assert file.read_bytes() == whole
    others = [{"format": 1}, {"ranks": 0}, {"ranks": 2}, {"images": 358}, {"width": "x"}, {"dtype": "save"}]
    for text in ("", "[]", "{}", *(json.dumps({**told, **other}) for other in others)):
        done.write_text(text)
        assert read(folder) is None, text
    extract(ALONE, str(digits.test), str(tmp_path))
    assert json.loads(done.read_text()) == told


def test_a_disk_without_room_is_told(digits: Any, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes of a file, of which 28,920 are needed
    try:
        with pytest.raises(UserError, match=r"^--out: got .*File too large.*; expected room for features"):
            extract(ALONE, str(digits.test), str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_features_that_are_no_numbers_are_refused(digits: Any, tmp_path: Path) -> None:
    network = VisionTransformer(MODEL, seed=0).eval()
    store = Store(str(digits.test), "DATASET")
    for value, dtype in ((math.nan, "float32"), (1e6, "float16")):
        with torch.no_grad():
            network.get_parameter("norm.bias")[3] = value
        with pytest.raises(UserError, match=r"^CHECKPOINT: got features that are not finite as .* first of image 0"):
            features(network, store, PREPROCESS, LoaderSettings(50, 0), ALONE, tmp_path, dtype=dtype)
        assert not list(tmp_path.iterdir())


def naive(train: np.ndarray, test: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
    """The k nearest of each, (similarity, number), with nothing but Python's floats."""
    found = []
    for one in test.tolist():
        length = math.sqrt(math.fsum(x * x for x in one)) or 1.0
        pairs = []
        for number, other in enumerate(train.tolist()):
            size = math.sqrt(math.fsum(x * x for x in other)) or 1.0
            pairs.append((math.fsum(x * y for x, y in zip(one, other, strict=True)) / length / size, number))
        found.append(sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k])
    return found


@pytest.mark.parametrize("copies", [1, 3, 60])  # more than are kept to spare
def test_neighbours_are_those_of_a_naive_loop(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(copies)
    some = random.standard_normal((240 // copies, 12)).astype(np.float32)
    train = np.concatenate([some] * copies)[random.permutation(240 // copies * copies)]
    test = random.standard_normal((23, 12)).astype(np.float32)
    test[0], train[7] = 0, 0
    expected = naive(train, test, 30)
    for chunk in (16, 100, 1000):
        monkeypatch.setattr(nearest, "TRAIN_CHUNK", chunk)
        similar, numbers = neighbours(of_arrays(train, np.zeros(240)), test, 30)
        # float64 sums of 12 products, of values up to 1
        np.testing.assert_allclose(similar, [[s for s, _ in row] for row in expected], atol=1e-14)
        if copies == 1:
            assert numbers.tolist()[1:] == [[n for _, n in row] for row in expected[1:]]
        for row, others in zip(numbers, similar, strict=True):  # equal ones by number, none twice
            assert len(set(row.tolist())) == 30
            assert all(a != b or m < n for a, b, m, n in zip(others, others[1:], row, row[1:], strict=False))
        assert numbers[0].tolist() == list(range(30))
    same = (train[:, None] == train[None]).all(axis=2)
    for row in numbers:  # of rows that are alike the first ones count
        left = [n for n in range(len(train)) if n not in row and any(same[n, m] and n < m for m in row.tolist())]
        assert not left


def test_votes_are_those_of_a_naive_loop() -> None:
    random = np.random.default_rng(5)
    train, test = (random.standard_normal((n, 6)).astype(np.float32) for n in (150, 40))
    labels, truth = random.integers(0, 7, 150), random.integers(0, 8, 40)
    got = dict(knn(of_arrays(train, labels), of_arrays(test, truth), 8, range(40), ks=(1, 5, 100, 1000)))
    assert list(got) == ["k1_top1", "k1_top5", "k5_top1", "k5_top5", "k100_top1", "k100_top5"]
    for k in (1, 5, 100):
        for row, near in enumerate(naive(train, test, k)):
            votes: dict[int, float] = {}
            for similarity, number in near:
                label = int(labels[number])
                votes[label] = votes.get(label, 0.0) + math.exp(similarity / 0.07)
            best = sorted(votes, key=lambda label: (-votes[label], label))
            assert got[f"k{k}_top1"][row] == (best[0] == truth[row])
            assert got[f"k{k}_top5"][row] == (truth[row] in best[:5])
    part = dict(knn(of_arrays(train, labels), of_arrays(test, truth), 8, range(13, 29), ks=(5,)))
    assert (part["k5_top1"] == got["k5_top1"][13:29]).all()
    assert list(dict(knn(of_arrays(train[:4], labels[:4]), of_arrays(test, truth), 8, range(3)))) == [
        "k4_top1",
        "k4_top5",
    ]


def test_memory_does_not_grow_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "TRAIN_CHUNK", 512)
    monkeypatch.setattr(nearest, "CHUNK", 32)
    peaks = []
    for images in (4_000, 16_000):
        values = np.lib.format.open_memmap(tmp_path / f"{images}.npy", "w+", np.float32, (images, 64))
        values[:] = np.random.default_rng(0).standard_normal((images, 64))
        train = of_arrays(values, np.zeros(images))
        tracemalloc.start()  # of numpy alone, which takes the rows from the file
        dict(knn(train, of_arrays(values, np.zeros(images)), 3, range(64)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def resident() -> int:
    """Bytes of mapped files that count as memory of this process."""
    return next(int(row.split()[1]) << 10 for row in open("/proc/self/status") if row.startswith("RssFile"))


def test_rows_that_were_read_do_not_stay_in_memory(tmp_path: Path) -> None:
    file = create(tmp_path / "x", 200_000, 64, "float32")
    file.features[:] = 1
    written = resident()
    file.let_go()
    before = resident()
    assert written - before > 45 << 20  # of 49 MB
    found = Features([file.features], file.labels, file.keys, [file])
    assert sum(float(rows.sum()) for _, rows in found.chunks(10_000)) == 200_000 * 64
    assert found.take(np.arange(0, 200_000, 5)).sum() == 40_000 * 64
    assert resident() - before < 10 << 20  # code that was not used before
    assert file.features.sum() == 200_000 * 64
    assert resident() - before > 45 << 20


def test_the_folder_says_what_it_holds(digits: Any, tmp_path: Path) -> None:
    name = extract(ALONE, str(digits.test), str(tmp_path), dtype="float16")[0]
    told = json.loads((tmp_path / name / "features.json").read_text())
    assert (told["images"], told["width"], told["dtype"], told["ranks"]) == (359, 16, "float16", 1)
    assert told["dataset"] == Store(str(digits.test), "x").fingerprint
    found = read(tmp_path / name)
    assert found is not None
    stored = load_file(tmp_path / name / "features-00000-of-00001.safetensors")["features"]
    assert stored.dtype == np.float16
    assert (stored == found.rows(0, 359)).all()
