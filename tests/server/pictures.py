"""Take pictures of a served page: `python -m tests.server.pictures http://127.0.0.1:8000 docs/images`.

Asks the model one question, waits for its answer, and writes `page-light.png`, `page-dark.png` (1280 x 800) and
`page-narrow.png` (390 x 844).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.server.browser import browser

QUESTION = "What does a key-value cache do, in two sentences?"
PICTURES = {"light": (1280, 800, "light"), "dark": (1280, 800, "dark"), "narrow": (390, 844, "light")}
IS_ANSWERED = "document.querySelector('#said').textContent === 'The answer is complete.'"
IS_LIVE = "document.querySelector('#spark .line').getAttribute('points').split(' ').length > 15"


def take(url: str, directory: Path) -> None:
    """The pictures of the page at an address."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as window:
        window.show_as(1280, 800, "light")
        window.open(url)
        window.wait("document.querySelector('.ledger, #evidence .quiet')")
        window.wait(IS_LIVE)
        window.press(QUESTION, "Enter")
        window.wait(IS_ANSWERED)
        for name, form in PICTURES.items():
            window.show_as(*form)
            window.screenshot(directory / f"page-{name}.png")


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]))
