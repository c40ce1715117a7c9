"""What a verb shows: results on stdout, everything else on stderr. Progress bars degrade off a terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from packlight.evidence import Measurement
from packlight.spec import format_size

_BAR_AFTER_S = 2.0


class Progress:
    """A `pipeline.Watcher` on stderr: bars with an ETA on a terminal, a line per stage elsewhere, nothing if quiet."""

    def __init__(self, is_quiet: bool) -> None:
        from rich.console import Console

        self.is_quiet = is_quiet
        self.console = Console(stderr=True, highlight=False)
        self._live: Any = None

    def stage(self, label: str, total: int) -> Callable[[], None]:
        """Announce `total` steps of work; returns what to call after each."""
        if self.is_quiet:
            return lambda: None
        if self.console.is_terminal:
            return self._bar(label, total)
        return self._lines(label, total)

    def say(self, line: str) -> None:
        """One line, unless quiet."""
        if not self.is_quiet:
            self.console.print(line, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _bar(self, label: str, total: int) -> Callable[[], None]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        if self._live is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
            )
            self._live = Bars(*columns, console=self.console)
            self._live.start()
        task = self._live.add_task(label, total=total)
        live = self._live
        return lambda: live.advance(task)

    def _lines(self, label: str, total: int) -> Callable[[], None]:
        """A line when the stage begins, one every few seconds with what is left, and one at its end."""
        start = last = time.monotonic()
        done = 0
        self.say(f"{label} ...")

        def tick() -> None:
            nonlocal done, last
            done += 1
            now = time.monotonic()
            if done < total and now - last > 5 * _BAR_AFTER_S:
                last = now
                self.say(f"{label}: {done}/{total}, about {(now - start) / done * (total - done):.0f} s left")
            elif done == total and now - start > _BAR_AFTER_S:
                self.say(f"{label}: done in {now - start:.1f} s")

        return tick


@contextmanager
def progress(is_quiet: bool) -> Iterator[Progress]:
    """Progress for the length of a verb; sets up logging to stderr, which the library leaves alone."""
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR if is_quiet else logging.WARNING)
    shown = Progress(is_quiet)
    try:
        yield shown
    finally:
        shown.close()


def print_json(document: Any) -> None:
    """One JSON document on stdout. Numbers that JSON has no word for become null."""
    print(json.dumps(_finite(document), ensure_ascii=False))


def print_rows(rows: Sequence[Measurement], title: str) -> None:
    """The side-by-side table of a ledger on stdout."""
    from rich.console import Console

    from packlight.report.table import rich_table

    print(title)  # not as the table's own, which is wrapped to the table's width
    Console(highlight=False).print(rich_table(rows))


def print_spending(rows: Sequence[Measurement]) -> None:
    """What was bought with which bytes, on stdout; a line where nothing was weighed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from packlight.report.spending import spending

    spent = spending(rows)
    if not spent:
        print("nothing was weighed: every block has the same grid, chosen from shapes alone")
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("matrices")
    table.add_column("grid")
    for name in ("count", "in memory", "predicted nats"):
        table.add_column(name, justify="right")
    for one in spent:
        table.add_row(one.role, one.grid, str(one.count), format_size(one.nbytes), f"{one.nats:.4f}")
    whole = (sum(one.count for one in spent), sum(one.nbytes for one in spent), sum(one.nats for one in spent))
    table.add_section()
    table.add_row("all", "", str(whole[0]), format_size(whole[1]), f"{whole[2]:.4f}")
    Console(highlight=False).print(table)


def rows_as_json(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Rows without their machine and command, which are the same in all of them."""
    kept = ("name", "value", "unit", "subject", "predicted", "spread", "n", "note")
    return [{key: getattr(row, key) for key in kept if getattr(row, key) is not None} for row in rows]


def complain(message: str) -> None:
    """One sentence on one line of stderr, also where a library's words in it have several."""
    print(f"packlight: {' '.join(message.split())}", file=sys.stderr)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
