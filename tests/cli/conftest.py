"""Models to spoil, and a machine whose probe and whose measuring children cost nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.stand_ins import put_in
from tests.conftest import TinyModel, save_byte_tokenizer

from packlight.compress import run as compress


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are done sooner by one thread, above all where the cores have other work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path, tiny_model_dir: TinyModel) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model_dir(), tmp_path / "models" / "tiny"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A target that does not exist."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "out"


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No probe and no measuring or proving children: what remains of `fit` and `quantize` takes a moment."""
    put_in(monkeypatch.setattr)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks in the order in which they are stored by this process."""
    done: list[int] = []
    store = compress._store

    def counted(block: Any, *more: Any) -> None:
        store(block, *more)
        done.append(block.index)

    monkeypatch.setattr(compress, "_store", counted)
    return done


@pytest.fixture(scope="session")
def deep_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model of 12 layers, so that there is a middle to be interrupted in."""
    directory = tmp_path_factory.mktemp("deep") / "deep"
    save_llama(directory, num_hidden_layers=12)
    yield directory


def save_llama(directory: Path, dtype: str = "float32", max_shard_size: str = "1GB", **changes: Any) -> Path:
    """Write a random Llama like the tiny one, with other values in its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 256,
    }
    config = LlamaConfig(**{**sizes, **changes}, initializer_range=0.1, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    save_byte_tokenizer(directory)
    return directory


def change_config(directory: Path, **changes: Any) -> Path:
    """Set fields of a config; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return directory


def change_weight(directory: Path, name: str, value: float) -> Path:
    """Set one number of one tensor."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory
