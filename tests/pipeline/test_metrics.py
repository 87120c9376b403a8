"""The log of a run survives crashes and full disks; the meter's numbers are those of the clock it is given."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vitscale.errors import UserError
from vitscale.model.config import ViTConfig
from vitscale.model.flops import training_flops
from vitscale.pipeline import metrics, wandb_run
from vitscale.pipeline.config import Config, TrainConfig
from vitscale.pipeline.distributed import World
from vitscale.pipeline.metrics import Meter, MetricsLog, hours, line, read_metrics, rows_backwards, straggler
from vitscale.pipeline.run_folder import writing
from vitscale.pipeline.timing import Stopwatch

ALONE = World(0, 1, 0, torch.device("cpu"))
MODEL = ViTConfig(img_size=16, patch_size=8, depth=1, width=16, mlp_width=32, heads=2, num_classes=4)
CONFIG = Config(train=TrainConfig(global_batch=60))


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of the events of a run's TensorBoard files; not those that a later file takes back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_rows_are_logged_once_each_over_a_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 5):
        log.write(step, "train", [f"{step:016x}"], loss=1 / step, lr=0.5)
    log.write(4, "eval", top1=0.25)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "kind": "tra')  # as a crash leaves it
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 4]
    log = MetricsLog(tmp_path, 2)
    log.write(3, "train", loss=9.0, lr=0.5)
    log.write(3, "incident", refused="loss", loss=float("nan"), norm=float("inf"))
    log.rewind(1)
    log.write(2, "train", loss=8.0, lr=0.25)
    log.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "kind": "train", "loss": 1.0, "lr": 0.5, "samples": "0000000000000001"},
        {"step": 2, "kind": "train", "loss": 8.0, "lr": 0.25},
    ]
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 8.0)]


def test_what_json_and_tensorboard_cannot_hold(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(3, "incident", refused="loss", loss=float("nan"), norm=float("-inf"), weight=2.0)
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "kind": "incident", "refused": "loss", "loss": null, "norm": null, "weight": 2.0}\n'
    assert scalars(tmp_path, "incident/weight") == [(3, 2.0)]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_rows_backwards_are_those_forwards(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At blocks that end inside lines and at their ends, with a last line cut and an empty one before it."""
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert list(rows_backwards(tmp_path)) == []
    path = tmp_path / "metrics.jsonl"
    for text in ("", '{"step": 1, "kind": "a"}\n', '{"step": 1}\n{"step": 2, "text": "' + "x" * 50 + '"}\n'):
        for cut in ("", "\n", '{"step": 3', '{"step": 3}'):
            path.write_text(text + cut)
            backwards = list(rows_backwards(tmp_path))
            assert [row for _, row in backwards] == read_metrics(tmp_path)[::-1]
            assert all(path.read_bytes()[:end].endswith(json.dumps(row).encode() + b"\n") for end, row in backwards)


def test_a_full_disk_is_a_users_error_and_leaves_whole_rows(tmp_path: Path) -> None:
    """The size of files is limited, so that a write stops in the middle of a row as it does on a full disk."""
    log = MetricsLog(tmp_path, 0)
    log.write(1, "train", loss=1.0)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, unlimited[1]))
    try:
        with pytest.raises(UserError, match=r"run\.dir: got .*No space left"), writing(tmp_path):
            log.write(2, "train", loss=1.0)
        with pytest.raises(UserError, match=r"run\.dir: got "), writing(tmp_path):
            log.write(2, "train", loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    again = MetricsLog(tmp_path, 1)
    again.write(2, "train", loss=3.0)
    again.close()
    assert [row.get("loss") for row in read_metrics(tmp_path)] == [1.0, 3.0]


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, with the real package: both starts write for one run, whose rows carry their own steps."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start, loss in ((0, 0.123456), (4, 0.654321)):
        log = MetricsLog(tmp_path, start, wandb="team/vitscale", recipe={"optim": {"lr": 0.001}})
        log.write(start + 1, "train", ["00"], loss=loss)
        log.write(start + 1, "incident", refused="loss", loss=float("nan"))
        log.close()
    assert [row["step"] for row in read_metrics(tmp_path) if row["kind"] == "train"] == [1, 5]
    name = (tmp_path / "wandb" / "id").read_text()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert 1 <= len(files) <= 2  # one if both began in the same second
    written = b"".join(map(records, files))
    for text in (b"vitscale", b"train/loss", b"0.123456", b"0.654321", b"optim"):
        assert text in written
    assert b"incident/loss" not in written


def records(path: Path) -> bytes:
    """What W&B's file holds, in which blocks of 32 KiB cut records apart, as in LevelDB's log."""
    data, found, at = path.read_bytes(), b"", 7  # after its own header
    while at + 7 <= len(data):
        if (room := -at % 32768) and room < 7:
            at += room
            continue
        length = int.from_bytes(data[at + 4 : at + 6], "little")  # after a checksum, and before the kind of piece
        found += data[at + 7 : at + 7 + length]
        at += 7 + length
    return found


def test_wandb_that_cannot_be_is_refused_in_a_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "find_spec", lambda _: None)
    wandb_run.require_wandb("")
    with pytest.raises(UserError, match=r"run\.wandb: .*pip install 'vitscale\[wandb\]'"):
        MetricsLog(tmp_path, 0, wandb="vitscale")
    assert not any(tmp_path.iterdir())


