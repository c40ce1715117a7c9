"""Every flag with a value that it does not take: one sentence, exit 2, nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.cli.driver import Ended, assert_refused, call

from packlight.spec import parse_size

pytestmark = pytest.mark.usefixtures("stand_ins")

FIT = ("-q", "--memory", "1GB", "--context", 64, "--window", 32, "--tokens", 256)


@pytest.mark.parametrize(
    "flags",
    [
        ["--bits", "9"],
        ["--bits", "3", "--layout", "pack-quantized"],
        ["--scale-bits", "3"],
        ["--scale-bits", "6", "--group-size", "row"],
        ["--clip", "nonsense"],
        ["--option", "nonsense"],
        ["--option", "nosuch=1"],
        ["--option", "bits=many"],
        ["--windows", "2"],
        ["--method", "gptq", "--windows", "0"],
        ["--method", "gptq", "--window", "1"],
        ["--method", "gptq", "--data", "nowhere.txt"],
        ["--method", "gptq", "--option", "damping=0"],
        ["--method", "gptq", "--option", "static_groups=false"],
        ["--method", "learned", "--option", "epochs=0"],
        ["--bits", "four"],
        ["--group-size", "7"],
        ["--group-size", "-1"],
        ["--group-size", "0"],
        ["--group-size", "abc"],
        ["--group-size", "9" * 5000],
        ["--embeddings", "1"],
        ["--dtype", "int8"],
        ["--layout", "nonsense"],
        ["--layout", "int-quantized"],
        ["--method", "nosuch"],
        ["--method", "cast", "--bits", "8"],
        ["--method", "cast", "--group-size", "row"],
        ["--method", "cast", "--asymmetric"],
        ["--data", "nowhere.txt"],
        ["--nosuch"],
    ],
)
def test_quantize(flags: list[str], tiny: Path, out: Path, tmp_path: Path) -> None:
    assert_refused(["quantize", tiny, "-q", "--out", out, *flags], tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sparsity", "1"], "from 0 to below 1, not 1"),
        (["--sparsity", "-0.5"], "from 0 to below 1, not -0.5"),
        (["--sparsity", "50%"], "--sparsity"),
        (["--sparsity", "nan"], "from 0 to below 1, not nan"),
        (["--scope", "block"], "scope is layer, row, global or N:M such as 2:4, not 'block'"),
        (["--scope", "4:2"], "scope is layer"),
        (["--scope", "2:4", "--sparsity", "0.6"], "2:4 is a sparsity of 0.5, not 0.6"),
        (["--scope", "2:5"], "2:5 does not divide a row of 128"),
        (["--scope", "global"], "sparsegpt counts zeros by layer, row or N:M, not global"),
        (["--method", "wanda", "--scope", "global"], "wanda counts zeros by layer, row or N:M"),
        (["--method", "rtn"], "there is no pruning method 'rtn': choose one of magnitude, wanda, sparsegpt, blocks"),
        (["--storage", "zip"], "storage is dense or bitmask, not 'zip'"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--option", "damping=0"], "damping is above 0"),
        (["--option", "block_size=0"], "at least one column"),
        (["--option", "alpha=1"], "it takes"),
        (["--method", "magnitude", "--option", "damping=0.1"], "it takes"),
        (["--method", "magnitude", "--windows", "2"], "magnitude takes no --windows"),
        (["--method", "magnitude", "--data", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["--data", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["--windows", "0"], "--windows"),
        (["--method", "blocks", "--scope", "row"], "blocks takes no --scope"),
        (["--method", "flap", "--storage", "bitmask"], "flap takes no --storage"),
        (["--method", "blocks", "--sparsity", "0.1"], "is less than half a block: ask for a sparsity of 0.5 or more"),
        (["--method", "blocks", "--sparsity", "0.9"], "leaves none: ask for a sparsity of 0.5 or less"),
        (["--method", "blocks", "--sparsity", "nan"], "from 0 to below 1, not nan"),
        (["--method", "flap", "--sparsity", "1"], "from 0 to below 1, not 1"),
        (["--method", "flap", "--sparsity", "0.99"], "in multiples of 8 is all of them: ask for less"),
        (["--method", "flap", "--option", "multiple=64"], "in multiples of 64 is none: ask for more"),
        (["--method", "flap", "--option", "repair=glue"], "repair is bias or least-squares or affine or none"),
        (["--method", "flap", "--option", "score=size"], "score is fluctuation or wanda"),
        (["--method", "flap", "--option", "multiple=0"], "at least one channel"),
        (["--method", "flap", "--option", "damping=0"], "damping is above 0"),
    ],
)
def test_prune(flags: list[str], says: str, tiny: Path, out: Path, tmp_path: Path) -> None:
    assert_refused(["prune", tiny, "-q", "--out", out, *flags], tmp_path, says=says)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "blocks", "flap"])
def test_quantize_sends_pruning_to_its_verb(method: str, tiny: Path, out: Path, tmp_path: Path) -> None:
    assert_refused(["quantize", tiny, "--method", method, "--out", out], tmp_path, says="use packlight prune")
    assert_refused(["fit", tiny, "--method", method, "--out", out, *FIT], tmp_path, says="puts no weight on a grid")


@pytest.mark.parametrize(
    "flags",
    [
        ["--memory", "160"],
        ["--memory", "0MB"],
        ["--memory", "abcMB"],
        ["--memory", "-1MB"],
        ["--memory", ""],
        ["--memory", "9" * 400 + "GB"],
        ["--context", "0"],
        ["--context", "x"],
        ["--context", "1" + "0" * 30],
        ["--users", "0"],
        ["--users", "1" + "0" * 30],
        ["--tokens", "10"],
        ["--tokens", "1"],
        ["--window", "1"],
        ["--min-tps", "-1"],
        ["--min-tps", "nan"],
        ["--min-tps", "fast"],
        ["--max-loss", "abc"],
        ["--max-loss", "-1"],
        ["--max-loss", "inf"],
        ["--threads", "0"],
        ["--nosuch", "1"],
    ],
)
def test_fit(flags: list[str], tiny: Path, out: Path, tmp_path: Path) -> None:
    assert_refused(["fit", tiny, *FIT, "--out", out, *flags], tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--params", "-1"],
        ["--params", "abc"],
        ["--params", "nan"],
        ["--params", "0"],
        ["--params", "1e400"],
        ["nowhere", "--params", "1e9"],
        ["TINY", "--memory", "160"],
        ["TINY", "--context", "0"],
        ["TINY", "--users", "0"],
        ["TINY", "--threads", "0"],
        ["TINY", "--prompt-tokens", "5"],
        ["TINY", "--new-tokens", "5"],
        ["TINY", "--prompt-tokens", "0", "--new-tokens", "5"],
        ["TINY", "--prompt-tokens", "1000", "--new-tokens", "25"],
        ["TINY", "extra"],
    ],
)
def test_plan(flags: list[str], tiny: Path, tmp_path: Path) -> None:
    assert_refused(["plan", *[tiny if flag == "TINY" else flag for flag in flags]], tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", ""],
        ["--prompt", "\udcff"],
        ["--prompt", "long " * 60],
        ["--prompt", "hi", "--temperature", "-1"],
        ["--prompt", "hi", "--temperature", "nan"],
        ["--prompt", "hi", "--temperature", "inf"],
        ["--prompt", "hi", "--max-tokens", "0"],
        ["--prompt", "hi", "--seed", "1" + "0" * 30],
        ["--prompt", "hi", "--seed", "-1"],
        ["--prompt", "hi", "--prompt", ""],
        ["--prompt", "hi", "--system", ""],
        ["--prompt", "hi", "--system", "long " * 60],
        ["--prompt", "hi", "--top-k", "-1"],
        ["--prompt", "hi", "--top-p", "0"],
        ["--prompt", "hi", "--min-p", "2"],
        ["--prompt", "hi", "--repetition-penalty", "0"],
        ["--prompt", "hi", "--stop", ""],
        ["--prompt", "hi", "--logprobs", "3"],
        ["--prompt", "hi", "--logprobs", "21", "--json"],
        ["--prompt", "hi", "--kv-cache", "huge"],
        ["--prompt", "hi", "--kv-cache", "int4", "--no-cache"],
        ["--prompt", "hi", "--kv-cache", "sliding"],
        ["--prompt", "hi", "--kv-cache", "sliding", "--window", "0"],
        ["--prompt", "hi", "--window", "5"],
        ["--prompt", "hi", "--attention", "nosuch"],
        ["--prompt", "hi", "--attention", "flash-attn"],
        ["--prompt", "hi", "--compile", "--no-cache"],
        ["--prompt", "hi", "--compile", "--kv-cache", "int8"],
        ["--prompt", "hi", "--compile", "--attention", "eager"],
        [],
    ],
)
def test_generate(flags: list[str], tiny: Path, tmp_path: Path) -> None:
    assert_refused(["generate", tiny, *flags], tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        ["nosuch"],
        ["--nosuch"],
        ["fit", "TINY"],
        ["fit", "TINY", "--memory", "1GB"],
        ["fit", "TINY", "--out", "out"],
        ["quantize", "TINY"],
        ["quantize", "--out", "out"],
        ["eval"],
        ["prove"],
        ["report"],
        ["demo", "extra"],
    ],
)
def test_what_is_missing_or_too_much(line: list[str], tiny: Path, tmp_path: Path) -> None:
    assert_refused([tiny if word == "TINY" else word for word in line], tmp_path, says="--help")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("short.txt", b"too short", "less than one window"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("binary.dat", bytes(range(256)) * 20, "not UTF-8"),
        ("bad.jsonl", b'{"text": "' + b"a" * 3000 + b'"}\n{bad\n', "line 2"),
        ("list.jsonl", b'{"text": "' + b"a" * 3000 + b'"}\n[1]\n', "line 2"),
        ("text.gz", b"not compressed", "not a whole .gz"),
        ("text.xz", b"not compressed", "not a whole .xz"),
    ],
)
def test_bad_text(name: str, content: bytes, says: str, tiny: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for line in (["eval", tiny, "-q", "--context", 32, "--tokens", 128], ["fit", tiny, *FIT, "--out", out]):
        assert_refused([*line, "--data", tmp_path / name], tmp_path, says=says)


def test_missing_text(tiny: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.txt", tmp_path):
        assert_refused(["eval", tiny, "-q", "--data", path], tmp_path, says=str(path))


def test_a_budget_that_no_recipe_meets_names_one_that_would(tiny: Path, out: Path, tmp_path: Path) -> None:
    line = ["fit", tiny, *FIT, "--out", out]
    assert_refused([*line, "--memory", "1kB"], tmp_path, code=3, says="the smallest, int2-g32-asym+embed")
    said = re.search(r"allow (\S+ \S+) or more", call(*line, "--memory", "1kB").err)
    assert said is not None
    assert parse_size(said.group(1)) > 1000
    ended: Ended = call(*line, "--memory", said.group(1), "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["promise_kept"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--context", "100000"], "beyond the model's 256"),
        (["--users", "1000000"], "1000000 users"),
        (["--min-tps", "1e12"], "asked for"),
    ],
)
def test_other_budgets_that_no_recipe_meets(flags: list[str], says: str, tiny: Path, out: Path, tmp_path: Path) -> None:
    assert_refused(["fit", tiny, *FIT, "--out", out, *flags], tmp_path, code=3, says=says)
