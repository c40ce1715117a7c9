"""Small rules of the house that a machine can hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "packlight"
FILES = sorted(SRC.rglob("*.py"))


def catch_alls(source: str) -> list[int]:
    """Lines that catch everything: a bare `except`, or one that names `Exception`."""
    handlers = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler)]
    return [node.lineno for node in handlers if node.type is None or "Exception" in names_in(node.type)]


def names_in(expression: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}


def undocumented(source: str) -> list[str]:
    """Public functions and classes of a module that have no docstring."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, definitions) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]


@pytest.mark.parametrize("find", [catch_alls, undocumented])
def test_every_file_keeps_the_rule(find) -> None:
    found = {str(path.relative_to(SRC)): find(path.read_text("utf-8")) for path in FILES}
    assert {path: places for path, places in found.items() if places} == {}


def test_init_files_are_empty_except_the_top_one() -> None:
    inits = [path for path in FILES if path.name == "__init__.py" and path.parent != SRC]
    assert [str(path.relative_to(SRC)) for path in inits if path.read_text("utf-8").strip()] == []


def test_every_folder_of_modules_is_a_package() -> None:
    assert [str(path) for path in {file.parent for file in FILES} if not (path / "__init__.py").exists()] == []


@pytest.mark.parametrize("clause", ["except:", "except Exception:", "except (OSError, Exception) as error:"])
def test_a_catch_all_is_caught(clause: str) -> None:
    assert catch_alls(f"try:\n    pass\n{clause}\n    pass\n") == [3]


def test_a_named_exception_is_no_catch_all() -> None:
    assert catch_alls("try:\n    pass\nexcept (OSError, ValueError):\n    pass\n") == []


def test_a_missing_docstring_is_caught() -> None:
    assert undocumented("def f():\n    pass\nclass C:\n    x = 1\ndef _g():\n    pass\n") == ["f", "C"]
