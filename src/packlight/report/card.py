"""The model card of an artifact: its README.md.

A card holds only what is the same in every run with the same inputs, so that the artifact of a run that was cut short
and taken up again is the same, byte for byte. Times and peaks differ from run to run: they stay in the ledger.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from packlight.evidence import LEDGER_NAME, Measurement
from packlight.report.sparsity import what_removal_saved, what_zeros_saved
from packlight.report.table import markdown_table

STABLE_NAMES = (
    *("sparsity", "removed", "disk_bytes", "dense_bytes", "whole_bytes", "bits_per_weight"),
    *("perplexity", "kl", "top1"),
)
"""The rows of the ledger that a card shows."""

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- packlight
---

# {name}, packed

Made from `{name}` by packlight. The licence of the original model applies to this one as well.

## What was done

{fence}yaml
{recipe}
{fence}

The same lines are in `recipe.yaml`.

## What it cost

{table}{pruning}
KL divergence and top-1 agreement compare this model with the original on the same tokens of the same text.
Times and peak memory depend on the machine: they are in `{ledger}`, one row each, with the command, the commit and
the environment that produced them.

## How to load it

```
pip install {packages}
```

```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

directory = "path/to/this/directory"
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```
"""


def model_card(name: str, rows: Sequence[Measurement], recipe_text: str, is_own_layout: bool = False) -> str:
    """README.md of an artifact.

    Args:
        name: of the original model.
        rows: the artifact's ledger; only the rows of `STABLE_NAMES` are shown.
        recipe_text: content of `recipe.yaml`.
        is_own_layout: whether transformers needs packlight to read it.
    """
    return _CARD.format(
        name=name,
        recipe=recipe_text.rstrip("\n"),
        fence=_fence(recipe_text),
        table=markdown_table(rows, STABLE_NAMES),
        pruning="" if (said := what_zeros_saved(rows) or what_removal_saved(rows)) is None else f"\n{said}\n",
        ledger=LEDGER_NAME,
        packages="packlight" if is_own_layout else "'transformers>=5.21' compressed-tensors",
        first="import packlight  # teaches transformers the layout\n" if is_own_layout else "",
    )


def _fence(text: str) -> str:
    """A Markdown fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
