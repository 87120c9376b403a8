"""The map over tasks: order, errors, and processes that die."""

import os

import pytest

from vitscale.data_prep.executors import AHEAD, LocalExecutor, available_cores, make_executor
from vitscale.errors import UserError


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("light", [False, True])
def test_results_come_in_order_from_one_executor_after_another_map(workers: int, light: bool) -> None:
    with make_executor("local", workers) as executor:
        assert list(executor.map(abs, [-3, 1, -2, 0], light)) == [3, 1, 2, 0]
        assert list(executor.map(str, range(20), light)) == [str(number) for number in range(20)]
        assert list(executor.map(abs, [], light)) == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("light", [False, True])
def test_an_exception_is_raised_here(workers: int, light: bool) -> None:
    with pytest.raises(ValueError, match="invalid literal"), LocalExecutor(workers) as executor:
        list(executor.map(int, ["1", "one", "2"], light))


def test_light_work_of_few_workers_stays_in_this_process() -> None:
    processes = ["__import__('os').getpid()"] * 8
    with LocalExecutor(2) as executor:
        light = set(executor.map(eval, processes, light=True))
        first, second = set(executor.map(eval, processes)), set(executor.map(eval, processes))
    assert light == {os.getpid()}
    assert os.getpid() not in first | second
    assert len(first | second) <= 2  # the same processes again
    with LocalExecutor(1) as executor:
        assert set(executor.map(eval, processes)) == {os.getpid()}


def test_tasks_are_handed_out_as_results_are_taken() -> None:
    begun: list[int] = []
    with LocalExecutor(2) as executor:
        results = executor.map(begun.append, list(range(100)), light=True)
        next(results)
        assert len(begun) <= 1 + AHEAD * 2
        list(results)
    assert sorted(begun) == list(range(100))


def test_a_process_that_dies_is_a_clear_error() -> None:
    with pytest.raises(UserError) as error, LocalExecutor(2) as executor:
        list(executor.map(os._exit, [1, 1, 1]))
    assert error.value.setting == "workers"


def test_no_worker_means_every_core() -> None:
    assert available_cores() == len(os.sched_getaffinity(0))
    with LocalExecutor(0) as executor:
        assert list(executor.map(abs, [-1, -2], light=True)) == [1, 2]
