"""A plan as a table for the terminal, readable at 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packlight.spec import format_size

EMBED = "+embed-"
"""Separates the grid of the matrices from that of the embeddings in a precision's name."""


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print `Plan.to_json()`: the model's facts, a row for each precision, and how the numbers were come by."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    budget = plan["budget"]
    title = (
        f"{plan['model']}: {plan['architecture']}, {plan['num_params']:,} parameters in {plan['dtype']}; "
        f"context {budget['context']}, users {budget['users']}"
    )
    console.print(title, markup=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("precision", overflow="fold")
    for name in ("disk", "bits", "weights", "KV", "act.", "total", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits" if budget["memory_bytes"] else "loads", no_wrap=True)
    for row in plan["rows"]:
        memory = row["memory"]
        table.add_row(
            short_name(row["precision"]),
            format_size(row["disk_bytes"]),
            f"{row['bits_per_weight']:.2f}",
            format_size(memory["weights"] + memory["overhead"]),
            format_size(memory["kv_cache"]),
            format_size(memory["activations"]),
            format_size(memory["total"]),
            _speed(row["decode"]),
            _last(row, budget),
        )
    console.print(table)
    for line in (*_footnotes(plan), *_advice(plan)):
        console.print(line, markup=False)


def short_name(precision: str) -> str:
    """`int4-g32+embed` for `int4-g32-sym+embed-int4-g32-sym`: what is said twice, and the usual `sym`, is left out."""
    linear, joint, embedding = precision.replace("-sym", "").partition(EMBED)
    return f"{linear}{EMBED.removesuffix('-')}" if joint and embedding == linear else linear + joint + embedding


def _footnotes(plan: Mapping[str, Any]) -> list[str]:
    budget, machine = plan["budget"], plan["hardware"]
    last = "fits: within --memory" if budget["memory_bytes"] else "loads: in stock transformers"
    lines = [
        "disk: exact size of the weight file; bits: per weight; KV: keys and values of the whole context; act.: "
        f"activations of a prefill; total: what the model adds to the process; {last}"
    ]
    if budget["context"] > plan["max_context"]:
        lines.append(f"nothing fits: the model's longest context is {plan['max_context']} tokens")
    if bandwidth := machine["bandwidth_bytes_per_s"]:
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
        lines.append(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s with {threads}")
    if any(row["decode"]["is_upper_bound"] for row in plan["rows"]):
        lines.append("decode speeds marked ≤ are bounds: bandwidth over the bytes read per token, for one user")
    return [*lines, *plan["notes"]]


def _advice(plan: Mapping[str, Any]) -> list[str]:
    advice = plan["kv_advice"]
    if advice is None:
        return []
    prompt, new = advice["prompt_tokens"], advice["new_tokens"]
    lines = [f"KV cache, {prompt} tokens of prompt and {new} of answer: {advice['use'] or 'none'}: {advice['reason']}"]
    lines.append(
        f"tokens computed: {advice['computed_with']:,} with a cache, {advice['computed_without']:,} without"
        + _break_even(advice)
    )
    sizes = [f"{row['kind']} {format_size(sum(row['bytes'].values()))}{_fits(row)}" for row in advice["kinds"]]
    return [*lines, f"its size: {', '.join(sizes)}"]


def _break_even(advice: Mapping[str, Any]) -> str:
    if advice["break_even"] is None:
        return ""
    return f"; at this prompt a cache pays from answers of {advice['break_even']} tokens on"


def _fits(row: Mapping[str, Any]) -> str:
    return " (too large)" if row["fits"] is False else ""


def _speed(speed: Mapping[str, Any]) -> str:
    value = speed["tokens_per_s"]
    if value is None:
        return "–"
    if value < 0.01:
        return "<0.01"
    return f"{'≤' if speed['is_upper_bound'] else ''}{f'{value:,.0f}' if value >= 100 else f'{value:.3g}'}"


def _last(row: Mapping[str, Any], budget: Mapping[str, Any]) -> str:
    return "yes" if row["fits" if budget["memory_bytes"] else "loads_in_transformers"] else "no"
