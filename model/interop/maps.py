"""Maps between two state dicts: which tensor of one side is made of which of the other, one at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from re import search

import torch
from torch import Tensor

from vitscale.errors import UserError
from vitscale.model.build import build_network
from vitscale.model.config import ArchitectureConfig, ViTConfig

Shape = tuple[int, ...]
MOST_NAMED = 4  # tensors that an error names


@dataclass(frozen=True)
class Tensors:
    """Named tensors that are read one at a time: their shapes, known beforehand, and `read`."""

    shapes: dict[str, Shape]
    read: Callable[[str], Tensor]


@dataclass(frozen=True)
class Made:
    """One tensor of one side: its name, the tensors of the other side that it is made of, and how."""

    name: str
    of: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclass
class Layout:
    """How the tensors of one architecture lie in the files of another project.

    `ours` says how each of our tensors is made of theirs, `theirs` the reverse. Tensors of theirs that match `optional`
    may be there or not; `heads` are the names of theirs that belong to classifiers.
    """

    heads: tuple[str, ...] = ()
    optional: str = r"^$"
    ours: list[Made] = field(default_factory=list)
    theirs: list[Made] = field(default_factory=list)

    def changed(
        self, ours: str, theirs: str, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> None:
        """One tensor of each, `there` from ours and `back`."""
        self.theirs.append(Made(theirs, (ours,), there))
        self.ours.append(Made(ours, (theirs,), back))

    def same(self, ours: str, theirs: str) -> None:
        """The same tensor under two names."""
        self.changed(ours, theirs, same, same)

    def layer(self, ours: str, theirs: str) -> None:
        """`weight` and `bias` under two names."""
        for kind in ("weight", "bias"):
            self.same(f"{ours}.{kind}", f"{theirs}.{kind}")

    def parts(
        self, ours: str, theirs: Sequence[str], there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> None:
        """One tensor of ours, whose equal parts one after another are tensors of theirs, each `there` and `back`."""
        for number, name in enumerate(theirs):
            self.theirs.append(Made(name, (ours,), lambda tensor, i=number: there(tensor.chunk(len(theirs))[i])))
        self.ours.append(Made(ours, tuple(theirs), lambda *parts: torch.cat([back(part) for part in parts])))

    def stack(self, ours: str, theirs: Sequence[str]) -> None:
        """`weight` and `bias` of one layer, whose outputs are those of several of theirs."""
        for kind in ("weight", "bias"):
            self.parts(f"{ours}.{kind}", [f"{each}.{kind}" for each in theirs], same, same)

    def places(self, config: ViTConfig, rows: int, names: Mapping[str, str]) -> None:
        """Tokens and learned positions, by `names` from ours to theirs.

        Before the positions of the patches theirs have `rows` of others: none, so that those of our class and
        distillation token are part of these tokens; or as many as ours; or further ones of the registers.
        """
        placed, registers, pos = config.placed_prefix, config.registers, "pos_embed"
        for number, name in enumerate(n for n in ("cls_token", "dist_token") if n in names):
            if rows or pos not in names:
                self.same(name, names[name])
            else:
                self.theirs.append(Made(names[name], (name, pos), partial(_with_row, row=number)))
                self.ours.append(Made(name, (names[name],), same))
        cut = partial(_without_rows, first=placed, count=registers)
        if pos not in names:
            pass
        elif rows == placed:
            self.same(pos, names[pos])
        elif rows:
            self.changed(pos, names[pos], partial(_with_zero_rows, first=placed, count=registers), cut)
        else:
            gone = partial(_without_rows, first=0, count=placed)
            self.changed(pos, names[pos], gone, partial(_with_zero_rows, first=0, count=placed))
        if registers and rows > placed:
            self.theirs.append(Made(names["reg_token"], ("reg_token",), same))
            added = partial(_with_rows, first=placed, count=registers)
            self.ours.append(Made("reg_token", (names["reg_token"], names[pos]), added))
        elif registers:
            self.same("reg_token", names["reg_token"])


def same(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


def _with_row(token_11D: Tensor, places_1ND: Tensor, row: int) -> Tensor:
    return token_11D + places_1ND[:, row : row + 1]


def _with_rows(tokens_1RD: Tensor, places_1ND: Tensor, first: int, count: int) -> Tensor:
    return tokens_1RD + places_1ND[:, first : first + count]


def _with_zero_rows(places_1ND: Tensor, first: int, count: int) -> Tensor:
    zeros = places_1ND.new_zeros(1, count, places_1ND.shape[2])
    return torch.cat([places_1ND[:, :first], zeros, places_1ND[:, first:]], dim=1)


def _without_rows(places_1ND: Tensor, first: int, count: int) -> Tensor:
    return torch.cat([places_1ND[:, :first], places_1ND[:, first + count :]], dim=1)


def made(recipe: Sequence[Made], source: Tensors) -> Tensors:
    """The tensors that a recipe makes of others. Shapes are computed without reading anything."""
    by_name = {each.name: each for each in recipe}

    def shape(each: Made) -> Shape:
        return tuple(each.make(*(torch.empty(source.shapes[name], device="meta") for name in each.of)).shape)

    def read(name: str) -> Tensor:
        return by_name[name].make(*(source.read(part) for part in by_name[name].of)).contiguous()

    return Tensors({each.name: shape(each) for each in recipe}, read)


def with_more(source: Tensors, more: Mapping[str, Tensor]) -> Tensors:
    """The same tensors and others, which are here already."""
    shapes = source.shapes | {name: tuple(tensor.shape) for name, tensor in more.items()}
    return Tensors(shapes, lambda name: more[name] if name in more else source.read(name))


def renamed(source: Tensors, rename: Callable[[str], str]) -> Tensors:
    """The same tensors under other names; those of an empty name are left out."""
    names = {rename(name): name for name in source.shapes}
    names.pop("", None)
    return Tensors({new: source.shapes[old] for new, old in names.items()}, lambda name: source.read(names[name]))


@lru_cache(maxsize=4)
def our_shapes(config: ArchitectureConfig) -> dict[str, Shape]:
    """Names and shapes of the tensors of our network, without memory for them."""
    with torch.device("meta"):
        state = build_network(config, seed=None).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check(found: Mapping[str, Shape], expected: Mapping[str, Shape], optional: str = r"^$") -> None:
    """Raise `UserError` (`weights`) naming tensors that are missing, unexpected or of another shape, at most four."""
    names = {name for name in (*found, *expected) if not search(optional, name)}
    wrong = [f"{name} is missing" for name in sorted(names - found.keys())]
    wrong += [f"{name} is unexpected" for name in sorted(names - expected.keys())]
    both = sorted(names & found.keys() & expected.keys())
    wrong += [f"{name} is {found[name]}, not {expected[name]}" for name in both if found[name] != expected[name]]
    if wrong:
        raise UserError("weights", some(wrong), "the tensors of its architecture", "Use another file.")


def some(wrong: Sequence[str]) -> str:
    """The first few of a list of troubles, and how many more there are."""
    more = len(wrong) - MOST_NAMED
    return "; ".join(wrong[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def require(config: ArchitectureConfig, what: str, remedy: str, **allowed: Sequence[object]) -> None:
    """Raise `UserError` for a setting of an architecture that `what` has no place for; `allowed` are its values."""
    for name, values in allowed.items():
        got = getattr(config, name)
        if got not in values:
            expected = f"{' or '.join(str(value) for value in values)} in {what}"
            raise UserError(f"model.{name}", got, expected, remedy)
