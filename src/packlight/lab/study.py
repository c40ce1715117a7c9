"""A study on disk: rows of evidence as they are measured, tables and a plot of them.

A study goes on where it was cut off: what has its row is not measured again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packlight.errors import MissingExtraError, TargetError
from packlight.evidence import LEDGER_NAME, Ledger, Measurement
from packlight.report.plain import PlainTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES, PLOT = "tables.md", "plot.svg"


class Study:
    """A directory with `evidence.jsonl`, `tables.md` and `plot.svg`.

    Args:
        out: the directory; made where it does not exist, gone on with where it is a study's, refused otherwise.
        threads: recorded with every row.

    Raises:
        TargetError: `out` is a file, or a directory that holds something else.
        MissingExtraError: matplotlib is absent.
    """

    def __init__(self, out: Path, threads: int | None) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingExtraError("matplotlib", "lab", "drawing a study's plot")
        if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / LEDGER_NAME).is_file())):
            raise TargetError(f"{out} exists and is no study: give a new directory, or one that a study was begun in")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TargetError(f"{out} cannot be made: {error.strerror}") from error
        self.out = out
        self.ledger = Ledger(out / LEDGER_NAME, threads)

    @property
    def rows(self) -> list[Measurement]:
        """All rows so far."""
        return self.ledger.rows

    def measure(self, name: str, subject: str, run: Callable[[], Iterable[Measurement]]) -> None:
        """Run a measurement and keep its rows, unless the row `name` of `subject` is there already."""
        if not self.ledger.has(name, subject):
            self.ledger.add(run())

    def finish(self, tables: Sequence[PlainTable], draw: Callable[[Figure], None]) -> None:
        """Write the tables and the plot."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        (self.out / TABLES).write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "packlight", "font.size": 9, "axes.titlesize": 9}):
            draw(figure)
            figure.savefig(self.out / PLOT, metadata={"Date": None})
