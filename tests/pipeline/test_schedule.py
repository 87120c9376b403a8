"""Learning rates and durations as published formulas."""

import math

import pytest

from vitscale.errors import UserError
from vitscale.pipeline.schedule import lr_factor, parse_duration


def factors(kind: str, total: int = 100, warmup: int = 10, cooldown: int = 0, timescale: int = 20) -> list[float]:
    return [
        lr_factor(step, kind=kind, total=total, warmup=warmup, cooldown=cooldown, timescale=timescale)
        for step in range(total)
    ]


@pytest.mark.parametrize("kind", ["cosine", "linear", "rsqrt", "constant"])
def test_warmup_rises_linearly_to_the_peak(kind: str) -> None:
    curve = factors(kind)
    assert curve[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(curve) == pytest.approx(1)
    assert factors(kind, warmup=0)[0] == pytest.approx(1)


def test_decays() -> None:
    assert factors("cosine")[55] == pytest.approx(0.5)
    assert factors("cosine")[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert factors("linear")[55] == pytest.approx(0.5)
    assert factors("linear")[99] == pytest.approx(1 / 90)
    assert factors("rsqrt")[30] == pytest.approx(math.sqrt(20 / 40))
    assert factors("constant")[99] == 1


def test_cooldown_ends_linearly_at_zero() -> None:
    curve = factors("constant", cooldown=20)
    assert curve[80] == 1
    assert curve[90] == pytest.approx(0.5)
    assert curve[99] == pytest.approx(1 / 20)


@pytest.mark.parametrize(
    ("text", "steps"), [("500", 500), ("3ep", 30), ("0.5ep", 5), ("1e3ex", 10), ("5%", 20), ("0", 0), (" 7 ep ", 70)]
)
def test_durations(text: str, steps: int) -> None:
    assert parse_duration(text, "x", samples=1099, global_batch=100, total=400) == steps


@pytest.mark.parametrize("text", ["", "ep", "-3", "3 epochs", "nan", "1e999", "5%%", "101%"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^train.duration: "):
        parse_duration(text, "train.duration", samples=100, global_batch=10, total=10)


def test_percent_of_itself_is_refused() -> None:
    with pytest.raises(UserError, match="90ep"):
        parse_duration("5%", "train.duration", samples=100, global_batch=10)
