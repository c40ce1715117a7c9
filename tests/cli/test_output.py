"""What a script and a reader see: one JSON document on stdout, progress on stderr, help and tables at 80 columns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import change_config
from tests.cli.driver import call, run, spawn

VERBS = ("plan", "fit", "quantize", "prune", "eval", "generate", "prove", "report", "demo")
EVAL = ("--context", 32, "--tokens", 128)
FIT: tuple[object, ...] = ("--memory", "1GB", "--context", 32, "--window", 32, "--tokens", 128)
EVAL_ROW = {
    "model": str,
    "bytes": int,
    "bits_per_weight": float,
    "peak_bytes": int,
    "perplexity": float,
    "perplexity_stderr": float,
    "kl": float,
    "top1": float,
    "prefill_tps": float,
    "decode_tps": float,
}


def one_document(text: str) -> Any:
    """The JSON document that is the whole of `text`, on one line."""
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> Path:
    """An artifact made by a process of its own, measured by nobody, proved for real."""
    out = tmp_path_factory.mktemp("made") / "int4"
    ended = run("quantize", tiny_model_dir(), "--json", "--out", out)
    assert ended.code == 0, ended.err
    document = one_document(ended.out)
    assert document.keys() == {"out", "rows"}
    assert document["out"] == str(out)
    assert {"disk_bytes", "bits_per_weight", "proof_runtime_kl"} <= {row["name"] for row in document["rows"]}
    assert "compressing" in ended.err
    assert "Traceback" not in ended.err
    return out


def test_eval_json(artifact: Path, tiny: Path) -> None:
    """With measuring children and all."""
    ended = call("eval", tiny, artifact, *EVAL, "--json")
    assert ended.code == 0, ended.err
    document = one_document(ended.out)
    assert list(document) == ["text", "tokens", "context", "rows"]
    assert isinstance(document["text"], str)
    assert (document["tokens"], document["context"]) == (128, 32)
    for row in document["rows"]:
        assert {name: type(value) for name, value in row.items()} == EVAL_ROW
        assert list(row) == list(EVAL_ROW)
    first, second = document["rows"]
    assert (first["model"], second["model"]) == (str(tiny), str(artifact))
    assert (first["kl"], first["top1"]) == (0.0, 1.0)
    assert second["kl"] > 0
    assert second["bytes"] < first["bytes"]
    assert "quality of" in ended.err


def test_prove_json(artifact: Path) -> None:
    document = one_document(call("prove", artifact, "--json").out)
    assert document["artifact"] == str(artifact)
    assert document["proved"] is True
    assert {"disk_bytes", "proof_runtime_kl", "proof_transformers_kl"} <= {row["name"] for row in document["rows"]}


def test_report_json(artifact: Path) -> None:
    document = one_document(call("report", artifact, "--json").out)
    assert list(document) == ["artifact", "command", "commit", "environment", "rows"]
    assert "quantize" in document["command"]
    assert document["environment"]["torch"]
    for row in document["rows"]:
        assert {"name", "value", "unit", "subject"} <= row.keys()


def test_report_as_table_and_markdown(artifact: Path) -> None:
    shown = call("report", artifact)
    assert shown.code == 0
    assert "bytes on disk" in shown.out
    assert "made by: " in shown.out
    assert call("report", artifact, "--markdown").out.startswith("|  | original | packed |")


@pytest.mark.usefixtures("stand_ins")
def test_fit_json(tiny: Path, out: Path) -> None:
    ended = call("fit", tiny, *FIT, "--json", "--out", out)
    assert ended.code == 0, ended.err
    document = one_document(ended.out)
    assert list(document) == ["out", "promise_kept", "missed", "text", "rows"]
    assert document["promise_kept"] is True
    assert document["missed"] == []
    found = {(row["name"], row["subject"]) for row in document["rows"]}
    for name in ("disk_bytes", "peak_bytes", "perplexity", "kl", "top1", "prefill_tps", "decode_tps"):
        assert {(name, "original"), (name, "packed")} <= found
    peak = next(row for row in document["rows"] if (row["name"], row["subject"]) == ("peak_bytes", "packed"))
    assert peak["predicted"] > 0


@pytest.mark.usefixtures("stand_ins")
def test_a_missed_promise_is_said_and_exits_3(tiny: Path, out: Path) -> None:
    """The stand-in measures 50 tokens/s, whatever had been predicted."""
    flags = (*FIT, "-q", "--min-tps", 60, "--out", out)
    ended = call("fit", tiny, *flags, "--json")
    assert ended.code == 3
    document = one_document(ended.out)
    assert document["promise_kept"] is False
    assert document["missed"] == ["it decodes 50 tokens/s and 60 were asked for"]
    assert ended.err.startswith("packlight: ")
    assert ended.err.count("\n") == 1
    assert call("fit", tiny, *flags, "--json") == ended, "the same command again says the same"


def test_generate_json(artifact: Path) -> None:
    ended = call("generate", artifact, "--prompt", "hi", "--max-tokens", 5, "--temperature", 1, "--json")
    document = one_document(ended.out)
    assert ended.err == ""
    assert len(document["tokens"]) <= 5
    assert document["finish_reason"] in ("stop", "length")
    assert document["prompt_tokens"] == 2
    again = call("generate", artifact, "--prompt", "hi", "--max-tokens", 5, "--temperature", 1, "--json")
    assert one_document(again.out)["tokens"] == document["tokens"], "one seed, one answer"


def test_plan_json(tiny: Path) -> None:
    document = one_document(call("plan", tiny, "--memory", "3MB", "--json").out)
    assert {"model", "num_params", "budget", "hardware", "notes", "rows"} <= document.keys()
    for row in document["rows"]:
        assert {"precision", "disk_bytes", "bits_per_weight", "memory", "decode", "fits", "reasons"} <= row.keys()
        assert row["fits"] == (not row["reasons"])
    thumb = one_document(call("plan", "--params", "70e9", "--json").out)
    assert thumb["bytes"]["bfloat16"] == 140 * 10**9


def test_plan_is_a_table_at_80_columns(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for flags in ((), ("--memory", "3MB"), ("--users", 1000, "--context", 10**6)):
        ended = call("plan", tiny, *flags)
        assert ended.code == 0, ended.err
        lines = ended.out.splitlines()
        assert max(map(len, lines)) <= 80
        start = next(place for place, line in enumerate(lines) if line.startswith("────"))
        rows = lines[start + 1 : start + 4]
        assert [row.split()[0] for row in rows] == ["float32", "bfloat16", "float16"], ended.out
        assert "…" not in ended.out


def test_plan_of_a_large_model_does_not_wrap(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tiny / "model.safetensors").unlink()
    change_config(
        tiny, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, head_dim=128
    )
    ended = call("plan", tiny, "--context", 131072, "--users", 64)
    assert ended.code == 0, ended.err
    assert "…" not in ended.out
    assert sum(line.startswith("int4-g32") for line in ended.out.splitlines()) == 2


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_at_80_columns(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = call(verb, "--help")
    assert ended.code == 0
    assert f"packlight {verb}" in ended.out.split("Example", 1)[1]
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "…" not in ended.out
    assert "[bold]" not in ended.out


def test_help_names_every_verb() -> None:
    ended = call("--help")
    assert ended.code == 0
    for verb in VERBS:
        assert verb in ended.out
    assert call("--version").out.startswith("packlight ")


def test_plan_in_a_process_of_its_own_takes_less_than_a_second(tiny: Path) -> None:
    """The best of a few: other processes may hold the cores for a while."""
    (tiny / "model.safetensors").unlink()
    seconds = [10.0]
    while min(seconds) > 1 and len(seconds) < 10:
        start = time.perf_counter()
        assert run("plan", tiny).code == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_a_reader_that_goes_away(tiny: Path) -> None:
    for argv in (("plan", tiny), ("plan", tiny, "--json"), ("plan", "--params", "7B"), ("--help",)):
        process = spawn(*argv)
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        process.wait(timeout=60)
        process.stderr.close()
        assert "Traceback" not in said
        assert "Exception" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_is_full(tiny: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "packlight", "plan", str(tiny)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith("packlight: ")
    assert "Traceback" not in ended.stderr


def test_no_control_codes_off_a_terminal(tiny: Path, artifact: Path) -> None:
    for argv in (("plan", tiny), ("report", artifact), ("fit", "--help"), ("plan", "nowhere")):
        ended = call(*argv)
        assert "\x1b" not in ended.out + ended.err
    colourless = run("plan", tiny, NO_COLOR="1")
    assert "\x1b" not in colourless.out + colourless.err


@pytest.mark.usefixtures("stand_ins")
def test_progress_on_stderr_unless_quiet(tiny: Path, tmp_path: Path) -> None:
    shown = call("fit", tiny, *FIT, "--out", tmp_path / "a")
    for stage in ("probing", "chose", "compressing", "speed and memory of the packed", "quality of packed", "proving"):
        assert stage in shown.err
    assert "probing" not in shown.out
    quiet = call("fit", tiny, *FIT, "--quiet", "--out", tmp_path / "b")
    assert quiet.err == ""
    assert [line[:20] for line in quiet.out.splitlines()[1:]] == [line[:20] for line in shown.out.splitlines()[1:]]


def test_progress_of_a_long_stage_says_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from packlight.cli import output

    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    tick = output.Progress(is_quiet=False).stage("long work", 4)
    for now in (20.0, 40.0, 41.0, 42.0):
        tick()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "long work ...",
        "long work: 1/4, about 60 s left",
        "long work: 2/4, about 40 s left",
        "long work: done in 42.0 s",
    ]


def test_bars_on_a_terminal(tiny: Path, tmp_path: Path) -> None:
    """In a pseudo terminal, with an ETA; the document goes to the pipe all the same."""
    pty = pytest.importorskip("pty")
    main_end, child_end = pty.openpty()
    argv = [sys.executable, "-m", "tests.cli.stand_ins", "quantize", str(tiny), "--json", "--out", str(tmp_path / "o")]
    environment = {**os.environ, "PAUSE": "0.1", "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=child_end, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    os.close(child_end)
    seen = b""
    try:
        while chunk := os.read(main_end, 4096):
            seen += chunk
    except OSError:  # how Linux reports that the other end was closed
        pass
    os.close(main_end)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"eta" in seen
    assert b"4/4" in seen
    assert b"\x1b[?25h" in seen, "the cursor is shown again"
    one_document(out)


def test_a_config_alone_is_enough_for_a_plan(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(tiny / "config.json", tmp_path / "alone")
    assert call("plan", tmp_path / "alone").code == 0
    assert call("plan", tmp_path / "alone" / "config.json").code == 0
