"""Second stage: find copies, exact and near, within the source and against other datasets; name what is kept.

`match` compares the hashes that share a band and writes pairs; `dedup` meets all records of equal content, decides on
each, and gives it its key. Whether a record is a duplicate depends on pairs alone: it is one if any record before it,
in source order, is a copy of it, be that one kept or not. So no process needs to see the whole of the records.

- `work/match/NNNN.arrow`   near pairs (`PAIRS`) of one bucket of bands, in buckets of the later one's SHA-256
- `work/named/NNNN.arrow`   kept records of one bucket of SHA-256 (`NAMED`), in buckets of their rank
- `work/status/NNNN.arrow`  status of all its records (`STATUS`), in buckets by chunk
- `work/dedup/NNNN.parquet` how many it keeps in each bucket of rank (`COUNTS`): the done-marker
"""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitscale.data_prep import phash
from vitscale.data_prep.config import DedupConfig
from vitscale.data_prep.exchange import bucket_of, gather, scatter
from vitscale.data_prep.manifest import (
    DUPLICATE,
    HASH_BYTES,
    KEPT,
    LEAKED,
    PHASH_BYTES,
    RECORDS,
    manifest_parts,
    read_dataset,
    read_table,
    write_table,
)
from vitscale.data_prep.scan import KEYS, NEAR, PLACES, REFERENCE, matrix, near_tables
from vitscale.data_prep.storage import Folder
from vitscale.data_prep.write import stored_size

KEY_DIGITS = 24  # of a SHA-256 in hexadecimal: 96 bits, so that even 10¹⁰ images collide with probability 10⁻⁹
RANK_BYTES = 16

