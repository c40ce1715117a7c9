"""OpenAI's own client against the server, and `curl`."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator

import openai
import pytest
from tests.server.conftest import MODEL, Running, Start
from tests.server.scripted_engine import expected

PROMPT = b"<user>hello\n<assistant>"
MESSAGES = [{"role": "user", "content": "hello"}]


def client_of(server: Running, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=7, temperature=0)
    assert answer.choices[0].message.content == expected(PROMPT, 7)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 7)
    assert answer.usage.total_tokens == len(PROMPT) + 7
    assert answer.model == MODEL


def test_chat_with_several_turns_and_parts(client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=3, temperature=0)
    prompt = b"<system>be brief\n<user>ab\n<assistant>c\n<user>d\n<assistant>"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.content == expected(prompt, 3)


def test_chat_as_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected(PROMPT, 9)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert len({c.id for c in chunks}) == 1


def test_the_chat_stream_helper_parses_a_whole_answer(client: openai.OpenAI) -> None:
    free = expected(PROMPT, 40)
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, stop=free[9:13], temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == free[: free.index(free[9:13])]


def test_completions_of_every_kind_of_prompt(client: openai.OpenAI) -> None:
    for prompt in ("hello", list(b"hello"), ["hello"], [list(b"hello")]):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0)
        assert answer.choices[0].text == expected(b"hello", 6)
    several = client.completions.create(model=MODEL, prompt=["one", "two"], n=2, max_tokens=4, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    texts = [expected(prompt, 4) for prompt in (b"one", b"one", b"two", b"two")]
    assert [choice.text for choice in several.choices] == texts
    assert several.usage is not None
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (6, 16)


def test_a_completion_without_a_limit_has_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="hello", temperature=0)
    assert answer.choices[0].text == expected(b"hello", 16)


def test_completions_as_a_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=["one", "two"], max_tokens=8, temperature=0, stream=True, logprobs=1
    )
    texts, offsets = {0: "", 1: ""}, {0: [], 1: []}
    for chunk in stream:
        for choice in chunk.choices:
            assert choice.logprobs is not None and choice.logprobs.text_offset is not None
            offsets[choice.index] += choice.logprobs.text_offset
            texts[choice.index] += choice.text
    assert texts == {0: expected(b"one", 8), 1: expected(b"two", 8)}
    assert offsets == {0: list(range(8)), 1: list(range(8))}


def test_seeds_and_choices(client: openai.OpenAI) -> None:
    def drawn(n: int, seed: int) -> list[str]:
        answer = client.completions.create(model=MODEL, prompt="x", n=n, seed=seed, max_tokens=12, temperature=1)
        return [choice.text for choice in answer.choices]

    assert drawn(3, 5) == [expected(b"x", 12, seed) for seed in (5, 6, 7)]
    assert drawn(1, 6) == drawn(3, 5)[1:2]
    assert drawn(1, -1) == [expected(b"x", 12, 2**32 - 1)]
    free = {
        client.completions.create(model=MODEL, prompt="x", max_tokens=20, temperature=1).choices[0].text
        for _ in range(8)
    }
    assert len(free) > 1


def test_stop_strings(client: openai.OpenAI) -> None:
    free = expected(PROMPT, 40)
    for stop in (free[3:5], ["never", free[3:5]]):
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, stop=stop, max_tokens=40, temperature=0)
        assert answer.choices[0].message.content == free[: free.index(free[3:5])]
        assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=4, temperature=0
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None and "".join(token.token for token in content) == expected(PROMPT, 4)
    for token in content:
        assert token.bytes == list(token.token.encode())
        assert [top.logprob for top in token.top_logprobs] == [-0.5, -1.5]
        assert token.top_logprobs[1].token == "bytes:\\x80" and token.top_logprobs[1].bytes == [0x80]
    alone = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, max_tokens=1)
    assert alone.choices[0].logprobs is not None and alone.choices[0].logprobs.content is not None
    assert alone.choices[0].logprobs.content[0].top_logprobs == []


def test_json(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, temperature=0
    )
    assert json.loads(answer.choices[0].message.content or "") == {}
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == 3  # the end of the turn is a token too
    schema = {"name": "n", "schema": {"type": "array"}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, response_format={"type": "json_schema", "json_schema": schema}
        )


def test_extra_fields_of_vllm(client: openai.OpenAI) -> None:
    extra = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1}
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=2, temperature=0, extra_body=extra)
    assert answer.choices[0].text == expected(b"x", 2)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "packlight"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


def test_embeddings(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model=MODEL, input=["ab", "c"])  # the client asks for base64
    assert [one.embedding for one in found.data] == [[97, 98, 97, 98], [99, 99, 99, 99]]
    assert found.usage.prompt_tokens == 3
    plain = client.embeddings.create(model=MODEL, input="ab", encoding_format="float")
    assert plain.data[0].embedding == [97, 98, 97, 98]
    many = client.embeddings.create(model=MODEL, input=[[token + 1] for token in range(20)])
    assert [one.embedding[0] for one in many.data] == list(range(1, 21))


def test_embeddings_are_refused_where_the_model_makes_none(start: Start) -> None:
    with client_of(start()) as client, pytest.raises(openai.BadRequestError, match="not made for embeddings"):
        client.embeddings.create(model=MODEL, input="ab")


def test_errors_are_the_clients_own_classes(start: Start) -> None:
    server = start(keys=("right",), max_tokens=5)
    with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with client_of(server, "right") as client:
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[{"type": "function"}])  # type: ignore[list-item]
        assert caught.value.param == "tools" and caught.value.code == "unsupported_parameter"
        with pytest.raises(openai.BadRequestError, match="at most 5 tokens"):
            client.completions.create(model=MODEL, prompt="x", max_tokens=6)
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt="x" * 600)
        assert caught.value.code == "context_length_exceeded"
        assert "512" in caught.value.message and "600" in caught.value.message


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Running) -> None:
    body = json.dumps({"model": MODEL, "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "stream": True})
    done = subprocess.run(
        ["curl", "-sS", "-N", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    events = [line.removeprefix("data: ") for line in done.stdout.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == expected(PROMPT, 5)
