"""Tables as text for a terminal, Markdown and LaTeX."""

from dataclasses import dataclass

LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells as text: names of columns, and rows of which the first cell is a name."""

    header: list[str]
    rows: list[list[str]]


def text(table: Table) -> str:
    """Columns side by side, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width)
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in (table.header, *table.rows)
    ]  # fmt: skip
    return "\n".join(lines)


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
