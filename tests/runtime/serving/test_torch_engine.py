"""The engine: answers of a batch are those of each request alone, and what comes and goes leaves nothing behind."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from tests.runtime.architectures import ALL
from transformers import AutoModelForCausalLM

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import CheckpointError, UsageError
from packlight.runtime.load import load_model
from packlight.runtime.sampling import Sampling
from packlight.runtime.serving.blocks import BLOCK
from packlight.runtime.serving.engine import Delta, Request
from packlight.runtime.serving.paged_model import NAME
from packlight.runtime.serving.torch_engine import STEP_TOKENS, TorchEngine
from packlight.runtime.tokenizer import load_tokenizer

TEXT = b"The quick brown fox jumps over the lazy dog while the band plays on, and nobody minds the rain. " * 4


@pytest.fixture(scope="module")
def tiny_dir(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir(tied=False)


def make(directory: Path, kv_tokens: int = 2048, users: int = 16, context: int | None = None) -> TorchEngine:
    checkpoint = open_checkpoint(directory)
    return TorchEngine(
        load_model(checkpoint), load_tokenizer(checkpoint), frozenset(), kv_tokens, users, context, pooling="mean"
    )


@pytest.fixture
def engine(tiny_dir: Path) -> TorchEngine:
    return make(tiny_dir)


def prompts(count: int, longest: int = 60, seed: int = 0) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        start = chance.randrange(100)
        made.append(tuple(TEXT[start : start + chance.randrange(1, longest)]))
    return made


def drain(engine: TorchEngine, tokens: dict[str, list[int]] | None = None) -> dict[str, list[int]]:
    """Step until nothing is left; the tokens of every answer."""
    made: dict[str, list[int]] = {} if tokens is None else tokens
    while not engine.is_idle:
        collect(made, engine.step())
    return made


def collect(made: dict[str, list[int]], deltas: Iterable[Delta]) -> None:
    for delta in deltas:
        made.setdefault(delta.id, []).extend(token.id for token in delta.tokens)


def ask(engine: TorchEngine, prompt: tuple[int, ...], sampling: Sampling | None = None, **more: object) -> list[int]:
    engine.add(Request("alone", prompt, sampling or Sampling(max_tokens=12), **more))  # type: ignore[arg-type]
    return drain(engine)["alone"]


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_answers_as_by_transformers(architecture_dir: Callable[[str], Path], name: str) -> None:
    """Unequal prompts in one batch; an architecture that attends in its own way is refused with a reason."""
    checkpoint = open_checkpoint(architecture_dir(name))
    model = load_model(checkpoint)
    try:
        engine = TorchEngine(model, load_tokenizer(checkpoint), frozenset(), 1024, 4)
    except UsageError as error:
        assert "cannot be served in batches" in str(error)
        pytest.skip(str(error))
    theirs = AutoModelForCausalLM.from_pretrained(architecture_dir(name)).eval()
    asked = prompts(4, 50, seed=3)
    for place, prompt in enumerate(asked):
        engine.add(Request(str(place), prompt, Sampling(max_tokens=16)))
    made = drain(engine)
    for place, prompt in enumerate(asked):
        wanted = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert made[str(place)] == wanted[0, len(prompt) :].tolist()


def test_answers_of_a_crowd_are_those_of_each_alone(tiny_dir: Path, engine: TorchEngine) -> None:
    """More than run at once, joining at any step; half of them sampled."""
    crowd = make(tiny_dir, users=5)
    chance = random.Random(1)
    asked = {
        str(place): (prompt, Sampling(max_tokens=chance.randrange(1, 30), temperature=place % 2 * 0.9, seed=place))
        for place, prompt in enumerate(prompts(24, 90))
    }
    made: dict[str, list[int]] = {}
    for name, (prompt, sampling) in asked.items():
        crowd.add(Request(name, prompt, sampling))
        for _ in range(chance.randrange(3)):
            collect(made, crowd.step())
    drain(crowd, made)
    assert made == {name: ask(engine, prompt, sampling) for name, (prompt, sampling) in asked.items()}
    assert crowd.pool.free == crowd.pool.count


def test_memory_for_half_of_them_only_delays(tiny_dir: Path, engine: TorchEngine) -> None:
    """Requests that are put back lose nothing: not their tokens, and not the state of their generators."""
    tight = make(tiny_dir, kv_tokens=8 * BLOCK, users=8)
    asked = {
        str(place): (prompt, Sampling(max_tokens=50, temperature=place % 2 * 1.0, seed=place))
        for place, prompt in enumerate(prompts(8, 40, seed=2))
    }
    for name, (prompt, sampling) in asked.items():
        tight.add(Request(name, prompt, sampling))
    made = drain(tight)
    assert tight.stats().preemptions > 0
    assert made == {name: ask(engine, prompt, sampling) for name, (prompt, sampling) in asked.items()}
    assert tight.pool.free == tight.pool.count


def test_a_long_prompt_holds_nobody_up(engine: TorchEngine) -> None:
    """While it is read in chunks, the answer that is being made goes on by a token a step."""
    engine.add(Request("short", tuple(TEXT[:5]), Sampling(max_tokens=40)))
    engine.step()
    engine.add(Request("long", tuple(TEXT[:250]), Sampling(max_tokens=2)))
    made: list[list[str]] = [[delta.id for delta in engine.step()] for _ in range(2)]
    assert made == [["short"], ["short", "long"]]
    assert STEP_TOKENS < 250 < 2 * STEP_TOKENS


def test_what_prompts_begin_with_in_common_is_computed_once(engine: TorchEngine) -> None:
    system = tuple(TEXT[: 5 * BLOCK + 3])
    first = ask(engine, (*system, 1, 2, 3))
    before = engine.stats()
    engine.add(Request("second", (*system, 4, 5), Sampling(max_tokens=12)))
    delta = next(delta for _ in range(3) for delta in engine.step())
    assert delta.reused_tokens == 5 * BLOCK
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == len(system) + 2
    assert after.reused_tokens - before.reused_tokens == 5 * BLOCK
    drain(engine)
    assert ask(engine, (*system, 1, 2, 3)) == first


def test_prompts_that_come_together_and_begin_alike_are_read_once(engine: TorchEngine) -> None:
    """The others wait for the first to read what they share, and are admitted together then."""
    system = tuple(TEXT[: 10 * BLOCK + 2])
    for place in range(4):
        engine.add(Request(str(place), (*system, place), Sampling(max_tokens=6)))
    engine.add(Request("same", (*system, 0), Sampling(max_tokens=6)))
    made = drain(engine)
    assert engine.stats().reused_tokens == 4 * 10 * BLOCK
    assert made["same"] == made["0"]
    assert made == {**made, **{str(place): ask(engine, (*system, place), Sampling(max_tokens=6)) for place in range(4)}}


def test_cancelled_requests_free_what_they_held(engine: TorchEngine) -> None:
    for place, prompt in enumerate(prompts(20)):
        engine.add(Request(str(place), prompt, Sampling(max_tokens=50)))
    engine.step()
    for place in range(0, 20, 2):
        engine.cancel(str(place))
    engine.cancel("nobody")
    made = drain(engine)
    assert set(made) == {str(place) for place in range(1, 20, 2)}
    assert engine.pool.free == engine.pool.count
    assert engine.stats().running == engine.stats().waiting == 0


def test_an_answer_whose_time_is_up_ends_as_it_is(engine: TorchEngine) -> None:
    engine.add(Request("late", tuple(TEXT[:9]), Sampling(max_tokens=1000), deadline=time.monotonic() + 0.2))
    engine.add(Request("never", tuple(TEXT[:9]), Sampling(max_tokens=5), deadline=time.monotonic() - 1))
    deltas = []
    while not engine.is_idle:
        deltas += engine.step()
    last = {delta.id: delta for delta in deltas}
    assert last["late"].finish == last["never"].finish == "deadline"
    assert 0 < sum(len(delta.tokens) for delta in deltas if delta.id == "late") < 1000


@pytest.mark.parametrize(
    ("prompt", "said"),
    [((), "empty"), (tuple(TEXT[:200]), "200 tokens and there is room for 64"), ((1, 999), "ids are 0 to 255")],
)
def test_what_can_never_be_served_is_refused(tiny_dir: Path, prompt: tuple[int, ...], said: str) -> None:
    engine = make(tiny_dir, context=64)
    with pytest.raises(UsageError, match=said):
        engine.add(Request("bad", prompt, Sampling()))
    assert engine.is_idle


def test_an_answer_ends_where_the_context_does(tiny_dir: Path) -> None:
    engine = make(tiny_dir, context=64)
    engine.add(Request("one", tuple(TEXT[:60]), Sampling(max_tokens=100)))
    deltas = []
    while not engine.is_idle:
        deltas += engine.step()
    assert sum(len(delta.tokens) for delta in deltas) == 4
    assert deltas[-1].finish == "length"


def test_text_comes_as_it_is_made_and_stop_strings_end_it(tiny_dir: Path, engine: TorchEngine) -> None:
    whole = engine.tokenizer.decode(ask(engine, tuple(TEXT[:20]), Sampling(max_tokens=30)))
    stop = whole[10:13]
    engine.add(Request("one", tuple(TEXT[:20]), Sampling(max_tokens=30, stop=(stop,))))
    deltas = []
    while not engine.is_idle:
        deltas += engine.step()
    assert "".join(delta.text for delta in deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish == "stop"


def test_answers_follow_a_schema(engine: TorchEngine, tiny_dir: Path) -> None:
    """Random weights, any temperature: the grammar alone makes it JSON."""
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    checkpoint = open_checkpoint(tiny_dir)
    stops = frozenset([0])
    engine = TorchEngine(load_model(checkpoint), load_tokenizer(checkpoint), stops, 2048, 8)
    for seed in range(6):
        sampling = Sampling(max_tokens=60, temperature=1.5, seed=seed)
        engine.add(Request(str(seed), tuple(TEXT[:10]), sampling, json.dumps(schema)))
    texts: dict[str, str] = {}
    finishes = set()
    while not engine.is_idle:
        for delta in engine.step():
            texts[delta.id] = texts.get(delta.id, "") + delta.text
            finishes.add(delta.finish)
    assert finishes == {None, "stop"}
    for text in texts.values():
        answer = json.loads(text)
        assert set(answer) == {"n", "ok"} and 0 <= answer["n"] <= 99 and isinstance(answer["ok"], bool)
    for bad in ('{"type": "nonsense"}', "{", '{"type": "string", "format": "of no kind"}'):
        with pytest.raises(UsageError, match="schema cannot be followed"):
            engine.check(Request("bad", (1,), Sampling(), bad))


def test_embeddings_do_not_depend_on_who_is_answered(engine: TorchEngine) -> None:
    long = tuple(TEXT[:250])
    alone = engine.embed([long, long[:7]])
    for place, prompt in enumerate(prompts(16)):
        engine.add(Request(str(place), prompt, Sampling(max_tokens=30)))
    engine.step()
    assert torch.allclose(torch.tensor(engine.embed([long])[0]), torch.tensor(alone[0]), atol=1e-6)
    assert abs(sum(x * x for x in alone[1]) - 1) < 1e-5
    drain(engine)
    assert engine.pool.free == engine.pool.count
    engine.pooling = None
    with pytest.raises(UsageError, match="--embeddings"):
        engine.embed([long])


def test_damaged_weights_are_noticed(engine: TorchEngine) -> None:
    assert engine.model is not None
    with torch.no_grad():
        next(engine.model.model.parameters()).fill_(torch.nan)
    engine.add(Request("one", (1, 2), Sampling()))
    with pytest.raises(CheckpointError, match="NaN"):
        engine.step()


def test_a_model_made_for_serving_refuses_other_uses(engine: TorchEngine) -> None:
    assert engine.model is not None
    assert engine.model.model.config._attn_implementation == NAME
    with pytest.raises(UsageError, match="made for serving"):
        engine.model.model(torch.tensor([[1, 2]]))


def test_contexts_that_cannot_be(tiny_dir: Path) -> None:
    with pytest.raises(UsageError, match="does not fit the KV cache of 64"):
        make(tiny_dir, kv_tokens=64, context=100)
    with pytest.raises(UsageError, match="more than the"):
        make(tiny_dir, kv_tokens=10**6, context=10**6)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
def test_a_compiled_engine_answers_alike_and_compiles_no_more(
    architecture_dir: Callable[[str], Path], name: str
) -> None:
    """Traced without inductor's code: the graphs are what may depend on a request, and none does."""
    torch._dynamo.reset()
    checkpoint = open_checkpoint(architecture_dir(name))
    engine, plain = (
        TorchEngine(load_model(checkpoint), load_tokenizer(checkpoint), frozenset(), 1024, 4) for _ in range(2)
    )
    assert engine.compile("eager") > 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for one in (engine, plain):
        for place, prompt in enumerate(prompts(6, 60, seed=4)):
            one.add(Request(str(place), prompt, Sampling(max_tokens=12)))
    assert drain(engine) == drain(plain)
    for prompt in (prompts(1, 60, seed=5)[0], tuple(TEXT[:100])):  # steps of one token, with few blocks and many
        assert ask(engine, prompt) == ask(plain, prompt)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
