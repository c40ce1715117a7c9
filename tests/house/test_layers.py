"""Imports go downward only: the rooms of the design, lazy imports counted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "packlight"

LAYERS = (
    ("errors",),
    ("spec",),
    ("checkpoint", "ops", "plan", "evidence"),
    ("runtime",),
    ("measure", "report"),
    ("compress", "export"),
    ("pipeline",),
    ("server", "lab"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
MAY_IMPORT_EACH_OTHER = {"checkpoint", "ops", "plan", "evidence"}
ONLY = {"report": {"evidence", "spec", "errors"}}
TOP = ""
"""The package itself, `packlight/__init__.py`: everyone may read its version; it is free to import any room."""


def room_of(module: str) -> str:
    """`packlight.compress.walk` is in the room `compress`."""
    return module.split(".")[1] if "." in module else TOP


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of everything of packlight that a file imports, at any depth, `import_module` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if (
                module == "packlight"
            ):  # `from packlight import spec` imports a room, unless the name is the package's own
                yield from ((node.lineno, f"packlight.{alias.name}") for alias in node.names if alias.name in LEVEL)
            else:
                yield node.lineno, module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def complaint(importer: str, imported: str) -> str | None:
    """Why a room must not import another, or None where it may."""
    if imported in (TOP, importer) or importer == TOP:
        return None
    if imported not in LEVEL:
        return f"there is no room {imported!r} in the design"
    if importer in ONLY and imported not in ONLY[importer]:
        return f"{importer} imports only {', '.join(sorted(ONLY[importer]))}"
    if {importer, imported} <= MAY_IMPORT_EACH_OTHER or LEVEL[imported] < LEVEL[importer]:
        return None
    return f"{importer} must not import {imported}: imports go downward only"


def violations(module: str, source: str) -> list[str]:
    """All imports of a file that the design forbids."""
    importer = room_of(module)
    if importer != TOP and importer not in LEVEL:
        return [f"{module} is in no room of the design"]
    found = []
    for line, imported in imported_modules(ast.parse(source)):
        if imported.startswith("."):
            found.append(f"{module}:{line}: imports are absolute")
        elif imported.split(".")[0] == "packlight" and (reason := complaint(importer, room_of(imported))):
            found.append(f"{module}:{line}: {reason}")
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_file_imports_downward_only() -> None:
    files = sorted(SRC.rglob("*.py"))
    assert files
    assert [line for path in files for line in violations(module_name(path), path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("packlight.spec", "from packlight.evidence import read"),
        ("packlight.errors", "import packlight.spec"),
        ("packlight.plan.fit", "def f():\n    from packlight.measure.text import load_text"),
        ("packlight.ops.grid", "if TYPE_CHECKING:\n    import packlight.compress.walk as walk"),
        ("packlight.runtime.engine", "import importlib\nimportlib.import_module('packlight.measure.speed')"),
        ("packlight.compress.walk", "from packlight.export.gguf import write"),
        ("packlight.export.gguf", "from packlight.compress.walk import walk"),
        ("packlight.measure.text", "from packlight import compress"),
        ("packlight.pipeline", "from packlight.cli.main import main"),
        ("packlight.server.app", "from packlight.lab.kv_cache import study"),
        ("packlight.report.table", "from packlight.plan.fit import fit"),
        ("packlight.cli.main", "from packlight.utils import helper"),
        ("packlight.cli.main", "from . import fit"),
        ("packlight.helpers", ""),
    ],
)
def test_a_wrong_import_is_caught(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("packlight.spec", "import math\nfrom packlight.errors import UsageError"),
        ("packlight.evidence", "from packlight import __version__"),
        ("packlight.checkpoint.open", "from packlight.ops.grid import pack\nfrom packlight.plan.weights import count"),
        ("packlight.compress.quantize.rtn", "from packlight.compress.step import Step"),
        ("packlight.report.card", "from packlight.evidence import read\nfrom packlight.report.table import rich_table"),
        ("packlight.cli.main", "def f():\n    from packlight.pipeline import fit"),
        ("packlight.__main__", "from packlight.cli.main import main"),
        ("packlight", "from packlight.pipeline import fit"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []
