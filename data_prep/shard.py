"""`vitscale shard`: list the source → scan → match → dedup → plan → write → records → publish dataset.json.

Each stage is a list of tasks, each task publishes a file as its done-marker, and the next stage reads what all of them
left in `OUT/work`. So any stage can be cut into parts that share nothing but the folders, be killed at any moment, and
go on. The result is a pure function of source, settings and software versions: any number of parts, workers and
interruptions, and any order in which a file system lists names, give the same bytes.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from vitscale.data_prep import phash
from vitscale.data_prep.card import write_card
from vitscale.data_prep.config import ShardConfig
from vitscale.data_prep.dedup import Against, BucketTask, dedup, match
from vitscale.data_prep.executors import Executor, make_executor
from vitscale.data_prep.manifest import (
    DATASET_FILE,
    INDEX,
    INDEX_FILE,
    KEPT,
    REJECTED_FILE,
    SCHEMA_VERSION,
    Dataset,
    ShardEntry,
    fingerprint,
    manifest_parts,
    read_dataset,
    read_table,
    write_index,
)
from vitscale.data_prep.out_folder import WORK, claim, find_complete, release
from vitscale.data_prep.plan import Layout, layout, plan
from vitscale.data_prep.records import RecordsTask, Summary, read_summary, rejected, write_records
from vitscale.data_prep.scan import SCAN, ExistingTask, ScanTask, scan, scan_existing
from vitscale.data_prep.sources import Source, open_source
from vitscale.data_prep.storage import Folder, LocalFolder, open_folder, within
from vitscale.data_prep.write import WriteTask, write
from vitscale.errors import UserError

STAGES = ("scan", "match", "dedup", "plan", "write", "records")
BUCKET_RECORDS, MAX_BUCKETS = 250_000, 4096  # records in memory of a task of dedup and plan; at most so many tasks


@dataclass
class Tally:
    """What a stage got through in this process."""

    images: int = 0
    bytes: int = 0
    rejected: int = 0


Progress = Callable[[str, int, int, Tally], None]


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `of`: what one of several processes does of a stage."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read `3/64`. Raises `UserError` (--part)."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise UserError("--part", text, "a part of all, such as 3/64", "Number the parts from 1.")
        return cls(int(number), int(of))


def bucket_count(images: int) -> int:
    """Tasks of dedup and of plan for so many images."""
    return min(MAX_BUCKETS, -(-images // BUCKET_RECORDS))


@dataclass(frozen=True)
class _Job:
    """A run: what is made of what, and where. `before` is the dataset that is appended to."""

    source: Source
    out: Folder
    work: Folder
    config: ShardConfig
    against: Against
    run: str
    before: Dataset | None

    @property
    def buckets(self) -> int:
        return bucket_count(self.source.images + (self.before.samples if self.before else 0))

    @property
    def bits(self) -> int:
        """Bits of a band; 0 where near duplicates are not looked for."""
        return phash.band_bits(self.source.images) if self.config.dedup.near else 0

    @property
    def generation(self) -> int:
        return len(self.before.info["parts"]) if self.before else 0

    @cached_property
    def cuts(self) -> Layout:
        """Where the samples are cut, once the stage dedup is complete."""
        return _layout(self)


@dataclass(frozen=True)
class _Stage:
    """Tasks by the name of their done-marker within `work`."""

    name: str
    function: Callable[[Any], Any]
    tasks: Callable[[_Job], dict[str, Any]]
    light: Callable[[ShardConfig], bool] = lambda config: True


def shard(
    source: str,
    out: str,
    config: ShardConfig,
    on_progress: Progress | None = None,
    *,
    stage: str = "",
    part: Part | None = None,
    append: bool = False,
) -> dict[str, Any]:
    """Shard `source` (see `open_source`) into the folder `out`; return dataset.json and `already_complete`.

    `on_progress(stage, tasks done, tasks, tally)` is called after each task. Where `out` holds this very dataset,
    nothing is written. An interrupted run is continued. `stage` does one of `STAGES` alone, or a part of it, or
    `publish`, and returns {} unless it published. `append` adds to the dataset in `out`, whose shards stay. Raises
    `UserError` for bad settings, an unusable source, an `out` that holds anything else, and a disk that is full.
    """
    if stage not in ("", "publish", *STAGES):
        raise UserError("--stage", stage, f"one of {', '.join(STAGES)}, publish", "Leave it out for all of them.")
    if part and stage not in STAGES:
        raise UserError("--part", f"{part.number}/{part.of}", "--stage beside it", f"Add --stage {STAGES[0]}.")
    report = on_progress or (lambda stage, done, total, tally: None)
    others = [(path, read_dataset(path, "dedup.against", check_files=False)) for path in config.dedup.against]
    against = tuple((path, dataset.fingerprint) for path, dataset in others)
    listed = open_source(source)
    folder = open_folder(out, "OUT")
    _refuse_nested(listed, folder)
    with _writing(out):
        run = _run_digest(listed, config, against)
        if complete := find_complete(folder, run, append):
            release(folder, run)
            return complete | {"already_complete": True}
        before = read_dataset(out, "OUT") if append else None
        job = _Job(listed, folder, within(folder, WORK), config, against, run, before)
        _check_append(job)
        claim(folder, run, alone=not part, before=before)
        with make_executor(config.executor, config.workers) as executor:
            for name in [stage] if stage else [*STAGES, "publish"]:
                if name != "publish":
                    _run_stage(job, name, part or Part(1, 1), executor, report)
        if stage in STAGES:
            return {}
        _check_done(job, len(STAGES), "publish")
        info = _publish(job)
        release(folder, run)
    return info | {"already_complete": False}


def _run_stage(job: _Job, name: str, part: Part, executor: Executor, report: Progress) -> None:
    """Do those tasks of a stage, or of a part of it, that are not done yet."""
    number = STAGES.index(name)
    _check_done(job, number, name)
    stage = _STAGES[number]
    tasks = list(stage.tasks(job).items())[part.number - 1 :: part.of]
    done = job.work.names(_marker_folder(stage.name))
    todo = [task for marker, task in tasks if marker.rsplit("/", 1)[-1] not in done]
    tally, results = Tally(), executor.map(stage.function, todo, stage.light(job.config))
    for finished, result in enumerate(results, start=1 + len(tasks) - len(todo)):
        images, size, lost = result or (0, 0, 0)
        tally.images, tally.bytes, tally.rejected = tally.images + images, tally.bytes + size, tally.rejected + lost
        report(name, finished, len(tasks), tally)


def _check_done(job: _Job, count: int, name: str) -> None:
    """Raise `UserError` unless the first `count` stages are complete."""
    for stage in _STAGES[:count]:
        wanted = {marker.rsplit("/", 1)[-1] for marker in stage.tasks(job)}
        missing = wanted - job.work.names(_marker_folder(stage.name))
        if missing:
            raise UserError(
                "--stage",
                f"{name}, while {len(missing)} of {len(wanted)} tasks of the stage {stage.name} are not done",
                "all of them done",
                f"Run every part of --stage {stage.name} first; one that failed can be run again.",
            )


def _marker_folder(stage: str) -> str:
    return {"write": "shards", "records": "summary"}.get(stage, stage)


def _scan_tasks(job: _Job) -> dict[str, Any]:
    place = job.source.folder, job.work
    return {
        f"scan/{number:04d}.parquet": ScanTask(*place, number, chunk, job.config, job.buckets, job.bits)
        for number, chunk in enumerate(job.source.chunks)
    }


def _bucket_tasks(job: _Job, marker: str) -> dict[str, Any]:
    chunks = len(job.source.chunks)
    existing = len(manifest_parts(job.before)) if job.before else 0
    names = (*(f"e{number:04d}" for number in range(existing)), *(f"{number:04d}" for number in range(chunks)))
    shared = names, job.buckets, job.bits, chunks, job.config.seed, job.config.dedup, job.against
    return {marker.format(number): BucketTask(job.work, number, *shared) for number in range(job.buckets)}


def _write_tasks(job: _Job) -> dict[str, Any]:
    taken = [
        re.fullmatch(rf"{job.config.split}-(\d+)\.tar", entry.name)
        for entry in (job.before.shards if job.before else ())
    ]
    first = max((int(name[1]) + 1 for name in taken if name), default=0)  # tars that were indexed have other numbers
    tasks = {}
    for number, (start, stop) in enumerate(pairwise(job.cuts.shards)):
        name = f"{job.config.split}-{first + number:06d}.tar"
        place = job.source.folder, job.work, job.out, name, number
        tasks[f"shards/{number:06d}.parquet"] = WriteTask(*place, job.cuts.buckets, start, stop)
    return tasks


def _layout(job: _Job) -> Layout:
    cuts = layout(job.work, job.buckets, job.config.shard_samples, job.config.shard_mb * 10**6)
    if not cuts.shards[-1] and not job.before:
        reason = next(iter(_first_reasons(job)), "it is empty")
        raise UserError(
            "SOURCE",
            f"{job.source.name}, of which no image is kept (first: {reason})",
            "at least one readable image",
            "Check that these are JPEG, PNG, GIF, WebP, BMP or TIFF files, and the settings of dedup.",
        )
    return cuts


def _first_reasons(job: _Job) -> Iterator[str]:
    for number in range(len(job.source.chunks)):
        reasons = read_table(job.work, f"scan/{number:04d}.parquet", SCAN)["reason"]
        yield from (reason for reason in reasons.to_pylist() if reason)


def _records_tasks(job: _Job) -> dict[str, Any]:
    return {
        f"summary/{number:04d}.json": RecordsTask(job.work, job.out, number, job.generation, job.buckets)
        for number in range(len(job.source.chunks))
    }


def _all_scans(task: Any) -> Any:
    return scan_existing(task) if isinstance(task, ExistingTask) else scan(task)


def _all_scan_tasks(job: _Job) -> dict[str, Any]:
    existing: dict[str, Any] = {}
    parts = manifest_parts(job.before) if job.before else []
    for number, name in enumerate(parts):
        task = ExistingTask(job.out, job.work, number, number - len(parts), name, job.buckets, job.bits)
        existing[f"scan/e{number:04d}.parquet"] = task
    return existing | _scan_tasks(job)


_STAGES = (
    _Stage("scan", _all_scans, _all_scan_tasks, lambda config: config.check == "header" and not config.resize.shorter),
    _Stage("match", match, lambda job: _bucket_tasks(job, "match/{:04d}.arrow") if job.bits else {}),
    _Stage("dedup", dedup, lambda job: _bucket_tasks(job, "dedup/{:04d}.parquet")),
    _Stage("plan", plan, lambda job: _bucket_tasks(job, "plan/{:04d}.parquet")),
    _Stage("write", write, _write_tasks),
    _Stage("records", write_records, _records_tasks),
)


@contextmanager
def _writing(out: str) -> Iterator[None]:
    """Turn what the file system refuses into an error for the user; sources report their own."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "OUT",
            f"{out} ({error.strerror or error})",
            "a folder that can be written, with room",
            "Free space, run again.",
        ) from error


