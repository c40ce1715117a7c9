"""Loaders by name: a model that is quantized while it is loaded is called MODEL@LOADER. No torch."""

from __future__ import annotations

from pathlib import Path

from packlight.errors import UsageError

LOADERS = ("bnb-int8", "bnb-nf4")
MARK = "@"


def split_loader(model: str) -> tuple[str, str | None]:
    """`demo@bnb-nf4` as ("demo", "bnb-nf4"); a path that exists is a model as it is, whatever its name.

    Raises:
        UsageError: something else than a loader stands behind the last @.
    """
    source, mark, loader = model.rpartition(MARK)
    if not mark or "/" in loader or Path(model).expanduser().exists():
        return model, None
    return source, known_loader(loader)


def with_loader(model: str, loader: str | None) -> str:
    """The model by the name that says how it is loaded.

    Raises:
        UsageError: no such loader, a model that names another one, or a path that has this name already.
    """
    if loader is None:
        return model
    named = split_loader(model)[1]
    if named not in (None, known_loader(loader)):
        raise UsageError(f"{model} is to be loaded with {named} and with {loader}: leave one of them out")
    if named is not None:
        return model
    if Path(name := f"{model}{MARK}{loader}").expanduser().exists():
        raise UsageError(f"{name} is a path, and would be the name of {model} loaded with {loader}: rename the path")
    return name


def known_loader(loader: str) -> str:
    """The loader itself. Raises UsageError where there is none of this name."""
    if loader not in LOADERS:
        raise UsageError(
            f"there is no loader {loader!r}: a model is loaded on the fly as MODEL@{' or MODEL@'.join(LOADERS)}"
        )
    return loader
