"""A package the whole way: compiled, proved, loaded without model code, and the model's own tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.driver import assert_one_sentence, call
from tests.contracts.artifacts import make_artifact
from tests.runtime.architectures import save_architecture
from tests.runtime.test_fixed_shapes import by_transformers, forced

from packlight.checkpoint.cache import file_sha256
from packlight.checkpoint.open import open_checkpoint
from packlight.errors import CheckpointError, ProofError, UsageError
from packlight.evidence import LEDGER_NAME, Measurement, read
from packlight.export.compiled import Compiled
from packlight.measure.first_token import first_token
from packlight.measure.package_proof import prove_package
from packlight.measure.proof import PROOF_NAME
from packlight.runtime.load import load_model
from packlight.runtime.package import GRAPHS_NAME, NOTE_NAME
from packlight.runtime.package_decoder import PackageDecoder, load_package

CHUNK, CONTEXT = 16, 60


def export(model: Path, out: Path, **options: Any) -> list[Measurement]:
    return Compiled(context=CONTEXT, chunk=CHUNK, **options).write(
        open_checkpoint(model), out, lambda label, total: lambda: None
    )


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir(tied=True)


@pytest.fixture(scope="module")
def package_dir(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real package of the tiny model, for two sequences; compiling it takes most of this file's time."""
    if " " in torch.__file__:
        pytest.skip("torch does not compile from a path with a space")
    out = tmp_path_factory.mktemp("compiled") / "tiny"
    export(tiny, out, batch=2)
    return out


@pytest.fixture(scope="module")
def decoder(package_dir: Path) -> PackageDecoder:
    return load_package(package_dir)


@pytest.fixture
def copy(package_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package_dir, tmp_path / "copy"))


def rows_of(package: Path) -> dict[str, Any]:
    return {row.name: row.value for row in read(package / LEDGER_NAME)}


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 40])
def test_logits_are_those_of_transformers(decoder: PackageDecoder, tiny: Path, length: int) -> None:
    ids = torch.randint(1, 256, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, : min(3, length - 1)] = 0
    tokens, expected = by_transformers(load_model(open_checkpoint(tiny)), ids, mask, 12)
    torch.testing.assert_close(forced(decoder, ids, mask, tokens), expected, rtol=1e-4, atol=1e-4)


def test_the_context_ends_with_one_sentence(decoder: PackageDecoder) -> None:
    assert decoder.capacity == CONTEXT
    decoder.prefill(torch.ones(1, CONTEXT, dtype=torch.int64))
    with pytest.raises(UsageError, match=f"holds {CONTEXT} tokens and {CONTEXT + 1} were asked for"):
        decoder.step(torch.ones(1, 1, dtype=torch.int64))


def test_a_package_knows_where_an_answer_ends(decoder: PackageDecoder, package_dir: Path) -> None:
    assert decoder.stop_ids == {0}
    assert (decoder.tokenizer_dir / "tokenizer.json").is_file()


def test_weights_are_stored_once(package_dir: Path, tiny: Path) -> None:
    found = rows_of(package_dir)
    stored = sum(entry.nbytes for entry in open_checkpoint(tiny).index.values())
    assert stored <= found["weights_bytes"] < 1.05 * stored  # rotary tables and the header
    assert found["disk_bytes"] == sum(
        path.stat().st_size
        for path in package_dir.rglob("*")
        if path.is_file() and path.name not in (NOTE_NAME, LEDGER_NAME)
    )


def test_what_is_recorded(package_dir: Path) -> None:
    found = rows_of(package_dir)
    assert found["proof_package_kl"] < 1e-6
    assert found["greedy_agreement"] == 1
    assert found["load_s"] > 0 and found["compile_s"] > 1
    assert list(package_dir.parent.glob(".*")) == []  # no work is left behind


def test_a_package_says_nothing_of_where_it_was_made(package_dir: Path) -> None:
    for path in package_dir.rglob("*"):
        if path.suffix in (".json", ".jsonl"):
            assert str(package_dir.parent) not in path.read_text()


