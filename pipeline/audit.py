"""`vitscale audit`: where the data of two runs first differ, by the digests in their `metrics.jsonl`."""

from dataclasses import dataclass

from vitscale.errors import UserError
from vitscale.pipeline.metrics import read_metrics
from vitscale.pipeline.mirror import reading_folder


@dataclass(frozen=True)
class Comparison:
    """Steps that both runs took, counted from 1, and the first of them with other samples, if there is one."""

    first: int
    last: int
    steps: int
    differs: int | None


def compare(run_a: str, run_b: str) -> Comparison:
    """Compare step by step. Raises `UserError` for a folder without digests, and for runs without a common step."""
    one, other = digests(run_a, "RUN_A"), digests(run_b, "RUN_B")
    common = sorted(one.keys() & other.keys())
    if not common:
        got = f"steps {min(other)} to {max(other)}, of which {run_a} took none"
        raise UserError("RUN_B", got, "a run with steps in common", "Compare other runs.")
    differs = next((step for step in common if one[step] != other[step]), None)
    return Comparison(common[0], common[-1], len(common), differs)


def digests(run: str, setting: str) -> dict[int, str]:
    """The digest of the global batch of each step of a run. Raises `UserError` (`setting`) if there are none."""
    found: dict[int, str] = {}
    for row in read_metrics(reading_folder(run, setting)):
        samples = str(row.get("samples", "")).split()
        found.update(zip(range(row["step"] - len(samples) + 1, row["step"] + 1), samples, strict=True))
    if not found:
        raise UserError(setting, run, "the folder of a run, with digests in its metrics.jsonl", "Check the path.")
    return found
