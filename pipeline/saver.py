"""Writing checkpoints while training goes on: a copy in the host's memory, a thread, and ranks that agree."""

import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.data_prep.publish import publish_text, sync_folder
from vitscale.errors import UserError
from vitscale.pipeline.checkpoint import FORMAT, checkpoints, folder_name, step_of
from vitscale.pipeline.distributed import World, agree, gather
from vitscale.pipeline.engine import Engine
from vitscale.pipeline.mirror import names, remove, shown, store_of, upload, upload_text
from vitscale.pipeline.tensor_file import write_safetensors


class Saver:
    """Writes the checkpoints of a run into `folder`. Every rank makes one, and calls its methods alike.

    A save copies what this rank owns to the host's memory, from where a thread writes it. When that is over on all
    ranks, which they find out together (`ready`), `commit` publishes the checkpoint, removes all but the newest `keep`
    others, save those of steps that are `kept`, and those of later steps: the run went on from before them, so they
    are damaged or of an abandoned course. A rank that cannot write (a full disk) makes all of them raise `UserError`;
    earlier checkpoints stay as they are. Without `background` a save is over when it returns.

    If `folder` stands for one in an object store, each rank's thread uploads its file, which then is not here any more,
    and rank 0 publishes there; before that it calls `push`, for what is to be there when the checkpoint is.
    `published` is called with its state as soon as it is there, on rank 0, before others are removed.
    """

    def __init__(
        self, folder: Path, world: World, keep: int, kept: Callable[[int], bool] = lambda _: False, *,
        background: bool = True, push: Callable[[], None] = lambda: None,
        published: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.folder, self._world, self._keep, self._kept = folder, world, keep, kept
        self._background, self._push, self._store = background, push, store_of(folder)
        self._published = published
        self._last: float = math.inf  # step of the last save: those before may be of an abandoned course
        self._host: dict[str, Tensor] = {}  # used again by the next save
        self._state: dict[str, Any] | None = None  # of the checkpoint that is being written
        self._thread: threading.Thread | None = None
        self._outcome: dict[str, Any] | UserError | None = None  # of this rank's writing: a row of the index
        self._shapes: dict[str, tuple[int, ...]] = {}

    def save(self, engine: Engine, state: dict[str, Any]) -> None:
        """Begin to write the checkpoint of `state["step"]`, once the one before is published."""
        self.finish()
        agree(self._make_room(state["step"]) if self._world.main else None)  # nobody writes before that is done
        self._state, self._shapes, self._outcome = state, engine.shapes, None
        self._copy(engine)
        self._start(self._write)
        if not self._background:
            self.finish()

    @property
    def ready(self) -> bool:
        """Whether this rank has written its part of a checkpoint that is not published yet."""
        return self._state is not None and not self._busy

    def commit(self) -> None:
        """Publish the checkpoint, which is `ready` on every rank. It happens in the background too."""
        assert self._state is not None
        self._wait()
        state, self._state = self._state, None
        outcomes = gather(self._outcome)
        if self._store and self._world.local_rank == 0:
            _remove_partial(self.folder)  # empty by now
        error = next((outcome for outcome in outcomes if isinstance(outcome, UserError)), None)
        if error:
            if self._world.main:
                _remove_partial(self.folder)
            raise error
        self._outcome = None
        if self._world.main:
            self._start(lambda: self._publish(state, outcomes))

    def finish(self) -> None:
        """Wait until all that was begun is published. Raises `UserError` on every rank if it cannot be."""
        if self._state is not None:
            self.commit()
        self._wait()
        outcome, self._outcome = self._outcome, None
        agree(outcome if isinstance(outcome, UserError) else None)

    @property
    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _start(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception as problem:  # nobody else would hear of it
                self._outcome = problem if isinstance(problem, UserError) else _cannot_write(self.folder, problem)
                if self._state is None:
                    _remove_partial(self.folder)

        self._thread = threading.Thread(target=guarded, daemon=True, name="checkpoint")
        self._thread.start()

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _make_room(self, step: int) -> UserError | None:
        """Remove what is left of killed saves. In a store, where files appear one by one, nothing of a checkpoint that
        is written over may be taken for the new one; as steps only grow, none need be looked for at every save."""
        _remove_partial(self.folder)
        try:
            for path in checkpoints(self.folder) if self._store and step <= self._last else ():
                if step_of(path) >= step:
                    self._remove(path)
        except OSError as problem:
            return _cannot_write(self.folder, problem)
        except UserError as problem:
            return problem
        self._last = step
        return None

    def _copy(self, engine: Engine) -> None:
        """Copy what this rank saves to the host's memory, page-locked where it comes from a GPU."""
        fresh: dict[str, Tensor] = {}
        for fragment in engine.owned_fragments():
            for kind, view in fragment.tensors.items():
                key = f"{fragment.name}|{kind}|{fragment.start}"
                held = self._host.get(key)
                if held is None or held.shape != view.shape:
                    held = torch.empty(view.shape, dtype=torch.float32, pin_memory=view.is_cuda)
                fresh[key] = held.copy_(view, non_blocking=True)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        self._host = fresh

    def _write(self) -> None:
        hidden = self.folder / _hidden(self._step)
        hidden.mkdir(parents=True, exist_ok=True)
        path = hidden / f"rank-{self._world.rank:05d}.safetensors"
        shapes = {key: tuple(tensor.shape) for key, tensor in self._host.items()}
        size, sha256 = write_safetensors(path, shapes, self._host.__getitem__)
        if self._store:
            upload(path, self._store, f"{folder_name(self._step)}/{path.name}")
            path.unlink()
        self._outcome = {"file": path.name, "bytes": size, "sha256": sha256}

    @property
    def _step(self) -> int:
        assert self._state is not None
        return self._state["step"]

    def _publish(self, state: dict[str, Any], files: list[dict[str, Any]]) -> None:
        step = state["step"]
        name, hidden = folder_name(step), self.folder / _hidden(step)
        index = json.dumps({"format": FORMAT, "tensors": self._shapes, "files": files}, indent=1)
        about = json.dumps({"format": FORMAT, **state}, indent=1)
        if self._store:
            upload_text(about, self._store, f"{name}/state.json")
            self._push()
            upload_text(index, self._store, f"{name}/index.json")
            upload_text(name + "\n", self._store, "latest")
        else:
            publish_text(hidden / "index.json", index)
            publish_text(hidden / "state.json", about)
            shutil.rmtree(self.folder / name, ignore_errors=True)  # a damaged one that was passed over
            hidden.rename(self.folder / name)
            sync_folder(self.folder)
            publish_text(self.folder / "latest", name + "\n")
        self._published(state)
        found = checkpoints(self.folder)
        earlier = [path for path in found if step_of(path) <= step and (not self._store or "index.json" in names(path))]
        kept = [*earlier[: self._keep], *(path for path in earlier if self._kept(step_of(path)))]
        for path in found:
            if path not in kept:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        if self._store:
            remove(self._store, f"{path.name}/index.json")
            remove(self._store, path.name)
        else:
            shutil.rmtree(path)


def _hidden(step: int) -> str:
    return f".{folder_name(step)}.partial"


def _remove_partial(folder: Path) -> None:
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _cannot_write(folder: Path, error: Exception) -> UserError:
    do = "Check network and credentials" if store_of(folder) else "Free some space or choose another run.dir"
    remedy = f"{do}, and run again: it goes on from the last checkpoint."
    return UserError("run.dir", f"{error} while saving to {shown(folder)}", "a folder that can be written", remedy)
