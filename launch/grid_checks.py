"""What a grid must not be: runs that cannot be compared, are the same, or have seen what the best is tested on."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from vitscale.data_prep.manifest import read_dataset
from vitscale.launch.chain_stages import read_by
from vitscale.pipeline.config import Config, require


def check_split(configs: list[Config], test: str) -> None:
    """Raise `UserError` unless there is something to choose by, the same for all runs."""
    dev, val = configs[0].data.dev, configs[0].data.val
    require(bool(dev or val) or len(configs) == 1, "data.dev", "nothing, nor data.val",
            "images to choose the best run by", "Add data.dev=2%, which holds them out of data.train.")  # fmt: skip
    by = [compared_on(config) for config in configs]
    other = next((each for each in by if each != by[0]), by[0])
    require(other == by[0], "--grid", f"runs on {by[0]} and on {other}", "settings of training",
            "All runs are compared on the same images: with data.val, data.train may vary.")  # fmt: skip
    patience = max(config.eval.patience for config in configs)
    require(not (test and dev and patience), "eval.patience", f"{patience} with --test",
            "0: a run on the whole of data.train has nothing to stop by",
            "Vary train.duration instead.")  # fmt: skip


def compared_on(config: Config) -> str:
    """The images that a run is compared with others on."""
    paths = ", ".join(path for path, _ in config.data.mixture)
    return f"data.dev={config.data.dev} of {paths}" if config.data.dev else f"data.val={config.data.val}"


def check_values(settings: tuple[str, ...], runs: Mapping[str, Config], varied: list[str]) -> None:
    """Raise `UserError` for what is both given and varied, and for runs, by their folders, that would be the same."""
    for word in settings:
        given = word.partition("=")[0]
        key = next((key for key in varied if f"{key}.".startswith(f"{given}.") or given.startswith(f"{key}.")), "")
        require(not key, "--grid", f"{key} beside {word}", "a setting that is given once", "Take one of them out.")
    seen: dict[str, str] = {}
    for folder, config in runs.items():
        recipe = repr(replace(config, run=replace(config.run, dir="")))
        got = f"{folder}, which is the same run as {seen.get(recipe)}"
        require(recipe not in seen, "--grid", got, "values that differ", "Take one out.")
        seen[recipe] = folder


def check_unseen(test: str, configs: list[Config], same: Callable[[str, str], bool]) -> None:
    """Raise `UserError` if a dataset that runs are trained on or chosen by is the `same` as the test set."""
    for setting, path in dict.fromkeys(pair for config in configs for pair in _looked_at(config)):
        require(not same(path, test), "--test", f"{test}, with images of {setting} ({path})",
                "images that nothing is trained on or chosen by",
                "Give a test set of its own; data.dev=2% holds images to choose by out of data.train.")  # fmt: skip


def _looked_at(config: Config) -> Iterator[tuple[str, str]]:
    unused = {"init_from", "data.val"} if config.data.dev else {"init_from"}
    yield from (pair for pair in read_by(config) if pair[0] not in unused)


def same_path(one: str, other: str) -> bool:
    """Whether two paths are of one folder."""
    return os.path.realpath(one) == os.path.realpath(other)


def same_images(one: str, other: str) -> bool:
    """Whether two datasets have a shard in common, by its bytes. Raises `UserError`."""
    ours, theirs = (read_dataset(path, check_files=False).shards for path in (one, other))
    return not {shard.sha256 for shard in ours}.isdisjoint(shard.sha256 for shard in theirs)
