"""Weights & Biases, for those who ask for it by `run.wandb`; an optional dependency."""

import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vitscale.data_prep.publish import publish_text
from vitscale.errors import UserError
from vitscale.pipeline.console import say

FINISH_TIMEOUT = 300.0  # seconds that the end of a run waits for the upload; what is left stays in the run's folder


def require_wandb(project: str) -> None:
    """Raise `UserError` if a project is named and the package is not installed."""
    if project and find_spec("wandb") is None:
        got = f"{project!r}, without the package wandb"
        raise UserError("run.wandb", got, "that package installed", "pip install 'vitscale[wandb]'")


class WandbRun:
    """A run of W&B beside a run's folder: started again, it goes on in the same one, whose id is in `wandb/id`.

    `project` is PROJECT or ENTITY/PROJECT. The rows' own steps are the x-axis, not the order of arrival, because rows
    after a checkpoint come a second time when a run goes on from there. `WANDB_MODE=offline` writes to the folder
    alone. Raises `UserError` if the package is not installed or W&B refuses or cannot be reached.
    """

    def __init__(self, folder: Path, project: str, recipe: Mapping[str, Any]) -> None:
        require_wandb(project)
        import wandb

        path = folder / "wandb" / "id"  # `wandb/` is also where the package writes
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            publish_text(path, secrets.token_hex(4))
        entity, _, name = project.rpartition("/")
        try:
            run = wandb.init(
                entity=entity or None, project=name, name=folder.name, id=path.read_text().strip(), resume="allow",
                dir=folder, config=dict(recipe),
                settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_TIMEOUT),
            )  # fmt: skip
        except wandb.Error as error:
            got = f"{project!r} ({' '.join(str(error).split())[:300]})"
            remedy = "`wandb login`, or set WANDB_MODE=offline and `wandb sync` it later."
            raise UserError("run.wandb", got, "a project that can be written", remedy) from error
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        say(f"Weights & Biases: {run.dir if run.offline else run.url}")
        self._run, self._failures = run, (wandb.Error, OSError)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send one row. Should W&B fail, that is said once and no more is sent: training does not depend on it."""
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **values})
        except self._failures as error:
            say(f"warning: no more rows to Weights & Biases: {error}")
            self._run = None

    def close(self) -> None:
        """Wait for the upload, for a while."""
        if self._run is not None:
            self._run.finish()
