"""Where states go, by the arithmetic of the ZeRO paper."""

import pytest

from vitscale.errors import UserError
from vitscale.pipeline.config import EngineConfig
from vitscale.pipeline.placement import States, place

HUGE = 632_045_800  # parameters of ViT-H/14
GB = 10**9


def test_bytes_a_rank_are_those_of_the_paper() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters in 16 bits, Adam, on 64 ranks: 31.4, 16.6, 1.9 GB."""
    adam = States("bf16", kept=2)
    got = [adam.bytes_a_rank(7_500_000_000, stage, 64) / GB for stage in (1, 2, 3)]
    assert got == pytest.approx([31.4, 16.6, 1.9], abs=0.05)
    assert adam.bytes_a_rank(7_500_000_000, 1, 1) / GB == pytest.approx(120)


def test_float32_keeps_masters_apart_from_stage_1_on() -> None:
    states = States("fp32", kept=3)  # Adam and an average
    assert states.bytes_a_rank(1000, 0, 4) == 1000 * (4 + 4 + 12)
    assert states.bytes_a_rank(1000, 1, 4) == 1000 * (4 + 4 + 16 / 4)
    assert states.bytes_a_rank(1000, 3, 4) == 1000 * (4 + 4 + 16) / 4


@pytest.mark.parametrize(
    ("stage", "ranks", "memory", "expected"),
    [
        (2, 8, 80 * GB, "none"),  # 632 M × (2 + 14 / 8) = 2.4 GB
        (1, 1, 16 * GB, "optimizer"),  # 632 M × 16 = 10.1 GB, more than 60% of 16; without the optimizer's 2.5
        (3, 1, 4 * GB, "all"),
        (2, 1, 3 * GB, "optimizer"),  # parameters can only be moved at stage 3
        (0, 1, 4 * GB, "none"),
        (3, 8, None, "none"),
    ],
)
def test_states_that_do_not_fit_a_gpu_go_to_the_host(stage: int, ranks: int, memory: int | None, expected: str) -> None:
    config = EngineConfig(zero_stage=stage, dtype="bf16" if stage else "fp32")
    found = place(config, HUGE, ranks, States(config.dtype, 2), memory)
    assert found.offload == expected
    assert "on CPUs" in found.why if memory is None else f"of {memory / GB:.0f} GB on each GPU" in found.why


def test_buckets_are_pieces_where_communication_overlaps() -> None:
    config = EngineConfig()
    alone = place(config, HUGE, 1, States("fp32", 2), 80 * GB)
    many = place(config, HUGE, 8, States("fp32", 2), 80 * GB)
    assert (alone.overlap, many.overlap) == (False, True)
    assert many.bucket == pytest.approx(HUGE / 8, rel=1e-3)
    assert alone.bucket == 500_000_000
    small = place(config, 1_001, 2, States("fp32", 2), None)
    assert (small.bucket, small.overlap) == (1024, False)


def test_the_setting_decides_where_it_is_not_auto() -> None:
    config = EngineConfig(zero_stage=3, offload="all")
    assert place(config, 1000, 2, States("fp32", 2), None).offload == "all"
    with pytest.raises(UserError, match=r"engine\.offload: got all with engine\.zero_stage 2"):
        EngineConfig(zero_stage=2, offload="all")