def _refuse_nested(source: Source, out: Folder) -> None:
    """Refuse to write shards among the images, where the next run would list them."""
    if isinstance(out, LocalFolder) and isinstance(source.folder, LocalFolder):
        inside = out.path.resolve().is_relative_to(source.folder.path.resolve())
    else:
        inside = f"{out.url}/".startswith(f"{source.folder.url}/")
    if inside and source.walked:
        raise UserError("OUT", f"{out.url}, within SOURCE", "a folder outside of it", "Choose another folder for OUT.")


def _run_digest(source: Source, config: ShardConfig, against: Against) -> str:
    """Name what would be made of what, apart from software versions."""
    settings = asdict(config)
    del settings["workers"], settings["executor"]
    settings["dedup"]["against"] = [fingerprint for _, fingerprint in against]
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, source.digest, source.classes, settings]).encode()).hexdigest()


def _check_append(job: _Job) -> None:
    """Raise `UserError` where the source does not go with the dataset that it is appended to."""
    if job.before is None:
        return
    for name, got, expected in (
        ("split", job.config.split, job.before.split),
        ("SOURCE", f"labels of the kind {job.source.labelled}", f"labels of the kind {job.before.labelled}"),
        ("SOURCE", f"the classes {job.source.classes}", f"the classes {list(job.before.classes)}"),
    ):
        if got != expected and not (got == "the classes None"):
            raise UserError(name, got, f"{expected}, as in {job.before.folder.url}", "Shard into a folder of its own.")


