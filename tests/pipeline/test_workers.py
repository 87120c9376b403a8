"""Loader processes: how they start."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from vitscale.pipeline.data import workers
from vitscale.pipeline.data.workers import worker_options
from vitscale.pipeline.distributed import World, gather


def load_though_the_first_hangs(world: World, folder: str) -> list[Any]:
    """All batches by two processes, the first of which stands still in the fork, before any code of its own."""

    def hang_once() -> None:
        if not (Path(folder) / "hung").exists():
            (Path(folder) / "hung").write_text(str(os.getpid()))
            time.sleep(600)

    workers.ANSWER = 0.5
    os.register_at_fork(after_in_child=hang_once)
    numbers: Any = range(10)
    return list(DataLoader(numbers, batch_size=2, **worker_options(2, 2)))


def test_a_worker_that_hangs_in_the_fork_is_started_again(ranks: Callable[..., Any], tmp_path: Path) -> None:
    found = ranks(__file__, "load_though_the_first_hangs", 1, str(tmp_path), limit=60)
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "hung").read_text()), 0)


def fork_after_collectives(world: World, count: int) -> int:
    context = worker_options(1, 1)["multiprocessing_context"]
    for number in range(count):
        gather({"number": number, "more": "x" * 200})
        process = context.Process(target=os._exit, args=(7,))
        process.start()
        process.join(60)
        assert process.exitcode == 7
    return count


@pytest.mark.slow
def test_workers_start_right_after_collectives(ranks: Callable[..., Any]) -> None:
    """Gloo's threads take up Python to let go of tensors: of these forks some hang in Python 3.11, where plain."""
    assert ranks(__file__, "fork_after_collectives", 2, 2000, limit=600) == 2000
