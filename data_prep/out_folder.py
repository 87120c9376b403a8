"""The folder that a run writes: whose files are in it, and may this run write there?

A run first leaves `unfinished.json`, which names what it makes, and removes it after dataset.json is published. So a
folder tells apart: complete, left by an interrupted run of the same settings (continued), and anything else (refused).
Files that this package did not write are never touched.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa

from vitscale.data_prep.manifest import (
    DATASET_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    REJECTED_FILE,
    read_dataset,
)
from vitscale.data_prep.publish import PARTIAL, publish
from vitscale.errors import UserError

UNFINISHED_FILE = "unfinished.json"
_OWN = {UNFINISHED_FILE, INDEX_FILE, MANIFEST_FILE, REJECTED_FILE, DATASET_FILE}
_SHARD_FILE = re.compile(r"[\w-]+-\d{6}\.(tar|samples\.parquet)")
_REMEDY = "Choose another folder for OUT, or remove this one if you no longer need it."


def find_complete(out: Path, run: str) -> dict[str, Any] | None:
    """Return dataset.json where `out` already holds all of this `run`, None where the run may write there.

    `run` is a digest of what is made of what. Changes nothing. Raises `UserError` (OUT) for any other content.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError("OUT", f"{out}, which is a file", "a folder", "Choose another path for OUT.")
    names = sorted(os.listdir(out))
    if DATASET_FILE in names:
        info = read_dataset(out, "OUT").info
        if info.get("run") == run:
            return info
        raise UserError("OUT", f"{out}, a dataset of another source or other settings", "an empty folder", _REMEDY)
    _refuse_foreign(out, names)
    if UNFINISHED_FILE in names and (out / UNFINISHED_FILE).read_bytes() != _claim_of(run):
        raise UserError(
            "OUT",
            f"{out}, left by an interrupted run of another source, settings or versions",
            "an empty folder",
            _REMEDY,
        )
    return None


def claim(out: Path, run: str) -> None:
    """Make the folder and write down which run owns it; clear away what a killed run was still writing."""
    out.mkdir(parents=True, exist_ok=True)
    for left_over in out.glob(f"*{PARTIAL}"):
        left_over.unlink()
    with publish(out / UNFINISHED_FILE) as file:
        file.write(_claim_of(run))


def release(out: Path) -> None:
    """Give up the claim, once dataset.json is published."""
    (out / UNFINISHED_FILE).unlink(missing_ok=True)


def _refuse_foreign(out: Path, names: list[str]) -> None:
    """Raise where a name is not this package's, or could be but no run claims the folder."""
    claimed = UNFINISHED_FILE in names
    foreign = [name for name in names if not (_is_own(name) if claimed else name.startswith(UNFINISHED_FILE))]
    if foreign:
        raise UserError("OUT", f"{out}, which holds other files ({foreign[0]})", "an empty folder", _REMEDY)


def _is_own(name: str) -> bool:
    return name in _OWN or name.endswith(PARTIAL) or _SHARD_FILE.fullmatch(name) is not None


def _claim_of(run: str) -> bytes:
    """Name the run and the versions on which the bytes depend, so that shards of two versions never mix."""
    return json.dumps({"run": run, "pillow": PIL.__version__, "pyarrow": pa.__version__}).encode() + b"\n"