def _publish(job: _Job) -> dict[str, Any]:
    """Publish index, list of rejected and card, and dataset.json last; return its content."""
    summary = read_summary(job.work, len(job.source.chunks))
    old, new = job.before.shards if job.before else (), list(_new_entries(job))
    if (found := sum(entry.samples for entry in new)) != (kept := summary.status.get(KEPT, 0)):
        got = f"{job.out.url}, whose new shards hold {found} of {kept} images"
        raise UserError("OUT", got, "stages that are all of one version of vitscale", "Shard again, from the start.")
    entries = [*old, *new]
    suffix = f"-{job.generation}" if job.before else ""
    index = INDEX_FILE.replace(".", f"{suffix}.")
    write_index(job.out, index, entries)
    with job.out.publish(REJECTED_FILE.replace(".", f"{suffix}.")) as file:
        file.write(b'"name","status","reason"\n')
        for number in range(len(job.source.chunks)):
            file.write(job.work.read(f"rejected/{number:04d}.csv"))
    info = _describe(job, summary, entries, index)
    write_card(job.out, job.source, job.work, info, summary)
    with job.out.publish(DATASET_FILE) as file:
        file.write(json.dumps(info, indent=1, ensure_ascii=False).encode() + b"\n")
    return info


def _new_entries(job: _Job) -> Iterator[ShardEntry]:
    with ThreadPoolExecutor(16) as pool:  # an object store answers slowly, but many at once
        for table in pool.map(lambda marker: read_table(job.work, marker, INDEX), _write_tasks(job)):
            for row in table.to_pylist():
                yield ShardEntry(row["shard"], row["samples"], row["bytes"], row["sha256"])


