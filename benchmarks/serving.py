"""`packlight serve` beside `transformers serve` and llama.cpp's own server, on the same prompts, in one run.

    python benchmarks/serving.py [MODEL] [--data FILE] [--servers NAME ...] [--clients 1 4 16 64] [--rounds 3]
                                 [--packed DIR] [--gguf FILE] [--transformers PYTHON] [--overload-seconds 120]
                                 [--ledger evidence/serving.jsonl] [--quick]

MODEL is `demo` where it is not given, and its GGUF file is then the demo's; `--packed` names an artifact of packlight,
which is served too. A round starts every server in turn, warms it up, and sends each number of clients; medians of the
rounds are reported. A client asks /v1/completions with a piece of the text, 20 to 400 tokens long, at temperature 0,
and reads the stream to the end before it asks again. No prompt is sent twice to one start of a server, except by the
overload. Tokens are those that the server's `usage` counts. The last line of stdout is one JSON object.

The overload: ten times as many clients as the server computes at once or keeps waiting, for two minutes, in which a
client that is refused asks again at once. Every answer must be the one that the same prompt got when it was alone, and
everything else a 429 or a 503.

What `transformers serve` needs (5.24): `pip install 'transformers[serving]'`, in an environment of its own, whose
Python `--transformers` names. A directory is served under its path, given as FORCE_MODEL and again as `model` in every
request, since another name is an error. `--continuous-batching` turns that on; sampling is then that of the first
request for everybody. `--dtype auto` takes the type of the weights, which for the demo is float32, and attention is
sdpa (paged, with continuous batching), as for packlight. Left to itself, its KV cache takes most of the memory that is
free; here it is given as many tokens as the others have, with `--cb-block-size` and `--cb-num-blocks`. Without
continuous batching requests are computed one after the other. It sends `usage` unasked, and reports no overload: it
queues what comes.

llama.cpp reads the GGUF file, whose weights are those that the directory holds de-quantized; it computes with
activations of 8 bits and a KV cache of 16. It is given as many slots as packlight computes at once.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.servers import Options, Running, Server, running, servers

from packlight import evidence
from packlight.checkpoint.demo import demo_file
from packlight.checkpoint.open import resolve
from packlight.evidence import Measurement
from packlight.measure.bandwidth import hardware
from packlight.measure.text import load_text

CHARACTERS = (80, 200, 500, 900, 1600)
"""Of prompts: about 20 to 400 tokens."""
OVERLOAD_PROMPTS, OVERLOAD = 16, 10
Outcome = dict[str, Any]
Row = Measurement


@dataclass(frozen=True)
class Point:
    """One number of clients at one start of a server."""

    tokens_per_s: float
    ttft_s: tuple[float, ...]
    token_s: tuple[float, ...]
    tokens: int


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers are ended too
    given = _arguments()
    threads = given.threads or hardware(is_probed=False).threads
    gguf = given.gguf or (demo_file() if given.model == "demo" else None)
    options = Options(
        given.model,
        resolve(given.model),
        gguf,
        given.packed,
        given.context,
        given.users,
        given.max_queue,
        threads,
        given.transformers,
    )
    known = servers(options)
    chosen = {name: known[name] for name in given.servers or known}
    texts = prompts(load_text(given.data).content, sum(_requests(count) for count in given.clients))
    found: dict[str, Measurement] = {}

    def keep(row: Measurement) -> None:
        found[f"{row.name}, {row.subject}"] = row
        print(f"{row.subject}: {row.name} {row.value} {row.unit} {row.note or ''}", flush=True)
        if given.ledger:
            evidence.append(given.ledger, evidence.stamped([row], threads))

    points = measure(chosen, texts, given, threads, keep)
    for row in rows(points):
        keep(row)
    for name in given.overload_servers or [name for name in chosen if name.startswith("packlight")]:
        if given.overload_seconds and (name, given.clients[0]) in points:
            for row in overload(known[name], texts, given, threads):
                keep(row)
    values = {name: row.value for name, row in found.items()}
    print(json.dumps({"model": given.model, **ratios(points), **values}))


def prompts(text: str, count: int) -> list[str]:
    """Pieces of the text of mixed lengths that do not overlap, each from the beginning of a word, always the same."""
    chance = random.Random(0)
    room = len(text) // count
    made = []
    for number in range(count):
        length = min(CHARACTERS[number % len(CHARACTERS)], room - 40)
        start = text.index(" ", number * room + chance.randrange(room - length - 20)) + 1
        made.append(" ".join(text[start : start + length].split()))
    return made


def measure(
    chosen: dict[str, Server],
    texts: Sequence[str],
    given: argparse.Namespace,
    threads: int,
    keep: Callable[[Measurement], None],
) -> dict[tuple[str, int], list[Point]]:
    """By server and number of clients, one point for each round."""
    points: dict[tuple[str, int], list[Point]] = {}
    failed: set[str] = set()
    for _ in range(given.rounds):
        for name, server in chosen.items():
            if name in failed:
                continue
            try:
                for clients, point in _round(server, texts, given, threads):
                    print(f"{name}, {clients} clients: {point.tokens_per_s:.1f} tokens/s", file=sys.stderr, flush=True)
                    points.setdefault((name, clients), []).append(point)
            except RuntimeError as error:
                failed.add(name)
                keep(Measurement("tokens_per_s", None, "tokens/s", name, note=str(error)))
    return points


def rows(points: dict[tuple[str, int], list[Point]]) -> Iterator[Row]:
    """Medians over the rounds, half the range as the spread; percentiles are of the requests of all rounds."""
    for (name, clients), rounds in points.items():
        subject = f"{name}, {clients} clients"
        speeds = [point.tokens_per_s for point in rounds]
        spread = (max(speeds) - min(speeds)) / 2
        yield Measurement(
            "tokens_per_s", statistics.median(speeds), "tokens/s", subject, spread=spread, n=len(rounds),
            note=f"{sum(point.tokens for point in rounds)} tokens",
        )  # fmt: skip
        for what in ("ttft_s", "token_s"):
            values = sorted(value for point in rounds for value in getattr(point, what))
            for percent in (50, 99):
                value = values[min(len(values) - 1, round(percent / 100 * (len(values) - 1)))] if values else None
                yield Measurement(f"{what}_p{percent}", value, "s", subject, n=len(values))


def ratios(points: dict[tuple[str, int], list[Point]]) -> dict[str, float]:
    """What sixteen clients get over one, and packlight over the others at sixteen, as ratios of medians."""
    speed = {key: statistics.median(point.tokens_per_s for point in rounds) for key, rounds in points.items()}
    made = {}
    for (name, clients), value in speed.items():
        if clients == 16 and (name, 1) in speed:
            made[f"{name}: 16 clients over 1"] = value / speed[name, 1]
        ours = speed.get(("packlight", clients))
        if ours is not None and name != "packlight":
            made[f"packlight over {name}, {clients} clients"] = ours / value
    return made


def overload(server: Server, texts: Sequence[str], given: argparse.Namespace, threads: int) -> Iterator[Row]:
    """Ten times the clients that have a place. Raises RuntimeError where the server does not come up."""
    asked = list(texts[:OVERLOAD_PROMPTS])
    clients = OVERLOAD * (given.users + given.max_queue)
    subject = f"{server.name}, {clients} clients for {given.overload_seconds} s"
    with running(server, threads) as up:
        alone = load(up, asked, 1, given.tokens)
        load(up, asked, OVERLOAD_PROMPTS, given.tokens)  # every buffer has its size by now
        with _Memory(up) as memory:
            outcomes = load(up, asked, clients, given.tokens, given.overload_seconds)
    kinds = Counter(_kind(outcome, alone) for outcome in outcomes)
    for kind in ("as alone", "refused", "other text", "failed"):
        yield Measurement(f"answers {kind}", kinds[kind], "1", subject, n=len(outcomes))
    for outcome in [one for one in outcomes if _kind(one, alone) == "failed"][:3]:
        yield Measurement("failure", None, "1", subject, note=f"{outcome['status']} {outcome['error']}")
    unsaid = sum(outcome["status"] == 429 and not outcome["retry_after"] for outcome in outcomes)
    yield Measurement("refusals without Retry-After", unsaid, "1", subject)
    for name, value in (("before", memory.before), ("after", memory.after), ("peak", memory.peak)):
        yield Measurement(f"rss_{name}_bytes", value, "bytes", subject)


def load(up: Running, texts: Sequence[str], clients: int, tokens: int, seconds: float | None = None) -> list[Outcome]:
    """What came of every request, from clients in a process of their own."""
    body = {"model": up.server.model, "max_tokens": tokens, "temperature": 0, **up.server.body}
    job = {"url": up.url, "body": body, "prompts": list(texts), "clients": clients, "seconds": seconds}
    program = Path(__file__).parent / "peers" / "load.py"
    done = subprocess.run([sys.executable, program], input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr.strip().splitlines()[-1]}")
    outcomes: list[Outcome] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


class _Memory:
    """Resident memory of a server while something happens to it."""

    def __init__(self, up: Running) -> None:
        self.up = up
        self.before = self.peak = self.after = up.rss_bytes()
        self._is_over = threading.Event()
        self._watch = threading.Thread(target=self._look)

    def __enter__(self) -> _Memory:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watch.join()
        self.after = self.up.rss_bytes()

    def _look(self) -> None:
        while not self._is_over.wait(0.5):
            self.peak = max(self.peak, self.up.rss_bytes())


def _round(
    server: Server, texts: Sequence[str], given: argparse.Namespace, threads: int
) -> Iterator[tuple[int, Point]]:
    with running(server, threads) as up:
        load(up, ["The warm-up of a server begins with a few words."], 1, 8)
        start = 0
        for clients in given.clients:
            asked = texts[start : start + _requests(clients)]
            start += len(asked)
            yield clients, _point(server, load(up, asked, clients, given.tokens))


def _requests(clients: int) -> int:
    """How many are sent by so many clients."""
    return max(4, min(2 * clients, 64))


def _point(server: Server, outcomes: list[Outcome]) -> Point:
    bad = next((one for one in outcomes if one["status"] != 200 or one["error"] or not one["tokens"]), None)
    if bad is not None:
        raise RuntimeError(f"{server.name} answered {bad['status']}: {bad['error'] or 'nothing'}")
    tokens = sum(one["tokens"] for one in outcomes)
    seconds = max(one["end"] for one in outcomes) - min(one["start"] for one in outcomes)
    seen = [one for one in outcomes if one["first"] is not None]
    return Point(
        tokens / seconds,
        tuple(one["first"] - one["start"] for one in seen),
        tuple((one["last"] - one["first"]) / (one["tokens"] - 1) for one in seen if one["tokens"] > 1),
        tokens,
    )


def _kind(outcome: Outcome, alone: list[Outcome]) -> str:
    if outcome["status"] in (429, 503):
        return "refused"
    if outcome["status"] != 200 or outcome["error"] or outcome["finish"] is None:
        return "failed"
    wanted = next(one["text"] for one in alone if one["prompt"] == outcome["prompt"])
    return "as alone" if outcome["text"] == wanted else "other text"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", type=Path, help="the text that prompts are cut from; default: the bundled one")
    parser.add_argument("--servers", nargs="+", help="only these, by name")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--packed", type=Path, help="an artifact that packlight serves too")
    parser.add_argument("--gguf", type=Path, help="the file for llama.cpp")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--users", type=int, default=16, help="answers computed at once")
    parser.add_argument("--max-queue", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--transformers", default=sys.executable, help="a Python that has transformers[serving]")
    parser.add_argument("--overload-seconds", type=float, default=120.0, help="0: no overload")
    parser.add_argument("--overload-servers", nargs="+", help="default: packlight's")
    parser.add_argument("--ledger", type=Path)
    parser.add_argument("--quick", action="store_true", help="few requests, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given.clients, given.rounds, given.tokens = [1, 4], 1, 16
        given.users, given.max_queue = 4, 4
        given.overload_seconds = min(given.overload_seconds, 10.0)
    return given


if __name__ == "__main__":
    main()
