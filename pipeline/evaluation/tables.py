"""Tables as text for a terminal, Markdown and LaTeX."""

import sys
from dataclasses import dataclass

GAP = "  "  # between columns
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells as text: names of columns, and rows of which the first cell is a name."""

    header: list[str]
    rows: list[list[str]]

    @property
    def widths(self) -> list[int]:
        """Of the columns."""
        return [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

    @property
    def transposed(self) -> "Table":
        """Rows as columns."""
        header, *rows = zip(self.header, *self.rows, strict=True)
        return Table(list(header), [list(row) for row in rows])


def text(table: Table, limit: int = sys.maxsize) -> str:
    """Columns side by side, numbers to the right.

    Of a table wider than `limit` the rows become columns, if it is narrower so; columns beyond follow below.
    """
    if _wide(table.widths) > limit:
        table = min(table, table.transposed, key=lambda each: _wide(each.widths))
    first, *widths = table.widths
    blocks, places = [], range(1, len(table.header))
    while places:
        count = next((n for n in range(len(places), 1, -1) if _wide([first, *widths[:n]]) <= limit), 1)
        blocks.append("\n".join(_line([row[0], *(row[place] for place in places[:count])], [first, *widths])
                                for row in (table.header, *table.rows)))  # fmt: skip
        places, widths = places[count:], widths[count:]
    return "\n\n".join(blocks)


def _wide(widths: list[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _line(cells: list[str], widths: list[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=False)]
    return GAP.join([cells[0].ljust(widths[0]), *numbers]).rstrip()


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown."""
    told = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row] for row in (table.header, *table.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in told]
    return "\n".join([lines[0], "|---" + "|---:" * (len(table.header) - 1) + "|", *lines[1:]])


def latex(table: Table) -> str:
    """A `tabular`, which needs no package."""
    lines = [" & ".join(map(latex_text, row)) + r" \\" for row in (table.header, *table.rows)]
    columns = "l" + "r" * (len(table.header) - 1)
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", end])


def latex_text(cell: str) -> str:
    """Text as LaTeX shows it, whatever signs are in it."""
    return "".join(LATEX.get(sign, sign) for sign in cell)
