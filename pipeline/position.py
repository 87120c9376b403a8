"""How far a run is."""

import hashlib
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from vitscale.pipeline.engine import Step

RECENT = 100  # losses whose median a spike is measured by
INCIDENTS = ("loss", "grad_norm", "spike")  # why a step was not taken, where that is worth a record


@dataclass
class Position:
    """How far a run is; all of it is in its checkpoints, as JSON.

    `step` steps are over, of which the optimizer took `optimizer_steps`. The next one uses the global batch
    `step + data_offset` of the order. `digest` chains the digests of all batches so far. `refused` counts the steps not
    taken since the last one that was; `rollbacks` how often the run went back to a checkpoint; `losses` are the last
    ones, if spikes are watched for. With `eval.patience`, `best` is the best evaluation so far (`step`, `name` and
    `score`), and `worse` counts those since.
    """

    step: int = 0
    optimizer_steps: int = 0
    data_offset: int = 0
    digest: str = ""
    refused: int = 0
    rollbacks: int = 0
    losses: list[float] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    worse: int = 0

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Position":
        """That of a checkpoint; format 1 took every step, and had no digest."""
        kept = {"step": state["step"], "optimizer_steps": state["step"], **state.get("position", {})}
        return cls(**kept)

    def take(self, result: Step, spikes: bool) -> None:
        """Count a step."""
        self.step += 1
        self.optimizer_steps += not result.refused
        if result.refused in INCIDENTS:
            self.refused += 1
        elif not result.refused:
            self.refused = 0
            self.losses = [*self.losses, result.means["loss"]][-RECENT:] if spikes else []

    def see(self, digests: list[str]) -> None:
        """Add the digests of batches to the chain."""
        for digest in digests:
            self.digest = hashlib.sha256(f"{self.digest}{digest}".encode()).hexdigest()

    def judge(self, name: str, score: float) -> None:
        """Count an evaluation: it is the best so far, or one more in a row that is not better."""
        if not self.best or score > self.best["score"]:
            self.best, self.worse = {"step": self.step, "name": name, "score": score}, 0
        else:
            self.worse += 1

    def spike(self, factor: float) -> float:
        """The loss beyond which a step is a spike: `factor` times the median of the last ones, once there are some."""
        return factor * statistics.median(self.losses) if factor and len(self.losses) >= RECENT // 4 else math.inf