def test_a_fresh_process_needs_no_model_code(package_dir: Path, tiny: Path) -> None:
    package = first_token("package", package_dir, "The quick brown fox", num_tokens=8)
    eager = first_token("eager", tiny, "The quick brown fox", num_tokens=8)
    assert package["tokens"] == eager["tokens"]
    assert not package["imported"] and eager["imported"]
    assert 0 < package["first_token_s"] < package["second_token_s"]


def test_an_altered_graph_is_not_run(copy: Path) -> None:
    data = bytearray((copy / GRAPHS_NAME).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / GRAPHS_NAME).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"graphs\.pt2 was changed"):
        load_package(copy)


def test_altered_weights_are_found_by_prove(copy: Path) -> None:
    weights = copy / "weights" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    ended = call("prove", copy)
    assert_one_sentence(ended, says="model.safetensors was changed")


def test_prove_passes_what_is_whole(copy: Path) -> None:
    ended = call("prove", copy, "--json", "-q")
    assert ended.code == 0, ended.err
    assert {row["name"] for row in json.loads(ended.out)["rows"]} >= {"proof_files", "proof_package_kl", "load_s"}


def test_a_package_that_answers_differently_is_refused(copy: Path) -> None:
    proof = json.loads((copy / PROOF_NAME).read_text())
    proof["ids"][0] = 255 - proof["ids"][0]  # as if another prompt had been recorded
    (copy / PROOF_NAME).write_text(json.dumps(proof))
    note = json.loads((copy / NOTE_NAME).read_text())
    size = (copy / PROOF_NAME).stat().st_size
    note["files"][PROOF_NAME] = {"nbytes": size, "sha256": file_sha256(copy / PROOF_NAME)}
    (copy / NOTE_NAME).write_text(json.dumps(note))
    with pytest.raises(ProofError, match="is not the model that it was made from"):
        list(prove_package(copy))


def test_graphs_without_their_weights_are_refused(copy: Path) -> None:
    note = json.loads((copy / NOTE_NAME).read_text())
    note["same"] = {}  # the tied head is now nowhere
    (copy / NOTE_NAME).write_text(json.dumps(note))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_package(copy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 32, "embeddings": 8, "dtype": "bfloat16"},  # int4, and int8 for both ends
        {"bits": 4, "group_size": 32, "symmetric": False, "dtype": "bfloat16"},
        {"bits": 8, "group_size": None, "dtype": "bfloat16"},  # int8
        {"bits": 8, "group_size": 32, "dtype": "float32"},  # the reference: words are unpacked inside the graph
    ],
)
def test_packed_weights_stay_packed(options: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tiny, tmp_path / "packed", **options)
    export(artifact, tmp_path / "compiled")
    found = rows_of(tmp_path / "compiled")
    dense = sum(entry.nbytes for entry in open_checkpoint(tiny).index.values())
    assert found["weights_bytes"] < 0.7 * dense
    assert found["greedy_agreement"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "gpt2"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    save_architecture(name, tmp_path / name)
    export(tmp_path / name, tmp_path / "compiled")
    assert rows_of(tmp_path / "compiled")["greedy_agreement"] == 1


def test_generate_takes_a_package_as_it_takes_a_model(package_dir: Path, tiny: Path) -> None:
    words = [
        "--raw",
        "--max-tokens",
        8,
        "--prompt",
        "The quick",
        "--prompt",
        "brown fox jumps",
        "--stop",
        "zz",
        "--json",
    ]
    found, wanted = (json.loads(call("generate", model, *words).out) for model in (package_dir, tiny))
    assert found["answers"] == wanted["answers"]
    assert found["kv_cache_bytes"] > 0


def test_what_a_package_has_decided_cannot_be_chosen_again(package_dir: Path) -> None:
    for words in (["--kv-cache", "int8"], ["--attention", "eager"], ["--compile"], ["--no-cache"]):
        ended = call("generate", package_dir, "--prompt", "hi", *words)
        assert_one_sentence(ended, says="is a compiled package: cache and attention were decided when it was made")
    assert_one_sentence(call("generate", package_dir, "--raw", "--prompt", "long " * 20), says="shorten the prompt")


def test_three_prompts_are_more_than_a_package_for_two(package_dir: Path) -> None:
    ended = call("generate", package_dir, *(word for text in "abc" for word in ("--prompt", text)))
    assert_one_sentence(ended, says="3 sequences were given and at most 2 fit")