def _describe(job: _Job, summary: Summary, entries: Sequence[ShardEntry], index: str) -> dict[str, Any]:
    """Return the content of dataset.json."""
    config, before = job.config, job.before.info if job.before else {}
    labels = {int(label): count for label, count in summary.labels.items()}
    classes = job.source.classes
    if classes is None:
        classes = list(before["classes"]) if before else [str(n) for n in range(1 + max(labels, default=-1))]
        if before and max(labels, default=-1) >= len(classes):
            got = f"label {max(labels)}"
            raise UserError(
                "SOURCE", got, f"labels of the {len(classes)} classes of OUT", "Shard into a folder of its own."
            )
    counts = [labels.get(label, 0) for label in range(len(classes))]
    earlier = before.get("class_counts", [0] * len(classes))
    lost = {**before.get("rejected", {})}
    for name, count in rejected(summary).items():
        lost[name] = lost.get(name, 0) + count
    dropped = {name: before.get(name, 0) + summary.status.get(name, 0) for name in ("duplicate", "leaked")}
    settings = asdict(config)
    for name in ("split", "seed", "workers", "executor"):
        del settings[name]
    new = entries[len(job.before.shards) if job.before else 0 :]
    total = Summary(**before.get("summary", {}))
    total.add(summary)
    made = {"run": job.run, "source": job.source.name, "seed": config.seed, "settings": settings}
    made |= {"shards": len(new), "samples": sum(entry.samples for entry in new)}
    return {
        "schema_version": SCHEMA_VERSION,
        "split": config.split,
        "labels": job.source.labelled,
        "samples": sum(entry.samples for entry in entries),
        "rejected": dict(sorted(lost.items())),
        **dropped,
        "shards": len(entries),
        "bytes": sum(entry.bytes for entry in entries),
        "classes": classes,
        "class_counts": [old + count for old, count in zip(earlier, counts, strict=True)],
        "max_pixels": max(config.max_pixels, before.get("max_pixels", 0)),
        "index": index,
        "fingerprint": fingerprint(entries),
        "summary": total.counts(),
        "parts": [*before.get("parts", []), made],
    }
