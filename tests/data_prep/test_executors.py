"""The parallel map: order, errors, and processes that die."""

import os

import pytest

from vitscale.data_prep.executors import parallel_map
from vitscale.errors import UserError


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    assert list(parallel_map(abs, [-3, 1, -2, 0], workers)) == [3, 1, 2, 0]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_is_raised_here(workers: int) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(parallel_map(int, ["1", "one", "2"], workers))


def test_a_process_that_dies_is_a_clear_error() -> None:
    with pytest.raises(UserError) as error:
        list(parallel_map(os._exit, [1, 1, 1], 2))
    assert error.value.setting == "workers"
