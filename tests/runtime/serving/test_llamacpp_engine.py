"""llama.cpp behind the engine's interface: a crowd, torn characters, cancelling, stop strings, log-probabilities."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.checkpoint.gguf_bytes import model, write
from transformers import AutoModelForCausalLM

from packlight.checkpoint.demo import demo_file
from packlight.checkpoint.open import open_checkpoint
from packlight.errors import CheckpointError, MissingExtraError, UsageError
from packlight.runtime.sampling import Sampling, Token
from packlight.runtime.serving.engine import Finish, Request
from packlight.runtime.serving.llamacpp_engine import LlamaCppEngine
from packlight.runtime.serving.llamacpp_flight import Vocabulary
from packlight.runtime.serving.open import ServingOptions, open_engine
from packlight.runtime.serving.torch_engine import TorchEngine
from packlight.runtime.text import stream_text
from packlight.runtime.tokenizer import raw_ids

pytest.importorskip("xllamacpp")

CONTEXT, USERS = 256, 4
PROMPTS = [(1, 260 + n % 3, *range(3 + 7 * n, 23 + 8 * n)) for n in range(8)]


@dataclass
class Heard:
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    reused_tokens: int = 0

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokens are bytes: most of what it says is torn characters."""
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", *model(llama__context_length=CONTEXT))


