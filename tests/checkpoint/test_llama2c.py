"""llama2.c files become checkpoints that compute what run.c computes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packlight.checkpoint.llama2c import convert_llama2c, find_tokenizer, read_llama2c
from packlight.checkpoint.shards import read_index
from packlight.checkpoint.tensors import read_tensor
from packlight.errors import CheckpointError

FIELDS = (8, 12, 2, 2, 1, 300, 16)


def file_bytes(fields: tuple[int, ...] = FIELDS, num_floats: int | None = None) -> bytes:
    dim, inner, layers, heads, kv_heads, vocab, length = fields
    head = dim // heads
    block = 2 * dim + 2 * dim * dim + 2 * kv_heads * head * dim + 3 * dim * inner
    count = abs(vocab) * dim * (2 if vocab < 0 else 1) + layers * block + dim + length * head
    values = np.arange(count if num_floats is None else num_floats, dtype="<f4")
    return struct.pack("<7i", *fields) + values.tobytes()


def vocabulary(size: int) -> bytes:
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces += [chr(0x4E00 + index).encode() for index in range(size - len(pieces))]
    return struct.pack("<i", 6) + b"".join(struct.pack("<fi", -i, len(p)) + p for i, p in enumerate(pieces))


def forward(weights: dict[str, np.ndarray], header: Any, ids: list[int]) -> np.ndarray:
    """run.c's `forward`, position by position in float64: logits of shape (positions, vocab)."""
    heads, kv_heads, head = header.n_heads, header.n_kv_heads, header.head_dim
    keys: list[list[np.ndarray]] = [[] for _ in range(header.n_layers)]
    values: list[list[np.ndarray]] = [[] for _ in range(header.n_layers)]
    frequencies = 10000.0 ** -(np.arange(0, head, 2) / head)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def rotate(x: np.ndarray, position: int) -> np.ndarray:  # neighbours 2i and 2i + 1
        pairs = x.reshape(-1, head // 2, 2)
        c, s = np.cos(position * frequencies), np.sin(position * frequencies)
        first, second = pairs[..., 0] * c - pairs[..., 1] * s, pairs[..., 0] * s + pairs[..., 1] * c
        return np.stack([first, second], -1).reshape(-1, head)

    logits = []
    for position, token in enumerate(ids):
        x = weights["token_embedding"][token]
        for layer in range(header.n_layers):
            w = {name: value[layer] for name, value in weights.items() if name[0] in "rw" and value.ndim > 1}
            h = norm(x, w["rms_att"])
            q = rotate(w["wq"] @ h, position)
            keys[layer].append(rotate(w["wk"] @ h, position))
            values[layer].append((w["wv"] @ h).reshape(kv_heads, head))
            out = []
            for index in range(heads):
                shared = index // (heads // kv_heads)
                scores = np.array([q[index] @ k[shared] for k in keys[layer]]) / np.sqrt(head)
                p = np.exp(scores - scores.max())
                out.append((p / p.sum()) @ np.array([v[shared] for v in values[layer]]))
            x = x + w["wo"] @ np.concatenate(out)
            h = norm(x, w["rms_ffn"])
            gate = w["w1"] @ h
            x = x + w["w2"] @ (gate / (1 + np.exp(-gate)) * (w["w3"] @ h))
        logits.append(weights["token_embedding"] @ norm(x, weights["rms_final"]))
    return np.array(logits)


@pytest.fixture(scope="module")
def stories(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stories260K")
    convert_llama2c(data_dir / "stories260K" / "stories260K.bin", out)
    return out


@pytest.mark.data
def test_logits_are_those_of_run_c(data_dir: Path, stories: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = data_dir / "stories260K" / "stories260K.bin"
    header, at, weights = read_llama2c(path), 28, {}
    for name, shape in header.sections.items():
        count = int(np.prod(shape))
        weights[name] = np.fromfile(path, "<f4", count, offset=at).reshape(shape).astype(np.float64)
        at += 4 * count
    ids = [1, 403, 407, 261, 378, 432, 317, 291, 401]
    model = AutoModelForCausalLM.from_pretrained(stories)
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ours, forward(weights, header, ids), atol=2e-4)


@pytest.mark.data
def test_it_tells_a_story(stories: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(stories), AutoModelForCausalLM.from_pretrained(stories)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=40)
    story = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert story.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")


def test_every_value_has_its_place(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(file_bytes((8, 12, 2, 2, 1, -300, 16)))
    (tmp_path / "tokenizer.bin").write_bytes(vocabulary(300))
    out = tmp_path / "out"
    out.mkdir()
    convert_llama2c(tmp_path / "m.bin", out)
    index = read_index(out)
    assert index["lm_head.weight"].shape == (300, 8)
    assert float(read_tensor(index["lm_head.weight"])[-1, -1]) == len(file_bytes((8, 12, 2, 2, 1, -300, 16))) // 4 - 8
    att = 300 * 8
    assert read_tensor(index["model.layers.1.input_layernorm.weight"]).tolist() == [att + 8 + i for i in range(8)]
    wq = att + 16
    rows = (read_tensor(index["model.layers.0.self_attn.q_proj.weight"])[:, 0] - wq) / 8
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "at least 28 bytes"),
        (file_bytes()[:20], "at least 28 bytes"),
        (file_bytes()[:-4], "it is truncated"),
        (file_bytes() + b"\0", "too long"),
        (file_bytes(num_floats=0), "truncated"),
        (struct.pack("<7i", *[2**31 - 1] * 7), "do not fit|describes"),
        (struct.pack("<7i", 8, 12, 2, 2, 0, 300, 16), "not a llama2.c version 0"),
        (struct.pack("<7i", 8, 12, 2, 2, 1, 0, 16), "not a llama2.c version 0"),
        (struct.pack("<7i", 8, 12, 2, 3, 1, 300, 16), "do not fit"),
        (struct.pack("<7i", 8, 12, 2, 2, 1, 10, 16), "10 tokens"),
    ],
)
def test_a_file_that_its_header_does_not_describe_is_refused(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "m.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        read_llama2c(tmp_path / "m.bin")


def test_the_vocabulary_beside_it_is_found(tmp_path: Path) -> None:
    model = tmp_path / "m.bin"
    with pytest.raises(CheckpointError, match="no tok"):
        find_tokenizer(model)
    (tmp_path / "tok300.bin").touch()
    assert find_tokenizer(model).name == "tok300.bin"
    (tmp_path / "tok400.bin").touch()
    with pytest.raises(CheckpointError, match="2 tok"):
        find_tokenizer(model)
    (tmp_path / "tokenizer.bin").touch()
    assert find_tokenizer(model).name == "tokenizer.bin"
