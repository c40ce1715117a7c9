"""What the page shows of an artifact: its recipe and the rows of its evidence."""

from __future__ import annotations

import math
from typing import Any

import yaml

from packlight.evidence import LEDGER_NAME, read
from packlight.server.settings import Served

RECIPE_NAME = "recipe.yaml"
_FIELDS = ("name", "value", "unit", "subject", "predicted", "spread", "n", "note")


def evidence(served: Served) -> dict[str, Any]:
    """Model, recipe and rows; `recipe` is None and `rows` empty for a model that packlight did not make."""
    if served.directory is None:
        return {"model": served.name, "recipe": None, "rows": []}
    recipe = served.directory / RECIPE_NAME
    return {
        "model": served.name,
        "recipe": yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None,
        "rows": [
            {field: _finite(getattr(row, field)) for field in _FIELDS if getattr(row, field) is not None}
            for row in read(served.directory / LEDGER_NAME)
        ],
    }


def _finite(value: Any) -> Any:
    """Numbers that JSON has no word for become their names."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
