"""The folder that a run writes: whose files are in it, and may this run write there?

A run first leaves `unfinished.json`, which names what it makes, and removes it after dataset.json is published. So a
folder tells apart: complete, left by an interrupted run of the same settings (continued), and anything else (refused).
Files that this package did not write are never touched.
"""

import json
import re
from importlib.metadata import version
from typing import Any

from vitscale.data_prep.manifest import (
    DATASET_FILE,
    INDEX_FILE,
    MANIFEST,
    REJECTED_FILE,
    Dataset,
    manifest_parts,
    read_dataset,
)
from vitscale.data_prep.publish import PARTIAL
from vitscale.data_prep.storage import Folder, LocalFolder
from vitscale.errors import UserError

UNFINISHED_FILE, WORK = "unfinished.json", "work"
CARD_FILES = ("card.html", "card.md")
_OWN = {UNFINISHED_FILE, INDEX_FILE, MANIFEST, REJECTED_FILE, DATASET_FILE, WORK, *CARD_FILES}
_SHARD_FILE = re.compile(r"[\w-]+-\d{6}\.(tar|samples\.parquet)|index-\d+\.parquet")
_REMEDY = "Choose another folder for OUT, or remove this one if you no longer need it."


def find_complete(out: Folder, run: str, append: bool) -> dict[str, Any] | None:
    """Return dataset.json where `out` already holds all of this `run`, None where the run may write there.

    `run` is a digest of what is made of what. Changes nothing. Raises `UserError` (OUT) for any other content.
    """
    if isinstance(out, LocalFolder) and out.path.exists() and not out.path.is_dir():
        raise UserError("OUT", f"{out.url}, which is a file", "a folder", "Choose another path for OUT.")
    names = sorted(out.names())
    if DATASET_FILE in names:
        info = read_dataset(out.url, "OUT").info
        if run in [part["run"] for part in info["parts"]]:
            return info
        if not append:
            raise UserError(
                "OUT", f"{out.url}, a dataset of another source or other settings", "an empty folder", _REMEDY
            )
    elif append:
        raise UserError("--append", f"{out.url}, without a dataset", "a dataset to append to", "Leave --append out.")
    else:
        _refuse_foreign(out, names)
    if UNFINISHED_FILE in names and out.read(UNFINISHED_FILE) != _claim_of(run):
        remedy = (
            f"Run that append again, or give it up: remove {UNFINISHED_FILE} and {WORK} there." if append else _REMEDY
        )
        raise UserError(
            "OUT",
            f"{out.url}, left by an interrupted run of another source, settings or versions",
            "a whole dataset" if append else "an empty folder",
            remedy,
        )
    return None


def claim(out: Folder, run: str, alone: bool, before: Dataset | None = None) -> None:
    """Make the folder and write down which run owns it; if `alone`, clear away what a killed run was still writing.

    What an append to the dataset `before` left, if it was given up, is cleared away by the next one.
    """
    if alone and isinstance(out, LocalFolder):
        for left_over in out.path.rglob(f"*{PARTIAL}"):
            left_over.unlink(missing_ok=True)  # its writer may live on for a moment
    if out.size(UNFINISHED_FILE) is None:
        if before:
            for name in {f"{MANIFEST}/{name}" for name in out.names(MANIFEST)} - set(manifest_parts(before)):
                out.remove(name)
            if alone:
                out.remove(WORK)
        with out.publish(UNFINISHED_FILE) as file:
            file.write(_claim_of(run))


def release(out: Folder, run: str) -> None:
    """Give up the claim of this run, once dataset.json is published; that of another one, an append, stays."""
    if out.size(UNFINISHED_FILE) is not None and json.loads(out.read(UNFINISHED_FILE))["run"] != run:
        return
    out.remove(WORK)
    out.remove(UNFINISHED_FILE)


def _refuse_foreign(out: Folder, names: list[str]) -> None:
    """Raise where a name is not this package's, or could be but no run claims the folder."""
    claimed = UNFINISHED_FILE in names
    foreign = [name for name in names if not (_is_own(name) if claimed else name.startswith(UNFINISHED_FILE))]
    if foreign:
        raise UserError("OUT", f"{out.url}, which holds other files ({foreign[0]})", "an empty folder", _REMEDY)


def _is_own(name: str) -> bool:
    return name in _OWN or name.endswith(PARTIAL) or _SHARD_FILE.fullmatch(name) is not None


def _claim_of(run: str) -> bytes:
    """Name the run and the versions on which the bytes depend, so that shards of two versions never mix."""
    libraries = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")
    return json.dumps({"run": run} | {name: version(name) for name in libraries}).encode() + b"\n"
