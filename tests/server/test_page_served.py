"""The page as the server itself gives it, with its own headers, routes and events."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.server.browser import CHROMEDRIVER, CHROMIUM, browser
from tests.server.conftest import Start
from tests.server.test_page import ANSWER, IS_DONE, LEDGER, ask

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None,
    reason="no chromium and chromedriver (Debian: chromium, chromium-driver)",
)


def test_a_chat_with_the_real_server(start: Start, tmp_path: Path) -> None:
    """An answer comes in, one is stopped and cancelled in the engine, the evidence stands beside it."""
    shutil.copy(LEDGER, tmp_path / "evidence.jsonl")
    server = start(engine={"step_s": 0.01}, directory=tmp_path)
    with browser(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait("document.querySelector('#evidence').innerText.includes('perplexity')")
        page.run("document.querySelector('#message').focus()")
        ask(page, "hello")
        page.wait(f"{ANSWER}.length > 3")
        page.press("Escape")
        server.wait_until(lambda: server.in_flight == 0 and server.engine.stats().running == 0)
        server.wait_until(lambda: any('"is_cut": true' in line for line in server.lines))
        ask(page, "hello again")
        page.wait(IS_DONE)
        assert len(page.run(f"return {ANSWER}")) > 100
        assert [entry["message"] for entry in page.log("browser")] == []
        asked = [url for url in page.requested() if url.startswith("http")]  # its own first tab has none
        assert asked and all(url.startswith(server.url) for url in asked)
