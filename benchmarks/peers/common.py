"""What all peers share: the original's logits, the three measures, the rows of a result and the command line."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

POSITIONS = 128
"""Positions whose log-probabilities are held at once."""

Window = Sequence[int]
Logits = Callable[[Window], torch.Tensor]
"""From a window of n tokens to the (n - 1, vocab) float32 logits of the positions that predict one of its tokens."""


@dataclass(frozen=True)
class Row:
    """One format of one peer. A format that did not run has no numbers, and its error is in the note.

    `bytes` is what all weights take when stored, `kl` is KL(original || quantized) in nats, averaged over the
    predicting positions, `kl_stderr` the standard error of the mean of the windows.
    """

    peer: str
    format: str
    bytes: int | None
    kl: float | None
    kl_stderr: float | None
    perplexity: float | None
    top1: float | None
    note: str


@dataclass(frozen=True)
class Scores:
    """A subject beside the original; means over all predicting positions of all windows."""

    kl: float
    kl_stderr: float
    perplexity: float
    top1: float


@dataclass(frozen=True)
class Subject:
    """A quantized model, ready to be compared."""

    logits: Logits
    bytes: int
    note: str


Recipe = Callable[[], Subject]


class Reference:
    """The original in float32 on the windows: its last hidden states, from which logits are made again when needed.

    All logits of a few dozen windows would take gigabytes: the vocabulary is a hundred times wider than a state.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, windows: Sequence[Window]) -> None:
        self.model = model
        self.windows = windows
        self._head: nn.Module = model.get_output_embeddings()
        self._hidden = [self._states(window) for window in windows]
        probe = windows[0][:8]
        if not torch.allclose(torch_logits(model)(probe), self._head(self._states(probe)), atol=1e-3):
            raise ValueError(f"{type(model).__name__} changes the output of its head, which is not reproduced here")

    @torch.inference_mode()
    def compare(self, subject: Logits) -> Scores:
        """KL divergence, perplexity and top-1 agreement of a subject; every window is run once."""
        losses, divergences, agreements = [], [], []
        for window, hidden in zip(self.windows, self._hidden, strict=True):
            mine = subject(window)
            targets = torch.tensor(window[1:])
            loss = divergence = agreement = 0.0
            for start in range(0, len(targets), POSITIONS):
                part = slice(start, start + POSITIONS)
                log_p = torch.log_softmax(self._head(hidden[part]), dim=-1)
                log_q = torch.log_softmax(mine[part], dim=-1)
                loss += nn.functional.nll_loss(log_q, targets[part], reduction="sum").item()
                divergence += (log_p.exp() * (log_p - log_q)).sum(dim=-1).sum().item()
                agreement += (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum().item()
            losses.append(loss)
            divergences.append(divergence)
            agreements.append(agreement)
        counts = [len(window) - 1 for window in self.windows]
        means = [total / count for total, count in zip(divergences, counts, strict=True)]
        return Scores(
            kl=sum(divergences) / sum(counts),
            kl_stderr=statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0,
            perplexity=math.exp(min(sum(losses) / sum(counts), 700.0)),
            top1=sum(agreements) / sum(counts),
        )

    def _states(self, window: Window) -> torch.Tensor:
        states: torch.Tensor = self.model.base_model(torch.tensor([list(window)]), use_cache=False).last_hidden_state
        return states[0, :-1].clone()  # (n - 1, hidden)


def load_original(directory: Path) -> PreTrainedModel:
    """The original in float32, in evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    return model


def torch_logits(model: PreTrainedModel) -> Logits:
    """The logits of a transformers model."""

    @torch.inference_mode()
    def logits(window: Window) -> torch.Tensor:
        out: torch.Tensor = model(torch.tensor([list(window)]), use_cache=False).logits
        return out[0, :-1].float()

    return logits


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linears inside the blocks, by name: what all peers quantize. The head is not among them."""
    return {name: module for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)}


def rest_bytes(model: PreTrainedModel) -> int:
    """Embedding, head (once if tied), norms and biases in 16 bits: everything but the weights of the linears."""
    quantized = {id(linear.weight) for linear in block_linears(model).values()}
    return 2 * sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in quantized)


def measure_all(reference: Reference, peer: str, recipes: Mapping[str, Recipe]) -> Iterator[Row]:
    """One row after the other. A recipe that fails gives a row with its error: that too is a result."""
    for name, recipe in recipes.items():
        try:
            subject = recipe()
            scores = reference.compare(subject.logits)
        except Exception as error:
            yield Row(peer, name, None, None, None, None, None, f"failed: {type(error).__name__}: {error}")
        else:
            yield Row(peer, name, subject.bytes, **asdict(scores), note=subject.note)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all peers have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--model", type=Path, required=True, help="directory of the original in float32")
    options.add_argument("--windows", type=Path, required=True, help="JSON, a list of lists of token ids")
    options.add_argument("--out", type=Path, required=True, help="JSON, the rows")
    options.add_argument("--formats", help="only these, separated by commas")
    options.add_argument("--threads", type=int, default=1)
    return options


def start(options: argparse.Namespace) -> Reference:
    """The original on the windows of the command line."""
    torch.set_num_threads(options.threads)
    return Reference(load_original(options.model), read_windows(options.windows))


def read_windows(path: Path) -> list[list[int]]:
    """A list of lists of token ids."""
    windows: list[list[int]] = json.loads(path.read_text())
    return windows


def chosen(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The formats of the command line, or all `names`."""
    return list(names) if options.formats is None else options.formats.split(",")


def write(rows: Iterable[Row], out: Path) -> None:
    """Write the file anew after every row, so that what was measured survives what comes after it; print the row."""
    done = []
    for row in rows:
        done.append(asdict(row))
        out.write_text(json.dumps(done, indent=1) + "\n")
        print(json.dumps(done[-1]), flush=True)