PAIRS = pa.schema(
    [
        ("sha256", pa.binary(HASH_BYTES)),  # of the later one
        ("chunk", pa.int32()),
        ("row", pa.int32()),
        ("distance", pa.int32()),
        ("other_chunk", pa.int32()),
        ("other_row", pa.int32()),
        ("other_sha256", pa.binary(HASH_BYTES)),
    ]
)
NAMED = pa.schema(
    [
        ("rank", pa.binary(RANK_BYTES)),  # place in the shuffle
        ("key", pa.string()),
        ("sha256", pa.binary(HASH_BYTES)),
        ("chunk", pa.int32()),
        ("label", pa.int32()),
        ("labels", pa.list_(pa.int32())),
        ("extra", pa.large_string()),
        *PLACES,
    ]
)
STATUS = pa.schema(
    [
        ("row", pa.int32()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("other_chunk", pa.int32()),  # of the copy that a near duplicate was found by
        ("other_row", pa.int32()),
    ]
)
COUNTS = pa.schema([("samples", pa.int64()), ("bytes", pa.int64())])  # bytes as they take in a tar
Against = tuple[tuple[str, str], ...]  # path and fingerprint of each dataset of dedup.against


@dataclass(frozen=True)
class BucketTask:
    """One bucket; `names` are the files to gather it from, `chunks` how many chunks the source has."""

    work: Folder
    number: int
    names: tuple[str, ...]
    buckets: int
    bits: int
    chunks: int
    seed: int
    config: DedupConfig
    against: Against


def match(task: BucketTask) -> None:
    """Write the near pairs of one bucket of bands: of each record, that with the first copy that is found."""
    references = near_references(task.against)
    found: list[pa.Table] = []
    tables = near_tables(references, task.bits, task.buckets)
    for number, (reference, bucket) in enumerate(tables):
        ours = gather(
            task.work, [f"near/{name}.arrow" for name in task.names], number * task.buckets + task.number, NEAR
        )
        table = pa.concat_tables([reference.filter(pa.array(bucket == task.number)), ours]).combine_chunks()
        found.append(_pairs(table, task.config.near))
    pairs = pa.concat_tables(found)
    pairs = pairs.sort_by([(name, "ascending") for name in ("chunk", "row", "other_chunk", "other_row")])
    where = np.stack([pairs[name].to_numpy() for name in ("chunk", "row")], axis=1)
    new = np.r_[True, (where[1:] != where[:-1]).any(axis=1)][: len(pairs)]
    pairs = pairs.filter(pa.array(new))
    with task.work.publish(f"match/{task.number:04d}.arrow") as file:
        scatter(file, [(pairs, bucket_of(matrix(pairs["sha256"]), task.buckets))], task.buckets, PAIRS)


def _pairs(table: pa.Table, limit: int) -> pa.Table:
    """Near pairs (`PAIRS`) among rows of `NEAR`: those of the source with the first copy that shares their band."""
    order = np.lexsort([table[name].to_numpy() for name in ("row", "chunk", "band")])
    table = table.take(pa.array(order))
    copies, bits = np.full(len(table), -1), np.zeros(len(table), np.int32)
    for later, earlier, distances in phash.near_pairs(table["band"].to_numpy(), matrix(table["phash"]), limit):
        copies[later], bits[later] = earlier, distances  # the earliest comes last, and stays
    rows = np.flatnonzero((copies >= 0) & (table["chunk"].to_numpy() >= 0))
    one, other = table.take(pa.array(rows)), table.take(pa.array(copies[rows]))
    columns = [*(one[name] for name in ("sha256", "chunk", "row")), pa.array(bits[rows])]
    return pa.table([*columns, *(other[name] for name in ("chunk", "row", "sha256"))], schema=PAIRS)


def dedup(task: BucketTask) -> None:
    """Decide on all records of one bucket of SHA-256; write what becomes of them."""
    keys = gather(task.work, [f"keys/{name}.arrow" for name in task.names], task.number, KEYS)
    sha, chunks, rows = matrix(keys["sha256"]), keys["chunk"].to_numpy(), keys["row"].to_numpy()
    words = np.ascontiguousarray(sha).view(">u8")
    order = np.lexsort([rows, chunks, *words.T[::-1]])
    keys, sha, chunks, rows = keys.take(pa.array(order)), sha[order], chunks[order], rows[order]
    new = np.r_[True, (sha[1:] != sha[:-1]).any(axis=1)] if len(sha) else np.zeros(0, bool)
    copies = np.arange(len(sha)) - np.flatnonzero(new)[np.cumsum(new) - 1] if len(sha) else np.zeros(0, np.int64)
    near = _near(task)
    references = reference_names(task.against)
    leaked = dict(zip(_references(task.against)["sha256"].to_pylist(), references, strict=True))
    drop = task.config.exact == "drop" or task.config.near > 0
    status = {"row": rows, "key": [], "status": [], "reason": [], "other_chunk": [], "other_row": []}
    hexed = [content.hex()[:KEY_DIGITS] for content in keys["sha256"].to_pylist()]
    for at, (content, base, copy) in enumerate(zip(keys["sha256"].to_pylist(), hexed, copies.tolist(), strict=True)):
        key = f"{base}-{copy}" if copy else base
        pair = near.get((int(chunks[at]), int(rows[at])))
        verdict, reason, other = KEPT, None, (None, None)
        if content in leaked:
            verdict, reason = LEAKED, f"leaked: exact copy of a sample of {leaked[content]}"
        elif pair and pair["other_chunk"] == REFERENCE:
            found = references[pair["other_row"]]
            verdict, reason = LEAKED, f"leaked: near copy, {pair['distance']} bits, of a sample of {found}"
        elif drop and copy:
            verdict, reason = DUPLICATE, f"duplicate: exact copy of {base}"
        elif pair:
            kept = pair["other_sha256"].hex()[:KEY_DIGITS]
            verdict, reason = DUPLICATE, f"duplicate: near copy, {pair['distance']} bits, of {kept}"
            other = pair["other_chunk"], pair["other_row"]
        for name, value in zip(
            ("key", "status", "reason", "other_chunk", "other_row"),
            (key if verdict == KEPT else None, verdict, reason, *other),
            strict=True,
        ):
            status[name].append(value)
    kept = np.array([verdict == KEPT for verdict in status["status"]], bool) & (chunks >= 0)
    names = [key for key, keep in zip(status["key"], kept, strict=True) if keep]
    counts = _write_named(task, keys.filter(pa.array(kept)), names)
    ours = pa.table(status, schema=STATUS).filter(pa.array(chunks >= 0))
    with task.work.publish(f"status/{task.number:04d}.arrow") as file:
        scatter(file, [(ours, chunks[chunks >= 0].astype(np.int64))], max(task.chunks, 1), STATUS)
    write_table(task.work, f"dedup/{task.number:04d}.parquet", counts)


def _near(task: BucketTask) -> dict[tuple[int, int], dict]:
    """For records with near copies before them: the pair to name, which is with the first of them, a leak if any."""
    if not task.bits:
        return {}
    names = [f"match/{number:04d}.arrow" for number in range(task.buckets)]
    best: dict[tuple[int, int], dict] = {}
    for pair in gather(task.work, names, task.number, PAIRS).to_pylist():
        old = best.setdefault((pair["chunk"], pair["row"]), pair)
        if (pair["other_chunk"], pair["other_row"]) < (old["other_chunk"], old["other_row"]):
            best[pair["chunk"], pair["row"]] = pair
    return best


def _write_named(task: BucketTask, records: pa.Table, keys: list[str]) -> pa.Table:
    """Write `NAMED`; return `COUNTS`."""
    ranks = pa.array([rank(key, task.seed) for key in keys], pa.binary(RANK_BYTES))
    columns = {"rank": ranks, "key": pa.array(keys, pa.string())}
    named = pa.table([columns[name] if name in columns else records[name] for name in NAMED.names], schema=NAMED)
    digests = np.frombuffer(ranks.buffers()[1] or b"", np.uint8)[: len(ranks) * RANK_BYTES].reshape(-1, RANK_BYTES)
    bucket = bucket_of(digests, task.buckets)
    with task.work.publish(f"named/{task.number:04d}.arrow") as file:
        scatter(file, [(named, bucket)], task.buckets, NAMED)
    sizes = stored_size(named["length"].to_numpy())
    samples = np.bincount(bucket, minlength=task.buckets)
    size = np.bincount(bucket, weights=sizes, minlength=task.buckets).astype(np.int64)
    return pa.table([samples, size], schema=COUNTS)


def rank(key: str, seed: int) -> bytes:
    """A sample's place in the shuffle: random, yet free of the order in which samples are given."""
    return blake2b(seed.to_bytes(8, "little") + key.encode(), digest_size=RANK_BYTES).digest()


@lru_cache(maxsize=1)
def _references(against: Against) -> pa.Table:
    """Kept records of the datasets of dedup.against: `sha256`, `phash` and `set`, its place in the list."""
    tables = []
    for number, (path, _) in enumerate(against):
        dataset = read_dataset(path, "dedup.against", check_files=False)
        for part in manifest_parts(dataset):
            columns = ("sha256", "phash", "status")
            table = read_table(dataset.folder, part, pa.schema([RECORDS.field(name) for name in columns]))
            table = table.filter(pc.equal(table["status"], KEPT)).drop_columns("status")
            tables.append(table.append_column("set", pa.array(np.full(len(table), number, np.int32))))
    empty = pa.schema([("sha256", pa.binary(HASH_BYTES)), ("phash", pa.binary(PHASH_BYTES)), ("set", pa.int32())])
    return pa.concat_tables([empty.empty_table(), *tables]).combine_chunks()


def near_references(against: Against) -> pa.Table:
    """The records to compare with, as rows of `NEAR` without bands; `row` is their place in all of them."""
    table = _references(against)
    table = table.append_column("chunk", pa.array(np.full(len(table), REFERENCE, np.int32)))
    table = table.append_column("row", pa.array(np.arange(len(table), dtype=np.int32)))
    return table.filter(table["phash"].is_valid())


def reference_names(against: Against) -> list[str]:
    """The names of the datasets of the records to compare with."""
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path, _ in against]
    return [names[number] for number in _references(against)["set"].to_pylist()]
