"""The methods by name. One line here makes a method known to recipes, the command line, the docs and the test suite.

Entries are addresses, not classes, so that listing the methods imports none of them.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from packlight.compress.step import Step
from packlight.errors import UsageError

METHODS: dict[str, str] = {
    "awq": "packlight.compress.quantize.awq:Awq",
    "blocks": "packlight.compress.prune.blocks:Blocks",
    "cast": "packlight.compress.cast:Cast",
    "flap": "packlight.compress.prune.flap:Flap",
    "gptq": "packlight.compress.quantize.gptq:Gptq",
    "hqq": "packlight.compress.quantize.hqq:Hqq",
    "learned": "packlight.compress.quantize.learned:Learned",
    "magnitude": "packlight.compress.prune.magnitude:Magnitude",
    "rotate": "packlight.compress.convert.rotate:Rotate",
    "rtn": "packlight.compress.quantize.rtn:Rtn",
    "sparsegpt": "packlight.compress.prune.sparsegpt:SparseGpt",
    "wanda": "packlight.compress.prune.wanda:Wanda",
}


def method_class(name: str) -> Any:
    """The dataclass of a method. Raises UsageError for an unknown name."""
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}: choose one of {', '.join(sorted(METHODS))}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)


def build(options: dict[str, Any]) -> Step:
    """A step from a recipe entry: `method` and its hyper-parameters.

    Raises:
        UsageError: an unknown one, or one of another type or outside its range.
    """
    given = dict(options)
    cls = method_class(given.pop("method", None) or "")
    try:
        step: Step = cls(**given)
    except TypeError as error:
        allowed = ", ".join(field.name for field in fields(cls))
        raise UsageError(f"{cls.name} does not take these options ({error}): it takes {allowed}") from error
    hints = get_type_hints(cls)
    for name, value in given.items():
        if not _is_a(value, hints[name]):
            raise UsageError(f"{name} of {cls.name} is {_in_words(hints[name])}, not {value!r}")
    return step


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value that came from JSON or YAML has a field's type; a list may stand for a tuple."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_is_a(value, one) for one in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        return isinstance(value, list | tuple)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(one) for one in get_args(hint))
    if origin is Literal:
        return " or ".join(get_args(hint))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    return words.get(hint, "a list")
