"""The page's files are in the package, whole, and each one that is named is there."""

from __future__ import annotations

import re
from importlib import resources

PAGE = resources.files("packlight.server") / "page"
NAMED = re.compile(r"""["'(]/page/([\w.-]+)["')]""")
OUTSIDE = re.compile(r"https?://(?!www\.w3\.org/)")  # names of XML namespaces are no addresses
UNSAFE = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function")


def texts() -> dict[str, str]:
    return {file.name: file.read_text("utf-8") for file in PAGE.iterdir()}


def test_every_file_that_is_named_is_there_and_every_file_is_named() -> None:
    found = texts()
    named = {name for text in found.values() for name in NAMED.findall(text)}
    assert named == set(found) - {"index.html"}


def test_nothing_outside_is_named_and_nothing_is_inline() -> None:
    for name, text in texts().items():
        assert not OUTSIDE.search(text), name
        assert not UNSAFE.search(text), name
    index = texts()["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", index)


def test_files_are_short_enough_to_read() -> None:
    assert {name for name, text in texts().items() if len(text.splitlines()) > 400} == set()
