"""The export formats by name. One line here makes a format known to the command line; entries are addresses, so that
listing them imports none."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

from packlight.errors import UsageError

FORMATS: dict[str, str] = {
    "compiled": "packlight.export.compiled:Compiled",
}


def format_class(name: str) -> Any:
    """The dataclass of a format. Raises UsageError for an unknown name."""
    if name not in FORMATS:
        raise UsageError(f"there is no export format {name!r}: choose one of {', '.join(sorted(FORMATS))}")
    module, _, attribute = FORMATS[name].partition(":")
    return getattr(import_module(module), attribute)


def build_format(name: str, options: dict[str, Any]) -> Any:
    """A format with its options; those that are None keep their defaults.

    Raises:
        UsageError: an unknown format, or an option that it does not take or outside its range.
    """
    cls = format_class(name)
    given = {key: value for key, value in options.items() if value is not None}
    allowed = [field.name for field in fields(cls)]
    for key in given:
        if key not in allowed:
            raise UsageError(f"the format {name} takes no --{key}: it takes {', '.join('--' + one for one in allowed)}")
    return cls(**given)
