"""The page at / in a real browser: what a user does, and what the server hears of it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.server.browser import CHROMEDRIVER, CHROMIUM, PATIENCE_S, Browser, browser
from tests.server.scripted import Script, serve

from packlight.evidence import Measurement, read
from packlight.report.table import QUANTITIES, side_by_side

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None,
    reason="no chromium and chromedriver (Debian: chromium, chromium-driver)",
)

LEDGER = Path(__file__).resolve().parents[2] / "evidence" / "demo.jsonl"
ANSWER = "document.querySelector('.turn:last-of-type .answer').innerText"
IS_DONE = "document.querySelector('#said').textContent === 'The answer is complete.'"
DEMO = {
    "model": "demo-160MB",
    "recipe": {"source": {"name": "SmolLM2-135M-Instruct"}, "steps": [{"method": "gptq", "dtype": "float32"}]},
    "rows": [asdict(row) for row in read(LEDGER)],
}
CELL = """
    const row = document.querySelector(`[aria-controls=why-${arguments[0]}]`).closest('tr');
    const cell = row.querySelectorAll('td')[arguments[1]];
    return [...cell.childNodes].map((node) => node.textContent).join('|');
"""
SIZES = {"desk": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def base_url(script: Script) -> Iterator[str]:
    with serve(script) as url:
        yield url


@pytest.fixture
def page(window: Browser, base_url: str) -> Iterator[Browser]:
    """The page, freshly opened, at the size of a desk and in light, its evidence shown. Its console stays clean."""
    window.show_as(*SIZES["desk"], "light")
    window.open(base_url)
    window.wait("document.querySelector('#evidence').innerText && document.querySelector('#rate').innerText !== '–'")
    yield window
    errors = [entry["message"] for entry in window.log("browser") if "Failed to load resource" not in entry["message"]]
    assert errors == []
    window.open("about:blank")


def ask(page: Browser, question: str) -> None:
    page.run("document.querySelector('#message').focus()")
    page.press(question, "Enter")


def test_an_answer_streams_in_piece_by_piece(page: Browser, script: Script) -> None:
    script.pieces, script.allowed = ["One ", "two ", "three."], 0
    ask(page, "Count.")
    for shown in ("One", "One two", "One two three."):
        assert page.run("return document.querySelector('.turn').getAttribute('aria-busy')") == "true"
        script.release(1)
        page.wait(f"{ANSWER}.trim() === arguments[0]", shown)
    page.wait(IS_DONE)
    assert page.run("return document.querySelector('.turn').hasAttribute('aria-busy')") is False
    assert "3 tokens" in page.text(".meta")
    (heard,) = script.heard
    assert heard["messages"] == [{"role": "user", "content": "Count."}]
    assert heard["model"] == "scripted"
    assert heard["stream"] is True
    assert heard["stream_options"] == {"include_usage": True}


def test_characters_cut_between_two_reads_are_whole(page: Browser) -> None:
    cut = """
        const bytes = new TextEncoder().encode('data: {"a":"Größe ✓"}\\r\\n\\r\\ndata: [DONE]\\r\\n\\r\\n');
        const real = window.fetch;
        window.fetch = async () => new Response(new ReadableStream({
          start(to) { for (const byte of bytes) to.enqueue(new Uint8Array([byte])); to.close(); }
        }));
        const { streamChat } = await import('/page/api.js');
        const seen = [];
        for await (const chunk of streamChat({})) seen.push(chunk.a);
        window.fetch = real;
        return seen;
    """
    assert page.run(f"return (async () => {{ {cut} }})()") == ["Größe ✓"]


def test_stop_reaches_the_server_and_keeps_what_came(page: Browser, script: Script) -> None:
    script.pieces, script.allowed = ["Begun ", "never sent"], 1
    ask(page, "Go on.")
    page.wait(f"{ANSWER}.includes('Begun')")
    page.click("#stop")
    assert script.disconnected.wait(PATIENCE_S)
    page.wait("document.querySelector('.meta').innerText === 'stopped'")
    assert page.text(".answer").strip() == "Begun"
    script.allowed = 1000
    ask(page, "And now?")
    page.wait(IS_DONE)
    assert [message["content"] for message in script.heard[-1]["messages"]] == ["Go on.", "Begun ", "And now?"]


def test_regenerate_replaces_the_last_answer(page: Browser, script: Script) -> None:
    script.pieces = ["The first."]
    ask(page, "Say something.")
    page.wait(IS_DONE)
    script.pieces = ["Another."]
    page.click(".again")
    page.wait(f"{ANSWER}.trim() === 'Another.'")
    page.wait(IS_DONE)
    assert page.run("return document.querySelectorAll('.turn').length") == 1
    assert script.heard[0] == script.heard[1]


def test_the_conversation_the_system_prompt_and_a_new_chat(page: Browser, script: Script) -> None:
    page.click("#system-box summary")
    page.click("#system")
    page.press("Be brief.")
    ask(page, "First?")
    page.wait(IS_DONE)
    ask(page, "Second?")
    page.wait("document.querySelectorAll('.turn').length === 2")
    page.wait(IS_DONE)
    roles = [(message["role"], message["content"]) for message in script.heard[-1]["messages"]]
    first = [("system", "Be brief."), ("user", "First?"), ("assistant", "Good morning.")]
    assert roles == [*first, ("user", "Second?")]
    page.click("#new-chat")
    assert page.run("return document.querySelectorAll('.turn').length") == 0
    ask(page, "Third?")
    page.wait(IS_DONE)
    assert [message["content"] for message in script.heard[-1]["messages"]] == ["Be brief.", "Third?"]
    page.run("sessionStorage.clear()")


def test_everything_is_done_with_the_keyboard_alone(page: Browser, script: Script) -> None:
    """The message has the focus; Enter, Shift+Enter and Escape work; Tab reaches everything, and shows where it is."""
    page.press("one")
    page.press("Enter", holding="Shift")
    page.press("two")
    assert script.heard == []
    script.pieces, script.allowed = ["Begun ", "never sent"], 1
    page.press("Enter")
    page.wait(f"{ANSWER}.includes('Begun')")
    assert script.heard[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    page.press("Escape")
    assert script.disconnected.wait(PATIENCE_S)
    page.wait("!document.querySelector('.again').hidden")
    reached = set()
    for _ in range(40):
        page.press("Tab")
        reached.add(page.run("return document.activeElement.id || document.activeElement.className || 'summary'"))
        outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.run("return document.activeElement === document.body")
    assert {"new-chat", "log", "again", "message", "send"} <= reached


@pytest.mark.parametrize("attack", ["<img src=x onerror=alert(1)>", "```html\n<script>alert(1)</script>\n```"])
def test_an_answer_cannot_inject(page: Browser, script: Script, attack: str) -> None:
    script.pieces = [attack]
    ask(page, "<b>bold</b>")
    page.wait(IS_DONE)
    assert page.run("return document.querySelectorAll('.turn img, .turn script, .turn b').length") == 0
    assert page.text(".question") == "<b>bold</b>"
    assert attack.strip("`html\n") in page.run("return document.querySelector('.answer').textContent")


def test_line_breaks_and_fenced_code_are_shown(page: Browser, script: Script) -> None:
    script.pieces = ["Line one\nline", " two\n\n``", "`python\nx = 1\n\ny = 2\n", "```\nafter\n\n~~~\nstill open"]
    ask(page, "Code?")
    page.wait(IS_DONE)
    shown = page.run("return [...document.querySelector('.answer').children].map(e => [e.tagName, e.textContent])")
    code = ["FIGURE", "pythonx = 1\n\ny = 2"]
    assert shown == [["P", "Line one\nline two"], code, ["P", "after"], ["FIGURE", "still open"]]


def test_sampling_controls_are_sent_and_checked(page: Browser, script: Script) -> None:
    page.click("#sampling summary")
    wanted = {"temperature": 0.25, "max_tokens": 7, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.3}
    for name, value in {**wanted, "seed": 11}.items():
        page.run("document.querySelector(arguments[0]).select()", f"#set-{name}")
        page.press(str(value))
    ask(page, "Hello")
    page.wait(IS_DONE)
    assert {name: script.heard[0][name] for name in (*wanted, "seed")} == {**wanted, "seed": 11}
    page.run("document.querySelector('#set-top_p').select()")
    page.press("3")
    ask(page, "Hello again")
    assert page.text("#set-top_p-hint") == "a number from 0.01 to 1"
    assert page.run("return document.activeElement.id") == "set-top_p"
    assert len(script.heard) == 1
    page.click("#reset")
    page.run("document.querySelector('#set-top_k').value = ''")
    ask(page, "")
    page.wait("document.querySelectorAll('.turn').length === 2")
    page.wait(IS_DONE)
    assert script.heard[1]["temperature"] == 0.7
    assert not {"max_tokens", "top_k", "seed"} & set(script.heard[1])  # what is empty is left to the server
    page.run("sessionStorage.clear()")


def test_a_busy_server_says_when_to_try_again(page: Browser, script: Script) -> None:
    script.refusals = [(429, {"Retry-After": "1"}, "all places in the queue are taken")]
    ask(page, "Hello")
    page.wait("!document.querySelector('#notice').hidden")
    said = page.text("#notice")
    assert "The server is busy: retry in 1 s." in said
    assert "all places in the queue are taken" in said
    page.wait("!document.querySelector('#notice button').disabled")
    page.click("#notice button")
    page.wait(f"{ANSWER}.trim() === 'Good morning.'")
    assert page.run("return document.querySelector('#notice').hidden")
    assert script.heard[0] == script.heard[1]


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (400, "The server refused this request (400)."),
        (413, "larger than the server takes"),
        (500, "The server failed (500)."),
        (503, "The server takes no requests now: try again soon."),
    ],
)
def test_other_refusals_are_told_in_words(page: Browser, script: Script, status: int, sentence: str) -> None:
    script.refusals = [(status, {}, "the server's own words")]
    ask(page, "Hello")
    page.wait("!document.querySelector('#notice').hidden")
    assert sentence in page.text("#notice")
    assert "the server's own words" in page.text("#notice")


def test_a_connection_that_breaks_is_told_and_what_came_stays(page: Browser, script: Script) -> None:
    script.is_cut = True
    ask(page, "Hello")
    page.wait("!document.querySelector('#notice').hidden")
    assert "cut off" in page.text("#notice")
    assert page.text(".answer").strip() == "Good morning."
    assert page.text(".meta") == "not complete"


def test_a_failure_in_the_middle_is_told_and_the_answer_made_again(page: Browser, script: Script) -> None:
    script.failure = "the engine ran out of memory"
    ask(page, "Hello")
    page.wait("!document.querySelector('#notice').hidden")
    assert page.text("#notice").split("\n\n")[:2] == ["The server could not go on.", script.failure]
    script.failure, script.pieces = None, ["Whole."]
    page.click("#notice button")
    page.wait(IS_DONE)
    assert page.text(".answer").strip() == "Whole."
    assert page.text(".meta").startswith("1 token ·")


def test_a_key_is_asked_for_and_kept_in_the_tab(window: Browser, script: Script, base_url: str) -> None:
    script.key = "sesame"
    window.open(base_url)
    window.wait("!document.querySelector('#key-form').hidden")
    assert "asks for an API key" in window.text("#notice")
    window.press("wrong", "Enter")
    window.wait("document.querySelector('#notice').innerText.includes('does not know this API key')")
    window.press("sesame", "Enter")
    window.wait("document.querySelector('#model').innerText === 'scripted'")
    window.wait("document.querySelector('#key-form').hidden")
    ask(window, "Hello")
    window.wait(f"{ANSWER}.trim() === 'Good morning.'")
    assert window.run("return [sessionStorage.length > 0, localStorage.length, document.cookie]") == [True, 0, ""]
    script.key = "changed"
    ask(window, "Still there?")
    window.wait("!document.querySelector('#key-form').hidden")
    window.press("changed", "Enter")
    window.wait("document.querySelectorAll('.turn').length === 2 && " + IS_DONE)
    assert script.heard[-1]["messages"][-1]["content"] == "Still there?"
    window.run("sessionStorage.clear()")
    window.log("browser")


def test_the_engine_panel_moves(page: Browser, script: Script) -> None:
    assert page.text("#live-state") == "idle"
    script.stats.update(running=5, waiting=2, kv_tokens=1024, generated_tokens=12345, tokens_per_second=87.65)
    page.wait("document.querySelector('#rate').innerText === '87.7'")
    facts = [page.text(f"#{name}") for name in ("live-state", "running", "waiting", "kv")]
    assert facts == ["at work", "5", "2", "1,024 of 4,096 tokens, 25.0\u00a0%"]
    assert page.text("#totals").startswith("12,345 tokens written")
    points = "document.querySelector('#spark .line').getAttribute('points').split(' ').length"
    before = page.run(f"return {points}")
    page.wait(f"{points} > arguments[0]", before)


def test_the_evidence_is_that_of_the_ledger(page: Browser, script: Script, base_url: str) -> None:
    assert page.text("#evidence") == "This model was not compressed by packlight: it has no ledger."
    script.evidence = DEMO
    page.open(base_url)
    page.wait("document.querySelector('.ledger')")
    rows = read(LEDGER)
    for name in QUANTITIES.keys() & {row.name for row in rows}:
        ((_, expected),) = side_by_side(rows, [name]).rows
        for place, cell in enumerate(expected):
            value, _, predicted = cell.removesuffix(")").partition(" (")
            shown = page.run(CELL, name, place).replace("\u00a0", " ").replace("−", "-")
            assert shown.startswith(value.removesuffix(" ± 0"))
            assert not predicted or f"|plan {predicted}" in shown
    shown = re.sub(r"\s+", " ", page.text("#evidence"))
    for expected in ("SmolLM2-135M-Instruct, packed: 21.8 %", "117 MB as planned", "plan 0.01114, +37.3 %", "+1.2 %"):
        assert expected in shown
    assert page.run("return document.querySelectorAll('.blocks rect').length") == 30
    assert page.run("return document.querySelectorAll('.spent tbody tr').length") == 3
    page.click("[aria-controls=why-perplexity]")
    told = set(re.split(r"[\n\t]+", page.text("#why-perplexity")))
    perplexity = next(row for row in rows if row.name == "perplexity")
    assert {perplexity.note, perplexity.command, perplexity.commit} <= told


def test_a_failed_row_and_other_subjects_are_shown(page: Browser, script: Script, base_url: str) -> None:
    rows = [
        {"name": "perplexity", "value": None, "unit": "1", "subject": "packed", "note": "<i>out of memory</i>"},
        {"name": "disk_bytes", "value": 999, "unit": "bytes", "subject": "other"},
    ]
    script.evidence = {"model": "m", "recipe": None, "rows": rows}
    page.open(base_url)
    page.wait("document.querySelector('.ledger')")
    cells = page.run("return [...document.querySelectorAll('.ledger tbody tr:not([hidden]) td')].map(e => e.innerText)")
    assert cells == ["–", "999\u00a0B", "failed", "–"]
    page.click("[aria-controls=why-perplexity]")
    assert "<i>out of memory</i>" in page.text("#why-perplexity")


@pytest.mark.parametrize("value", [0, 0.00001234, 0.0123456, 0.5, 6.97990, 99.96, 718.85151, 999.96, 1234567.8])
def test_numbers_are_written_as_in_the_tables(page: Browser, value: float) -> None:
    written = page.run(
        "return import('/page/format.js').then(f => [f.formatNumber(arguments[0]), f.formatSize(arguments[0] * 1e6)])",
        value,
    )
    rows = [Measurement("bits_per_weight", value, "1", "x"), Measurement("disk_bytes", value * 1e6, "bytes", "x")]
    size, number = (cells[0] for _, cells in side_by_side(rows).rows)
    assert [text.replace("\u00a0", " ") for text in written] == [number, size]


def test_no_request_leaves_the_host(page: Browser, script: Script, base_url: str) -> None:
    script.evidence = DEMO
    page.requested()
    page.open(base_url)
    ask(page, "Hello")
    page.wait(IS_DONE)
    asked = [url for url in page.requested() if not url.startswith("chrome:")]  # the browser's own first tab
    assert f"{base_url}/v1/chat/completions" in asked
    assert {url for url in asked if not url.startswith(f"{base_url}/")} == set()


CONTRAST = """
    const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => {
      const [r, g, b] = channels(colour).slice(0, 3).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
      for (let at = node; at; at = at.parentElement) {
        const colour = getComputedStyle(at).backgroundColor;
        if ((channels(colour)[3] ?? 1) > 0) return colour;
      }
    };
    const low = [];
    let seen = 0;
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const node = walk.currentNode.parentElement;
      if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest('.unseen, :disabled')) continue;
      seen += 1;
      const pair = [light(getComputedStyle(node).color), light(ground(node))].sort((a, b) => b - a);
      const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
      if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${walk.currentNode.data}`);
    }
    return [seen, low];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_readable_and_fits(page: Browser, script: Script, base_url: str, scheme: str, size: str) -> None:
    """Every text has a contrast of 4.5 (WCAG AA), and nothing makes the page itself scroll, in either scheme."""
    script.evidence = DEMO
    script.pieces = ["Text\n\n```python\n" + "x" * 300 + "\n```\n" + "y" * 300]
    page.show_as(*SIZES[size], scheme)
    page.open(base_url)
    page.wait("document.querySelector('#evidence').innerText || document.querySelector('.ledger')")
    ask(page, "z" * 300)
    page.wait(IS_DONE)
    script.refusals = [(429, {}, "full")]
    ask(page, "More")
    page.wait("!document.querySelector('#notice').hidden")
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "dark")
    views = ["", "panel-open"] if size == "phone" else [""]
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for view in views:
        page.run("document.body.className = arguments[0]", view)
        seen, low = page.run(CONTRAST)
        assert seen > 10
        assert low == []
        page_size = "document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight"
        assert page.run(f"return {page_size} <= innerHeight")


def test_a_hidden_page_asks_nothing(page: Browser, script: Script) -> None:
    """The page is told that it is hidden; nothing changes in it until it is told that it is seen."""
    hide = "Object.defineProperty(document, 'hidden', {configurable: true, get: () => arguments[0]});"
    tell = "document.dispatchEvent(new Event('visibilitychange'));"
    page.run(hide.replace("arguments[0]", "true") + tell)
    page.requested()
    asked = threading.Event()
    asked.wait(2.5)  # more than two periods: nothing is to happen, so nothing can be waited for
    script.stats["tokens_per_second"] = 55.0
    late = [url for url in page.requested() if url.endswith("/stats")]
    assert len(late) <= 1  # the one that was under way
    assert page.text("#rate") != "55.0"
    page.run(hide.replace("arguments[0]", "false") + tell)
    page.wait("document.querySelector('#rate').innerText === '55.0'")
