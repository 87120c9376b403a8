"""What `data.dev` holds out: always the same images, exactly so many, of all classes, and never trained on."""

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pipeline.runs import TINY, command
from vitscale.data_prep.manifest import INDEX
from vitscale.errors import UserError
from vitscale.launch.recipes import RECIPES
from vitscale.pipeline.data.holdout import Part, chosen, held_out, split
from vitscale.pipeline.data.store import Store
from vitscale.pipeline.metrics import read_metrics
from vitscale.pipeline.planner import Plan, plan
from vitscale.pipeline.recipe import load_recipe


def keys(store: Store) -> list[str]:
    return [store.read(number).key for number in range(len(store))]


@given(st.lists(st.integers(0, 400), min_size=1, max_size=60), st.floats(1e-6, 0.999))
def test_shares_of_shards_add_up_exactly(sizes: list[int], share: float) -> None:
    counts = held_out(np.array(sizes), share)
    assert counts.sum() == round(share * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


@given(st.integers(0, 10**6), st.integers(1, 2000), st.data())
def test_rows_are_different_ones_and_those_of_less_are_among_them(shard: int, size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, size))
    rows = chosen(shard, size, count)
    assert len(set(rows.tolist())) == count
    assert not count or 0 <= rows[0] <= rows[-1] < size
    assert set(chosen(shard, size, count // 2)) <= set(rows)


def test_rows_of_shards_are_chosen_independently() -> None:
    """Of 400 shards of 50 each row is held out in a tenth: 40 ± 4 · 6 (binomial)."""
    seen = np.bincount(np.concatenate([chosen(shard, 50, 5) for shard in range(400)]), minlength=50)
    assert seen.sum() == 2000
    assert seen.min() >= 16
    assert seen.max() <= 64


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_two_parts_are_everything_once(digits: Any, share: float) -> None:
    whole = Store(str(digits.train), "data.train")
    left, held = split(whole, share)
    assert len(held) == round(share * 1438)
    assert len(left) + len(held) == 1438
    all_keys, of_left, of_held = keys(whole), keys(left), keys(held)
    assert not set(of_left) & set(of_held)
    assert set(of_left) | set(of_held) == set(all_keys)
    assert of_left == [key for key in all_keys if key in set(of_left)]  # in their order
    assert [int(sizes.sum()) for sizes in left.sizes] == [len(left)]
    assert len({whole.fingerprint, left.fingerprint, held.fingerprint, split(whole, share / 2)[0].fingerprint}) == 4
    assert (left.classes, left.multi, left.name) == (whole.classes, False, "train-train")
    assert held.describe()["samples"] == len(held)
    copy = pickle.loads(pickle.dumps(held))  # as a process of the loader may get it
    assert [copy.read(number).key for number in range(5)] == of_held[:5]
    if share >= 0.1:  # of 144 images about 14 a class
        assert {held.read(number).label for number in range(len(held))} == set(range(10))


def test_each_dataset_of_a_mixture_holds_out_what_it_does_alone(digits: Any) -> None:
    paths = [str(digits.test), str(digits.train)]
    _, held = split(Store(paths, "data.train"), 0.05)
    alone = [split(Store(path, "data.train"), 0.05)[1] for path in paths]
    assert keys(held) == [key for each in alone for key in keys(each)]
    assert [int(sizes.sum()) for sizes in held.sizes] == [round(0.05 * 359), round(0.05 * 1438)]


def test_what_leaves_nothing_is_refused(digits: Any) -> None:
    whole = Store(str(digits.test), "data.train")
    with pytest.raises(UserError, match=r"^data\.dev: got 0\.001 of 359 images; expected at least one image"):
        split(whole, 0.001)
    with pytest.raises(UserError, match=r"^data\.dev: got 0\.9999 of 359 images; expected some images of each"):
        split(whole, 0.9999)


def test_ten_billion_images_hold_nothing_for_each(digits: Any, tmp_path: Path) -> None:
    """325,000 shards: numbers for each shard, about ten of 8 bytes, and none for each sample."""
    info = json.loads((digits.train / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    size, shards = 30_769, 325_000
    columns = [[f"{n:06}.tar" for n in range(shards)], [size] * shards, [10**9] * shards, ["0" * 64] * shards]
    pq.write_table(pa.table(columns, schema=INDEX), tmp_path / info["index"])
    whole = Store(str(tmp_path), "data.train", check=False)
    tracemalloc.start()
    left, held = split(whole, 0.01)
    numbers = [0, 123_456_789, len(left) - 1]
    placed = [left.place(number) for number in numbers]
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()
    assert len(held) == round(0.01 * size * shards)
    assert len(left) + len(held) == size * shards
    for number, (shard, row) in zip(numbers, placed, strict=True):
        rows = {part.place(n)[1] for part in (left, held) for n in numbers_of(part, shard)}
        assert rows == set(range(size))
        assert left.place(number) == (shard, row)


def numbers_of(part: Part, shard: int) -> range:
    """Numbers of the samples of a shard."""
    ends = np.cumsum(part.sizes[0])
    return range(int(ends[shard - 1]) if shard else 0, int(ends[shard]))


def planned(digits: Any, folder: Path, *more: str) -> Plan:
    words = [*TINY, f"data.train={digits.train}", f"data.val={digits.test}", f"run.dir={folder}", *more]
    return plan(load_recipe("digits-demo", words, RECIPES), 1)


def test_a_plan_trains_on_the_rest_and_evaluates_what_is_held_out(digits: Any, tmp_path: Path) -> None:
    made = planned(digits, tmp_path / "run", "data.dev=10%", "run.seed=5")
    assert made.val is not None
    assert (len(made.train), len(made.val), made.order.samples) == (1294, 144, 1294)
    assert keys(made.val) == keys(split(Store(str(digits.train), "x"), 0.1)[1])  # not data.val, whatever the seed
    assert made.fingerprint != planned(digits, tmp_path / "run").fingerprint
    with pytest.raises(UserError, match=r"^train\.global_batch: got 30; expected at most the 14 training images besid"):
        planned(digits, tmp_path / "run", "data.dev=99%")
    with pytest.raises(UserError, match=r"^data\.dev: got 1e-06 of 1,438 images"):
        planned(digits, tmp_path / "run", "data.dev=0.0001%")


@pytest.mark.slow
def test_ranks_see_the_same_and_another_share_is_refused(digits: Any, tmp_path: Path) -> None:
    more = ("data.dev=10%", "train.duration=5", "checkpoint.every=0", "data.workers=0")
    said = [command(digits, tmp_path / nproc, "--nproc", nproc, *more) for nproc in ("1", "2")]
    assert [each.returncode for each in said] == [0, 0], said
    assert "1,294 images beside 144 held out" in said[0].stdout
    rows = [read_metrics(tmp_path / nproc) for nproc in ("1", "2")]
    seen = [[row["samples"] for row in each if row["kind"] == "train"] for each in rows]
    assert len(seen[0]) == 5
    assert seen[0] == seen[1]
    evaluated = [next(row for row in each if row["kind"] == "eval") for each in rows]
    assert evaluated[0]["top1"] == evaluated[1]["top1"]
    assert evaluated[0]["top1"] * 144 == pytest.approx(round(evaluated[0]["top1"] * 144), abs=1e-9)
    with pytest.raises(UserError, match=r"of another recipe \(data\.dev: '10%' → '20%'\)"):
        planned(digits, tmp_path / "1", *more, "data.dev=20%")
