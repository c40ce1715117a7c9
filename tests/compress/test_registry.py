"""Methods by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from packlight.compress.cast import Cast
from packlight.compress.quantize.rtn import Rtn
from packlight.compress.registry import METHODS, build, method_class
from packlight.errors import UsageError


def test_every_entry_is_the_class_of_that_name() -> None:
    for name in METHODS:
        assert method_class(name).name == name
    assert method_class("rtn") is Rtn


def test_options_are_handed_on() -> None:
    assert build({"method": "rtn", "bits": 8, "group_size": None}) == Rtn(8, None)
    assert build({"method": "cast", "dtype": "float16"}) == Cast("float16")


def test_building_leaves_the_options_alone() -> None:
    options = {"method": "rtn", "bits": 8}
    build(options)
    assert options == {"method": "rtn", "bits": 8}


@pytest.mark.parametrize("options", [{}, {"method": None}, {"method": ""}, {"method": "quip"}])
def test_an_unknown_method_names_the_known_ones(options: dict[str, object]) -> None:
    known = "awq, blocks, cast, flap, gptq, hqq, learned, magnitude, rotate, rtn, sparsegpt, wanda"
    with pytest.raises(UsageError, match=f"there is no method .*: choose one of {known}"):
        build(options)


def test_listing_the_methods_imports_none() -> None:
    code = (
        "import sys, packlight.compress.registry as registry; list(registry.METHODS);"
        "print([name for name in sys.modules if name in ('packlight.compress.cast', 'packlight.compress.quantize')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "gptq", "guided": "x"}, "guided of gptq is true or false, not 'x'"),
        ({"method": "gptq", "act_order": 1}, "act_order of gptq is true or false, not 1"),
        ({"method": "learned", "epochs": True}, "epochs of learned is a whole number, not True"),
        ({"method": "rtn", "symmetric": "yes"}, "symmetric of rtn is true or false, not 'yes'"),
    ],
)
def test_an_option_of_another_type_is_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        build(options)


def test_what_a_recipe_file_holds_is_of_the_right_types() -> None:
    given = {"method": "gptq", "damping": 1, "group_size": None, "grids": [["a.weight", None]]}
    assert build(build(given).to_dict()) == build(given)
