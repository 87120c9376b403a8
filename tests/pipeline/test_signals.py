"""Stop signals are noted and nothing more, in a process with loader processes too."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vitscale.pipeline.signals import STOP_SIGNALS, StopSignals, leave_stopping_to_the_rank


class Numbers(Dataset):
    """Tensors of their own number, after a while; the last one never comes."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> torch.Tensor:
        time.sleep(3600 if number == 99 else 0.01)
        return torch.tensor([number, os.getpid()])


def start(_: int) -> None:
    leave_stopping_to_the_rank()


def test_signals_are_noted_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals() as signals:
        assert signals.asked == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked == "SIGUSR1"
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_second_interrupt_is_one(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with `&` ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked == ""


def test_loader_processes_leave_signals_to_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Slurm signals all processes of a step: every batch still comes. torch's own SIGTERM ends a process."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # torch waits for it to end first
    with StopSignals() as signals:
        batches = iter(DataLoader(Numbers(), None, num_workers=1, worker_init_fn=start, prefetch_factor=2))
        seen, worker = next(batches).tolist()
        if not os.fork():  # a signal by another process than the rank
            for number in (*STOP_SIGNALS, signal.SIGINT):
                os.kill(worker, number)
            os._exit(0)
        os.wait()
        assert [next(batches)[0].item() for _ in range(98)] == list(range(seen + 1, 99))
        assert signals.asked == ""
        del batches  # while its process is in a sample that never comes
        assert not Path(f"/proc/{worker}").exists()
