"""A plan as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packlight.spec import format_size


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print `Plan.to_json()`: the model's facts, a row for each precision, and how the numbers were come by."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    budget, machine = plan["budget"], plan["hardware"]
    title = (
        f"{plan['model']}: {plan['architecture']}, {plan['num_params']:,} parameters in {plan['dtype']}; "
        f"context {budget['context']}, users {budget['users']}"
    )
    console.print(title, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("precision", "disk", "bits", "weights", "KV", "act.", "total", "tok/s"):
        table.add_column(name, justify="left" if name == "precision" else "right", no_wrap=name == "precision")
    table.add_column("fits" if budget["memory_bytes"] else "in transformers")
    for row in plan["rows"]:
        memory = row["memory"]
        table.add_row(
            row["precision"],
            format_size(row["disk_bytes"]),
            f"{row['bits_per_weight']:.2f}",
            format_size(memory["weights"] + memory["overhead"]),
            format_size(memory["kv_cache"]),
            format_size(memory["activations"]),
            format_size(memory["total"]),
            _speed(row["decode"]),
            Text(_last(row, budget)),
        )
    console.print(table)
    console.print(
        "disk: exact size of the weight file; bits: per weight; KV: keys and values of the whole context; act.: "
        "activations of a prefill; total: what the model adds to the process",
        markup=False,
    )
    bandwidth = machine["bandwidth_bytes_per_s"]
    if bandwidth:
        console.print(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s with {machine['threads']} threads", markup=False)
    if any(row["decode"]["is_upper_bound"] for row in plan["rows"]):
        console.print(
            "decode speeds marked <= are bounds: bytes read per token over bandwidth, in tokens/s", markup=False
        )
    for note in plan["notes"]:
        console.print(note, markup=False)


def _speed(speed: Mapping[str, Any]) -> str:
    if speed["tokens_per_s"] is None:
        return "–"
    return f"{'<= ' if speed['is_upper_bound'] else ''}{speed['tokens_per_s']:.3g}"


def _last(row: Mapping[str, Any], budget: Mapping[str, Any]) -> str:
    if budget["memory_bytes"]:
        return "yes" if row["fits"] else "no"
    return "loads" if row["loads_in_transformers"] else "does not load"