def test_wandb_without_a_login_is_refused_in_a_paragraph(tmp_path: Path) -> None:
    """In a process of its own, as the package reads its settings once."""
    pytest.importorskip("wandb")
    script = (
        "import sys, pathlib, vitscale.pipeline.metrics as m; m.MetricsLog(pathlib.Path(sys.argv[1]), 0, wandb='v')"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", script, str(tmp_path)]
    said = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**env, "HOME": str(tmp_path)}
    )
    assert said.stderr.strip().splitlines()[-1].startswith("vitscale.errors.UserError: run.wandb: got 'v' (No API key")
    assert "WANDB_MODE=offline" in said.stderr


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def spend(watch: Stopwatch, clock: Any, **seconds: float) -> None:
    """Let time pass in sections."""
    for name, value in seconds.items():
        with watch.host(name):
            clock.now += value


def test_the_meter_tells_where_the_time_went() -> None:
    clock = Clock()
    watch = Stopwatch(torch.device("cpu"), clock)
    meter = Meter(watch, ALONE, MODEL, CONFIG, first=10, total=100)
    for _ in range(5):
        spend(watch, clock, data=0.5, forward=0.2, backward=0.4, step=0.1)
        clock.now += 0.3
    spend(watch, clock, evaluation=3.0, save=2.0)
    values = meter.read(15)
    assert values.pop("memory_gb") > 0.05  # torch alone
    assert values.pop("host_memory_gb") > 0.05
    rate = 60 / 1.5
    assert values == pytest.approx({
        "images_per_s": rate, "images_per_s_per_rank": rate, "step_ms": 1500.0,
        "data_ms": 500.0, "forward_ms": 200.0, "backward_ms": 400.0, "optimizer_ms": 100.0, "data_wait": 1 / 3,
        "tflops": rate * training_flops(MODEL) / 1e12, "mfu": rate * training_flops(MODEL) / meter.peak,
        "eval_s": 3.0, "save_s": 2.0, "eta_s": 85 * 12.5 / 5,
    })  # fmt: skip


def test_the_meter_begins_anew_at_each_reading() -> None:
    """And the pace for the time left leaves out the first, which holds the start of everything."""
    clock = Clock()
    watch = Stopwatch(torch.device("cpu"), clock)
    meter = Meter(watch, ALONE, MODEL, CONFIG, first=0, total=100)
    spend(watch, clock, forward=1000.0)
    assert meter.read(1)["eta_s"] == pytest.approx(99 * 1000.0)
    spend(watch, clock, forward=2.0)
    values = meter.read(3)
    assert (values["images_per_s"], values["forward_ms"]) == pytest.approx((60.0, 1000.0))
    assert values["eta_s"] == pytest.approx(97.0)
    assert "eval_s" not in values
    spend(watch, clock, forward=3.0, evaluation=7.0)
    assert meter.read(6)["eta_s"] == pytest.approx(94 * 12 / 5)  # evaluations to come take their share
    spend(watch, clock, forward=500.0)
    meter.restart(2)  # a rollback
    spend(watch, clock, forward=1.0)
    values = meter.read(3)
    assert (values["images_per_s"], values["step_ms"]) == pytest.approx((60.0, 1000.0))
    assert meter.read(3)["images_per_s"] == 0.0  # twice after the same step, and in no time: no rate, no error


def two_meters(world: World) -> list[Any]:
    """Rank 1 waits for data, then computes slowly; rank 0 waits for it in the backward pass."""
    clock = Clock()
    watch = Stopwatch(torch.device("cpu"), clock)
    meter = Meter(watch, world, MODEL, CONFIG, first=0, total=4)
    slow = world.rank == 1
    spend(watch, clock, data=0.6 if slow else 0.1, forward=0.1, backward=0.3 if slow else 0.8)
    first = meter.read(1)
    spend(watch, clock, data=0.0, forward=0.3 if slow else 0.2, backward=0.7 if slow else 0.8)
    return [first, meter.read(2)]


def test_the_slow_rank_is_named(ranks: Any) -> None:
    first, second = ranks(__file__, "two_meters", 2)
    assert (first["slowest_rank"], first["slowest_ratio"]) == (1, pytest.approx(0.7 / 0.2))
    assert first["data_wait"] == pytest.approx(0.6)  # of the rank that waits longest
    assert (first["data_ms"], first["backward_ms"]) == pytest.approx((350.0, 550.0))  # means of both
    assert (first["images_per_s"], first["images_per_s_per_rank"]) == pytest.approx((60.0, 30.0))
    assert (second["slowest_rank"], second["slowest_ratio"]) == (1, pytest.approx(1.5))
    assert second["data_wait"] == 0.0


def test_straggler() -> None:
    assert straggler([1.0]) == {}
    assert straggler([0.0, 0.0]) == {}
    assert straggler([1.0, 1.0, 3.0, 1.5]) == {"slowest_rank": 2, "slowest_ratio": 3.0}


def test_a_row_in_a_line() -> None:
    row = {
        "loss": 0.12345, "top1": 0.5, "lr": 1e-3, "images_per_s": 1234.5, "mfu": 0.412, "data_wait": 0.02,
        "eta_s": 3723.4, "grad_norm": 1.0,
    }  # fmt: skip
    said = "loss 0.1235  top-1 50.0%  lr 1.00e-03  1,234 images/s  MFU 41.2%  data wait 2%  ETA 1:02:03"
    assert line(row) == said
    assert line({"loss": 1.0, "top1": None}) == "loss 1.0000"
    assert [hours(seconds) for seconds in (0, 59.6, 3599.7, 360_000)] == ["0:00:00", "0:01:00", "1:00:00", "100:00:00"]


def test_reading_a_log_needs_no_tensorboard() -> None:
    script = "import sys, vitscale.pipeline.metrics; print('tensorboard' in sys.modules, 'wandb' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "False"]
