"""Checkpoints that any number of ranks can read, at any ZeRO stage: named ranges of float32 tensors.

A checkpoint is a folder `step-00001000`:
- `rank-00000.safetensors` …, one a rank: 1-D ranges keyed `NAME|KIND|START`, with KIND `weight`, a state of the
  optimizer (`exp_avg`, …) or `ema`, and START the range's place in the flattened tensor;
- `index.json`: format, shape of every parameter, size and sha256 of every file;
- `state.json`: step, examples seen, architecture, classes, preprocessing, dataset, recipe, world size, versions.

It is written under a hidden name and renamed when complete, so that a folder by that name is a whole checkpoint; then
the file `latest` names it, for those who look. Nothing is pickled. Format 1 had no other kinds than AdamW's.

An object store has no rename: there a checkpoint is whole exactly if it has an `index.json`, which is uploaded last and
removed first, and all files in their sizes. Its folder is then one that stands for it (`pipeline/mirror.py`).
"""

import hashlib
import json
import math
import re
from bisect import insort
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vitscale.errors import UserError
from vitscale.pipeline.distributed import World, gather
from vitscale.pipeline.engine import EMA, Engine
from vitscale.pipeline.mirror import fetch, names, shown, sizes
from vitscale.pipeline.tensor_file import TensorFile

FORMAT, READABLE = 2, (1, 2)
FETCHES = 8  # files fetched at a time by who needs them all
KEY = re.compile(r"(?P<name>[^|]+)\|(?P<kind>\w+)\|(?P<start>\d+)")
FOLDER = re.compile(r"step-(\d{8,})")
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
Range = tuple[int, int, "Shard", str]  # start, stop, file, key


@dataclass(frozen=True)
class Index:
    """What `index.json` holds: the shape of every parameter, and the sha256 of every file."""

    shapes: dict[str, tuple[int, ...]]
    files: dict[Path, str]


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, the newest first, whether sound or not."""
    return sorted((folder / name for name in names(folder) if FOLDER.fullmatch(name)), key=step_of, reverse=True)


def folder_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def newest_sound(folder: Path, world: World | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all there with the sizes recorded, and a warning for each passed over.

    With `world` every rank calls it, all get the answer of rank 0's view, and the files' contents are checked too,
    each rank its share; out of a store it fetches those for that, which at the same number of ranks are those it needs.
    Raises `UserError` if a store does not answer: that is no damage.
    """
    warnings = []
    for name in [path.name for path in checkpoints(folder)] if world is None else _names_of_main(folder):
        path, problem = folder / name, None
        try:
            read_state(path)
            files = list(read_index(path).files.items())
            for file, sha256 in files[_share(len(files), world)] if world else ():
                _check_contents(file, sha256)
        except UserError as error:
            problem = error
        problems = [found for found in ([problem] if world is None else gather(problem)) if found]
        if not problems:
            return path, warnings
        for found in problems:
            if found.setting != "checkpoint":
                raise found
        warnings.append(str(problems[0]))
    return None, warnings


def _names_of_main(folder: Path) -> list[str]:
    """Names of the checkpoints that rank 0 sees, on every rank; a path need not be the same on all nodes."""
    return gather([path.name for path in checkpoints(folder)])[0]


