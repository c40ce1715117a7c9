"""Tables of plain text: for a terminal and for a Markdown file, from one list of cells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlainTable:
    """A title, the heads of the columns and rows of cells; the first column is aligned left, the others right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A pipe table under its title in bold."""
        lines = [f"**{self.title}**", "", _line(self.columns), "|---" + "|---:" * (len(self.columns) - 1) + "|"]
        return "\n".join([*lines, *map(_line, self.rows), ""])

    def text(self) -> str:
        """Columns aligned with spaces, readable at 80 columns where the cells are short."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [_aligned(self.columns, widths), "-" * (sum(widths) + 2 * (len(widths) - 1))]
        return "\n".join([self.title, "", *lines, *(_aligned(row, widths) for row in self.rows), ""])


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *others = (
        cell.ljust(width) if place == 0 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
