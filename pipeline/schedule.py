"""Durations and learning-rate schedules, as pure functions of the step."""

import math
import re

from vitscale.errors import UserError

KINDS = ("cosine", "linear", "rsqrt", "constant")
DURATION = re.compile(r"(?P<number>\d+(\.\d*)?([eE]\d+)?)\s*(?P<unit>ep|ex|%|)")


def parse_duration(text: str, setting: str, *, samples: int, global_batch: int, total: int | None = None) -> int:
    """Steps in a duration: `"500"` steps, `"90ep"` epochs, `"1e6ex"` examples, `"5%"` of `total` steps.

    An epoch is `samples // global_batch` steps; anything above zero is at least one step. Raises `UserError` naming
    `setting` for anything else.
    """
    match = DURATION.fullmatch(text.strip())
    number, unit = (float(match["number"]), match["unit"]) if match else (math.nan, "")
    if not math.isfinite(number) or (unit == "%" and (total is None or number > 100)):
        units = "steps (500), epochs (90ep) or examples (1e6ex)"
        units += "" if total is None else " or up to 100 percent (5%)"
        raise UserError(setting, repr(text), f"a duration in {units}", "Write a number and its unit, such as 90ep.")
    per_epoch = samples // global_batch
    factor = {"": 1, "ep": per_epoch, "ex": 1 / global_batch, "%": (total or 0) / 100}[unit]
    return max(round(number * factor), 1) if number else 0


def lr_factor(step: int, *, kind: str, total: int, warmup: int, cooldown: int, timescale: int) -> float:
    """The share of the peak learning rate at `step` of `total`, in [0, 1].

    Linear warm-up from 0 over `warmup` steps (step 0 already takes 1 / `warmup`), then cosine or linear decay to 0 at
    `total`, inverse square root (`timescale` steps, Zhai et al. 2022) or constant; over the last `cooldown` steps the
    factor also falls linearly to 0.
    """
    if step < warmup:
        factor = (step + 1) / warmup
    elif kind == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    elif kind == "linear":
        factor = 1 - (step - warmup) / max(total - warmup, 1)
    elif kind == "rsqrt":
        factor = math.sqrt(timescale / (timescale + step - warmup))
    else:
        factor = 1.0
    left = total - step
    return factor * (left / cooldown if left < cooldown else 1.0)
