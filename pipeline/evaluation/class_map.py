"""Checkpoints on datasets with some of their classes, or with the same ones by other names: ImageNet-A (Hendrycks et
al. 2021, arXiv:1907.07174), -R (arXiv:2006.16241), -V2, -Sketch and the like.

Logits are restricted to the classes that stand for one of the dataset's, as those sets are evaluated; where several
stand for the same one, the largest counts. What classifies then sees a classifier of the dataset's classes.
"""

import csv
import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.errors import UserError
from vitscale.model.network import Network
from vitscale.pipeline.weights import Trained

SETTING, SUBSET = "--class-map", "subset"
REMEDY = "Give a JSON object {dataset class: checkpoint class or list of them}, or a table of two columns."
Pairs = Iterable[tuple[str, list[str]]]


@dataclass(frozen=True)
class ClassMap:
    """For each class of a dataset, the numbers of the checkpoint's classes that stand for it.

    `source` is a file, of which `sha256` is the digest, or `subset`.
    """

    source: str
    sha256: str | None
    numbers: tuple[tuple[int, ...], ...]

    def describe(self) -> dict[str, Any]:
        """For results: where it comes from, and how many classes of the dataset's and of the checkpoint's it has."""
        mapped = sum(map(len, self.numbers))
        return {
            "source": self.source,
            "sha256": self.sha256,
            "classes": len(self.numbers),
            "checkpoint_classes": mapped,
        }

    def restrict(self, logits_BK: Tensor) -> Tensor:
        """Logits of the checkpoint's classes → logits (B, classes of the dataset)."""
        most = max(map(len, self.numbers))
        table = torch.tensor([each + each[:1] * (most - len(each)) for each in self.numbers], device=logits_BK.device)
        return logits_BK[:, table].amax(dim=2)


@dataclass(frozen=True)
class MappedTrained(Trained):
    """A trained network whose outputs, and `classes`, are those of a dataset."""

    class_map: ClassMap

    def load(self) -> Network:
        network = super().load()

        def restrict(_: nn.Module, __: Any, logits_BK: Tensor) -> Tensor:
            return self.class_map.restrict(logits_BK)

        network.register_forward_hook(restrict)
        return network


def mapped(trained: Trained, classes: Sequence[str], source: str) -> MappedTrained:
    """`trained` as a classifier of a dataset's `classes`, by a file or by `subset`: those of the same names.

    Raises `UserError` for a file that is missing or no map, for names that the dataset or the checkpoint does not have,
    for classes of the dataset without one of the checkpoint, and for one of the checkpoint that stands for two.
    """
    digest = None
    if source == SUBSET:
        pairs: Pairs = ((name, [name]) for name in classes)
    else:
        try:
            content = Path(source).read_bytes()
            pairs = _pairs(content.decode("utf-8-sig"), source)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
            raise UserError(SETTING, f"{source}: {reason}", "a file that maps classes, or `subset`", REMEDY) from error
        digest = hashlib.sha256(content).hexdigest()
    numbers = _numbers(pairs, classes, trained.classes, source)
    return MappedTrained(**{**vars(trained), "classes": list(classes)}, class_map=ClassMap(source, digest, numbers))


def _pairs(text: str, source: str) -> Pairs:
    """Classes of the dataset, each with some of the checkpoint's: of JSON, or of lines with a tab, comma or space."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            told = json.loads(text, object_pairs_hook=list)  # a name may come twice, as in a table
        except ValueError as error:
            raise UserError(SETTING, f"{source}: {error}", "JSON", REMEDY) from error
        if not all(isinstance(row, tuple) for row in told):
            raise UserError(SETTING, f"{source}: a JSON array", "an object", REMEDY)
        rows = [(name, those if isinstance(those, list) else [those]) for name, those in told]
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        sign = next((sign for sign in "\t," if lines and sign in lines[0]), " ")
        table = csv.reader(lines, delimiter=sign, skipinitialspace=True)
        rows = [(row[0].strip(), [name.strip() for name in row[1:]]) for row in table]
    for name, those in rows:
        if not those or not all(isinstance(each, str) and each for each in those):
            raise UserError(SETTING, f"{source}: {those!r} for {name!r}", "one or more names of classes", REMEDY)
    return rows


def _numbers(pairs: Pairs, classes: Sequence[str], known: Sequence[str], source: str) -> tuple[tuple[int, ...], ...]:
    """Of each of the `classes`, the numbers of those of the checkpoint, `known`."""
    places, numbers = ({name: number for number, name in enumerate(names)} for names in (classes, known))
    found: list[list[int]] = [[] for _ in classes]
    taken: dict[str, str] = {}
    for name, those in pairs:
        if name not in places:
            raise _unknown(source, name, "dataset", classes)
        for each in those:
            if each not in numbers:
                raise _unknown(source, each, "checkpoint", known)
            if each in taken:
                got = f"{source}: {each!r} for {taken[each]!r} and for {name!r}"
                raise UserError(SETTING, got, "each class of the checkpoint once", "Leave one out.")
            taken[each] = name
            found[places[name]].append(numbers[each])
    left = [name for name, those in zip(classes, found, strict=True) if not those]
    if left:
        some = ", ".join(map(repr, left[:4]))
        got = f"{source}, without {len(left)} of the dataset's {len(classes)} classes ({some})"
        raise UserError(SETTING, got, "a class of the checkpoint for each", "Add them, or leave their images out.")
    return tuple(map(tuple, found))


def _unknown(source: str, name: str, owner: str, names: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(name, names, 1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Its classes are {', '.join(map(repr, names[:4]))}, …"
    return UserError(SETTING, f"{source}: {name!r}", f"a class of the {owner}", hint)
