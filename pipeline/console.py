"""What a run says: a progress line on a terminal, plain lines elsewhere; rank 0 alone speaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

OUT = Console(highlight=False, soft_wrap=True)


class Advance(Protocol):
    """Told how far the work is: units done of all, and a short text beside the bar."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


class RateColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


def count(number: int, noun: str) -> str:
    """`1 shard`, `2,000 shards`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def say(text: str) -> None:
    """Print one line above any progress bar."""
    OUT.print(text, markup=False)


@contextmanager
def progress(title: str, shown: bool = True) -> Iterator[Advance]:
    """A bar with count, rate, ETA and text while the block runs, if the output is a terminal; else nothing."""
    if not (shown and OUT.is_terminal):
        yield lambda done, total, text="": None
        return
    told = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
    columns = (told[0], BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn(), told[1])
    with Progress(*columns, console=OUT, transient=True) as bar:
        task = bar.add_task(title, total=None, text="")
        yield lambda done, total, text="": bar.update(task, completed=done, total=total, text=text)