@pytest.fixture(scope="module")
def engine(gguf: Path) -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(gguf, users=USERS, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def demo() -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(demo_file(), context=512, users=USERS, threads=1)
    yield engine
    engine.close()


def run(engine: LlamaCppEngine, *requests: Request) -> list[Heard]:
    """The answers, in the requests' order."""
    for request in requests:
        engine.add(request)
    heard = {request.id: Heard() for request in requests}
    give_up = time.monotonic() + 120
    while not engine.is_idle:
        assert time.monotonic() < give_up, "the engine does not come to an end"
        deltas = engine.step()
        assert len({delta.id for delta in deltas}) == len(deltas), "one delta for each request"
        for delta in deltas:
            one = heard[delta.id]
            assert one.finish is None, "nothing comes after the end"
            one.text, one.tokens = one.text + delta.text, one.tokens + delta.tokens
            one.finish, one.reused_tokens = delta.finish, one.reused_tokens + delta.reused_tokens
    return list(heard.values())


def requests(count: int, **sampling: object) -> list[Request]:
    return [Request(str(n), PROMPTS[n], Sampling(**{"max_tokens": 24, **sampling})) for n in range(count)]  # type: ignore[arg-type]


def until_free(engine: LlamaCppEngine) -> None:
    """Wait until llama.cpp has noticed what was cancelled."""
    give_up = time.monotonic() + 30
    while engine._jobs:
        assert time.monotonic() < give_up, "a slot is not given back"
        assert engine.step() == []


def test_a_crowd_hears_what_each_would_hear_alone(engine: LlamaCppEngine) -> None:
    wanted = requests(8)
    alone = [run(engine, request)[0] for request in wanted]
    together = run(engine, *wanted)
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert [one.text for one in together] == [one.text for one in alone]


def test_every_token_is_reported_with_its_finish(engine: LlamaCppEngine) -> None:
    for one in run(engine, *requests(8)):
        if one.finish == "length":
            assert len(one.tokens) == 24
        else:
            assert one.finish == "stop" and one.ids[-1] == engine.tokenizer.eos_token_id
        assert one.text == "".join(stream_text(engine.tokenizer, one.ids))


def test_the_tokens_are_those_of_the_model_run_by_transformers(engine: LlamaCppEngine, gguf: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(open_checkpoint(gguf).path).eval()
    for request in requests(4):
        made = theirs.generate(torch.tensor([request.prompt]), max_new_tokens=24, do_sample=False)
        assert run(engine, request)[0].ids == made[0, len(request.prompt) :].tolist()


def test_an_answer_is_as_long_as_its_limit_or_the_context(engine: LlamaCppEngine) -> None:
    (one,) = run(engine, *requests(1, max_tokens=1))
    assert (len(one.tokens), one.finish) == (1, "length")
    prompt = tuple(3 + n % 200 for n in range(engine.context - 5))
    (full,) = run(engine, Request("full", prompt, Sampling(max_tokens=1000)))
    assert full.finish == "stop" or (len(full.tokens), full.finish) == (5, "length")


def test_a_sampled_answer_is_its_seeds(engine: LlamaCppEngine) -> None:
    drawn = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}
    first, again, other = run(
        engine,
        *(
            Request(f"{n}", PROMPTS[0], Sampling(max_tokens=16, seed=seed, **drawn))  # type: ignore[arg-type]
            for n, seed in enumerate((1, 1, 2))
        ),
    )
    assert first.ids == again.ids != other.ids


def test_a_penalty_keeps_tokens_from_coming_back(engine: LlamaCppEngine) -> None:
    plain, penalized = (run(engine, *requests(1, repetition_penalty=p, max_tokens=64))[0] for p in (1.0, 1e6))
    assert len(set(penalized.ids)) == len(penalized.ids)
    assert set(penalized.ids[:-1]).isdisjoint(PROMPTS[0])
    assert plain.ids != penalized.ids


@pytest.mark.demo
def test_a_stop_string_ends_the_answer_before_it(demo: LlamaCppEngine) -> None:
    prompt = tuple(raw_ids(demo.tokenizer, "one, two, three, four, five, one, two, three,"))
    plain, stopped = run(
        demo,
        Request("plain", prompt, Sampling(max_tokens=16)),
        Request("stopped", prompt, Sampling(max_tokens=16, stop=("five",))),
    )
    assert "five" in plain.text
    assert (stopped.text, stopped.finish) == (plain.text[: plain.text.index("five")], "stop")


@pytest.mark.demo
def test_a_crowd_at_the_demo_hears_what_each_would_hear_alone(demo: LlamaCppEngine) -> None:
    texts = ("Once upon a time", "The capital of France is", "def add(a, b):", "Water boils at", "1, 2, 3, 4,", "日本")
    wanted = [
        Request(text, tuple(raw_ids(demo.tokenizer, text * (1 + 5 * place))), Sampling(max_tokens=20))
        for place, text in enumerate(texts)
    ]
    alone = [run(demo, request)[0] for request in wanted]
    assert [one.ids for one in run(demo, *wanted)] == [one.ids for one in alone]


@pytest.mark.demo
def test_a_character_of_several_tokens_comes_whole(demo: LlamaCppEngine) -> None:
    """llama.cpp names only the last token of such a character; a limit may tear it."""
    text = "😀 日本 😀 日本 😀 日本 😀 日本"
    prompt = tuple(raw_ids(demo.tokenizer, text))
    wanted = [Request(str(limit), prompt, Sampling(max_tokens=limit)) for limit in (1, 3, 6)]
    one, three, six = run(demo, *wanted)
    assert six.text == " 😀 日本"
    assert six.ids == raw_ids(demo.tokenizer, text)[7:13]
    assert (one.ids, three.ids) == (six.ids[:1], six.ids[:3])
    assert (one.text, three.text) == (" \ufffd", " 😀 \ufffd")
    assert {one.finish, three.finish, six.finish} == {"length"}


@pytest.mark.demo
def test_an_answer_follows_its_schema(demo: LlamaCppEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    prompt = tuple(raw_ids(demo.tokenizer, "A cat:"))
    (one,) = run(demo, Request("cat", prompt, Sampling(max_tokens=60), json.dumps(schema)))
    assert one.finish == "stop"
    cat = json.loads(one.text)
    assert set(cat) == {"name", "age"} and isinstance(cat["age"], int)


def test_a_schema_that_cannot_be_followed_is_refused(engine: LlamaCppEngine) -> None:
    for schema in ('{"type": "nonsense"}', '{"not": {"type": "string"}}', "[", '{"$ref": "http://elsewhere/"}'):
        with pytest.raises(UsageError, match="schema"):
            engine.check(Request("no", PROMPTS[0], Sampling(), schema))


def test_logprobs_are_of_the_models_own_distribution(engine: LlamaCppEngine) -> None:
    greedy, drawn, without = run(
        engine,
        Request("greedy", PROMPTS[0], Sampling(max_tokens=8, logprobs=3)),
        Request("drawn", PROMPTS[0], Sampling(max_tokens=8, logprobs=0, temperature=2.0)),
        Request("without", PROMPTS[0], Sampling(max_tokens=8)),
    )
    known = [token for token in greedy.tokens if token.logprob is not None]
    assert known, "only tokens inside a torn character may lack it"
    for token in known:
        assert len(token.top) == 3
        assert token.top[0] == (token.id, token.logprob)
        assert 0 > token.top[0][1] >= token.top[1][1] >= token.top[2][1]
    assert all(token.top == () for token in drawn.tokens)
    assert any(token.logprob is not None and token.logprob < 0 for token in drawn.tokens)
    assert [token.logprob for token in without.tokens] == [None] * len(without.tokens)


def test_what_an_earlier_prompt_began_with_is_not_computed_again(gguf: Path) -> None:
    engine = LlamaCppEngine(gguf, users=1, threads=1)
    prompt = tuple(range(3, 103))
    first, again = (run(engine, Request(str(n), prompt, Sampling(max_tokens=8)))[0] for n in range(2))
    assert first.reused_tokens == 0 and again.reused_tokens == len(prompt) - 1
    assert first.ids == again.ids
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.reused_tokens) == (len(prompt) + 1, len(prompt) - 1)
    assert stats.generated_tokens == len(first.ids) + len(again.ids)
    engine.close()


def test_a_cancelled_request_says_nothing_more_and_frees_its_slot(engine: LlamaCppEngine) -> None:
    long = requests(USERS + 2, max_tokens=200, temperature=1.0)
    for request in long:
        engine.add(request)
    heard: set[str] = set()
    while len(heard) < USERS:
        heard |= {delta.id for delta in engine.step()}
    assert (engine.stats().running, engine.stats().waiting) == (USERS, 2)
    for request in long:
        engine.cancel(request.id)
    engine.cancel("unknown")
    assert engine.is_idle and engine.stats().running == engine.stats().waiting == engine.stats().kv_tokens == 0
    until_free(engine)
    assert len(run(engine, *requests(8, max_tokens=4))) == 8


def test_time_that_is_up_ends_an_answer_as_it_is(engine: LlamaCppEngine) -> None:
    now = time.monotonic()
    late = Request("late", PROMPTS[0], Sampling(max_tokens=200), deadline=now - 1)
    soon = Request("soon", PROMPTS[1], Sampling(max_tokens=200, temperature=2.0), deadline=now + 3600)
    heard_late, heard_soon = run(engine, late, soon)
    assert (heard_late.finish, heard_late.tokens) == ("deadline", ())
    assert heard_soon.finish in ("stop", "length")
    until_free(engine)


def test_an_idle_engine_does_not_spin(engine: LlamaCppEngine) -> None:
    until_free(engine)
    before = engine.stats().steps
    assert engine.step() == [] and engine.stats().steps == before
    engine.add(Request("slow", PROMPTS[0], Sampling(max_tokens=100, temperature=1.0)))
    calls, deltas = 0, 0
    while not engine.is_idle:
        calls, deltas = calls + 1, deltas + len(engine.step())
    assert calls < 20 * deltas + 200, "a step waits a little where llama.cpp has said nothing"


def test_what_can_never_be_served_is_refused_with_the_numbers(engine: LlamaCppEngine) -> None:
    for prompt, message in (
        ((), "the prompt is empty"),
        (tuple([5] * 248), "the prompt has 248 tokens and there is room for 248"),
        ((5, 263), "ids are 0 to 262"),
        ((-1,), "ids are 0 to 262"),
    ):
        with pytest.raises(UsageError, match=message):
            engine.add(Request("no", prompt, Sampling()))
    with pytest.raises(UsageError, match="embeddings"):
        engine.embed([(1, 2)])
    assert engine.is_idle


def test_a_context_beyond_the_models_is_refused(gguf: Path) -> None:
    with pytest.raises(UsageError, match=f"4096 tokens is more than the {CONTEXT}"):
        LlamaCppEngine(gguf, context=4096)


def test_a_damaged_file_is_an_error_and_no_crash(gguf: Path, tmp_path: Path) -> None:
    whole = gguf.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for size in (0, 3, 20, 1000, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            LlamaCppEngine(damaged, users=1, threads=1)
    metadata, tensors = model(llama__context_length=CONTEXT)
    with pytest.raises(CheckpointError, match=r"llama\.cpp cannot load"):
        LlamaCppEngine(write(damaged, metadata, tensors[1:]), users=1, threads=1)


def test_a_gguf_file_is_served_by_llamacpp_where_it_can_be(gguf: Path, tmp_path: Path) -> None:
    for name, options in (
        (str(gguf), ServingOptions(users=1)),
        (str(gguf), ServingOptions("llamacpp", context=64, users=1)),
    ):
        opened = open_engine(name, options, print)
        assert isinstance(opened, LlamaCppEngine)
        opened.close()
    assert isinstance(open_engine(str(gguf), ServingOptions("torch"), print), TorchEngine)
    assert isinstance(open_engine(str(gguf), ServingOptions(pooling="mean"), print), TorchEngine)
    with pytest.raises(UsageError, match="none: give one"):
        open_engine(str(tmp_path), ServingOptions("llamacpp"), print)
    with pytest.raises(UsageError, match="--engine torch"):
        open_engine(str(gguf), ServingOptions("llamacpp", is_compiled=True), print)


def test_without_llamacpp_the_install_line_is_named(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingExtraError, match=r"packlight\[llamacpp\]"):
        LlamaCppEngine(gguf)


def test_lost_tokens_are_found_by_their_bytes(engine: LlamaCppEngine) -> None:
    vocabulary = Vocabulary(engine.tokenizer)
    smile = "😀".encode()
    ids = [byte + 3 for byte in smile]
    assert vocabulary.before(smile, ids[-1], 3) == ids[:3]
    assert vocabulary.before(smile, ids[-1], 2) == []
    assert vocabulary.before(smile, ids[0], 3) == []