def _share(count: int, world: World) -> slice:
    """This rank's part of `count` things in a row."""
    return slice(world.rank * count // world.size, (world.rank + 1) * count // world.size)


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises `UserError` if it is damaged or from a newer version."""
    return _read_json(path / "state.json")


def read_index(path: Path) -> Index:
    """`index.json` of a checkpoint, its files checked for presence and size. Raises `UserError`."""
    index = _read_json(path / "index.json")
    try:
        files = [(RANK_FILE.fullmatch(row["file"])[0], row["bytes"], row["sha256"]) for row in index["files"]]
        shapes = {str(name): tuple(int(side) for side in shape) for name, shape in index["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path / "index.json", repr(error), "rank files and shapes") from error
    most = sum(size for _, size, _ in files) // 4
    for name, shape in shapes.items():  # before memory is asked for what a shape merely claims
        if math.prod(shape) > most:
            raise _damaged(path / "index.json", f"{name} of shape {shape}", f"at most the {most} elements held")
    held = sizes(path, (name for name, *_ in files))
    for name, expected, _ in files:
        size = held.get(name)
        if size != expected:
            found = "no such file" if size is None else f"{size} bytes"
            raise _damaged(path / name, found, f"{expected} bytes")
    return Index(shapes, {path / name: sha256 for name, _, sha256 in files})


def restore(reader: "Reader", engine: Engine, steps: int) -> None:
    """Fill the engine with a checkpoint after `steps` steps of the optimizer, written at any world size and stage.

    An average that the checkpoint lacks begins with the weights. Raises `UserError` if a file is damaged, or lacks a
    state of this optimizer.
    """
    engine.reset_optimizer(steps)
    with torch.no_grad():
        for fragment in engine.fragments():
            for kind, view in fragment.tensors.items():
                source = reader.source(fragment.name, kind)
                reader.fill(fragment.name, source, fragment.start, view)
    engine.publish()


class Reader:
    """Reads any range of any tensor of a checkpoint, from whichever rank files hold parts of it.

    Files are opened when they may hold what is looked for, first those of the ranks about `near` (of 0 to 1, the last):
    a rank that reads what it wrote opens one, and fetches no other out of a store. A file's sha256 is checked when it
    is first read, unless `verified` says that this has been done, and always when it is fetched.
    """

    def __init__(self, path: Path, verified: bool = False, near: float = 0.0) -> None:
        index = read_index(path)
        self.shapes, self._path, self._verified = index.shapes, path, verified
        self._ranges: dict[tuple[str, str], list[Range]] = {}
        places = {file: (place + 0.5) / len(index.files) for place, file in enumerate(index.files)}
        self._unopened = sorted(index.files.items(), key=lambda item: abs(places[item[0]] - near), reverse=True)

    def _open_next(self) -> None:
        file, sha256 = self._unopened.pop()
        shard = Shard(file, sha256, self._verified)
        for key, length in shard.lengths():
            match = KEY.fullmatch(key)
            if not match:
                raise _damaged(file, f"a tensor named {key!r}", "NAME|KIND|START")
            start = int(match["start"])
            parts = self._ranges.setdefault((match["name"], match["kind"]), [])
            insort(parts, (start, start + length, shard, key), key=lambda part: part[0])

    def _open_all(self) -> None:
        with ThreadPoolExecutor(FETCHES) as pool:
            list(pool.map(lambda item: fetch(*item), self._unopened))
        while self._unopened:
            self._open_next()

    def source(self, name: str, kind: str) -> str:
        """The kind to read for `kind` of a parameter: of an average that is not kept, as of frozen weights, the weight.

        To be asked once the weight has been read: an average lies in the same files.
        """
        return "weight" if kind == EMA and (name, EMA) not in self._ranges else kind

    def tensor(self, name: str, kind: str = "weight") -> Tensor:
        """A whole float32 tensor of a parameter, in its shape; of an average that is not kept, the weight.

        Raises `UserError` if a file is damaged.
        """
        self._open_all()
        shape, held = self.shapes[name], max((part[1] for part in self._ranges.get((name, "weight"), [])), default=0)
        if held != math.prod(shape):
            raise _damaged(self._path / "index.json", f"{name} of shape {shape}", f"the {held} elements held")
        flat = torch.empty(math.prod(shape))
        self.fill(name, self.source(name, kind), 0, flat)
        return flat.reshape(self.shapes[name])

    def fill(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Copy elements `start` … of the flattened tensor into the 1-D `out`, all of it."""
        at, stop = start, start + len(out)
        while True:
            for low, high, shard, key in self._ranges.get((name, kind), []):
                if low <= at < min(high, stop):
                    take = min(high, stop)
                    out[at - start : take - start] = shard.read(key, at - low, take - low)
                    at = take
            if at == stop or not self._unopened:
                break
            self._open_next()
        if at != stop:
            raise UserError(
                "checkpoint", f"{name} ({kind}) without elements {at} to {stop}", "every element", "Use another one."
            )


class Shard:
    """One rank's file. Its contents are checked when it is fetched out of a store, else, unless `verified`, when they
    are first read."""

    def __init__(self, path: Path, sha256: str, verified: bool) -> None:
        checked = fetch(path, sha256) or verified
        self.path, self._sha256 = path, None if checked else sha256
        try:
            self._file = TensorFile(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, str(error), "a safetensors file") from error

    def lengths(self) -> Iterator[tuple[str, int]]:
        """Key and number of elements of every range in the file. Raises `UserError` for what is not 1-D."""
        for key, shape in self._file.shapes.items():
            if len(shape) != 1:
                raise _damaged(self.path, f"{key} of shape {shape}", "one dimension")
            yield key, shape[0]

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Elements `low` to `high` of a range. Raises `UserError` if the file is not what was written."""
        if self._sha256:
            _check_contents(self.path, self._sha256)
            self._sha256 = None
        try:
            return self._file.read_range(key, low, high)
        except OSError as error:
            raise _damaged(self.path, str(error), "a file that can be read") from error


def _check_contents(path: Path, sha256: str) -> None:
    if fetch(path, sha256):
        return
    try:
        found = _sha256(path)
    except OSError as error:
        raise _damaged(path, str(error), "a file that can be read") from error
    if found != sha256:
        raise _damaged(path, f"sha256 {found[:12]}…", f"{sha256[:12]}…")


def _read_json(path: Path) -> dict[str, Any]:
    fetch(path)
    try:
        value = json.loads(path.read_text())
        found = value["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, repr(error), "JSON with a `format`") from error
    if found not in READABLE:
        remedy = "Use the vitscale it came from."
        raise UserError("checkpoint", f"{shown(path)} of format {found}", f"format {READABLE[0]} to {FORMAT}", remedy)
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, got: str, expected: str) -> UserError:
    return UserError("checkpoint", f"{shown(path)}: {got}", expected, "The file is damaged: use another checkpoint.")
