"""What the page shows of an artifact: its recipe and the rows of its evidence."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import yaml

from packlight.evidence import LEDGER_NAME, Measurement, read
from packlight.server.settings import Served

RECIPE_NAME = "recipe.yaml"


def evidence(served: Served) -> dict[str, Any]:
    """Model, recipe and rows; `recipe` is None and `rows` empty for a model that packlight did not make."""
    if served.directory is None:
        return {"model": served.name, "recipe": None, "rows": []}
    recipe = served.directory / RECIPE_NAME
    return {
        "model": served.name,
        "recipe": yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None,
        "rows": [_row(row) for row in read(served.directory / LEDGER_NAME)],
    }


def _row(row: Measurement) -> dict[str, Any]:
    """What the row knows; the value always, which is null for a failure."""
    known = {name: _finite(value) for name, value in asdict(row).items() if value is not None and value != {}}
    return {"value": None, **known}


def _finite(value: Any) -> Any:
    """Numbers that JSON has no word for become their names."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
