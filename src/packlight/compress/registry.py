"""The methods by name. One line here makes a method known to recipes, the command line, the docs and the test suite.

Entries are addresses, not classes, so that listing the methods imports none of them.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

from packlight.compress.step import Step
from packlight.errors import UsageError

METHODS: dict[str, str] = {
    "awq": "packlight.compress.quantize.awq:Awq",
    "cast": "packlight.compress.cast:Cast",
    "gptq": "packlight.compress.quantize.gptq:Gptq",
    "hqq": "packlight.compress.quantize.hqq:Hqq",
    "learned": "packlight.compress.quantize.learned:Learned",
    "rotate": "packlight.compress.convert.rotate:Rotate",
    "rtn": "packlight.compress.quantize.rtn:Rtn",
}


def method_class(name: str) -> Any:
    """The dataclass of a method. Raises UsageError for an unknown name."""
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}: choose one of {', '.join(sorted(METHODS))}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)


def build(options: dict[str, Any]) -> Step:
    """A step from a recipe entry: `method` and its hyper-parameters. Raises UsageError for unknown ones."""
    given = dict(options)
    cls = method_class(given.pop("method", None) or "")
    try:
        step: Step = cls(**given)
    except TypeError as error:
        allowed = ", ".join(field.name for field in fields(cls))
        raise UsageError(f"{cls.name} does not take these options ({error}): it takes {allowed}") from error
    return step
