"""Quality on the same tokens for every subject: perplexity, KL divergence to the original, top-1 agreement.

For windows of tokens x_1..x_c, every position but the first is predicted from those before it in its window:

    perplexity  exp( mean over positions of -log q(x_t) )
    KL          mean over positions of sum_v p(v) (log p(v) - log q(v)), p the original, in nats
    top-1       share of positions at which argmax p = argmax q; one minus it is the consistency loss P(h(x) != h0(x))

The standard errors are those of the means over windows, since neighbouring positions are not independent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from packlight.errors import CheckpointError
from packlight.evidence import Measurement

POSITIONS = 128
"""Positions whose logits are held at once: (128, vocab) in float32 for each of two models."""

Tick = Callable[[], None]


@dataclass
class Reference:
    """The original as the others are compared with it: its last hidden states and its head, not its logits.

    A vocabulary is a hundred times wider than a hidden state; the logits are made again when they are needed.
    """

    head: nn.Module
    finish: Callable[[torch.Tensor], torch.Tensor]
    hidden: list[torch.Tensor] = field(default_factory=list)

    def logits(self, window: int, part: slice) -> torch.Tensor:
        """(positions, vocab) float32."""
        return self.finish(self.head(self.hidden[window][part]))


@dataclass(frozen=True)
class Quality:
    """Means over all positions, with the standard errors of the window means."""

    perplexity: float
    perplexity_stderr: float
    kl: float
    kl_stderr: float
    top1: float
    top1_stderr: float
    num_tokens: int

    def rows(self, subject: str, note: str) -> Iterator[Measurement]:
        """As rows of evidence."""
        n = self.num_tokens
        yield Measurement("perplexity", self.perplexity, "1", subject, spread=self.perplexity_stderr, n=n, note=note)
        yield Measurement("kl", self.kl, "nats", subject, spread=self.kl_stderr, n=n, note=note)
        yield Measurement("top1", self.top1, "1", subject, spread=self.top1_stderr, n=n, note=note)


@torch.inference_mode()
def evaluate_reference(
    model: PreTrainedModel, windows: Sequence[Sequence[int]], tick: Tick
) -> tuple[Quality, Reference]:
    """The original's own perplexity, and what `evaluate` needs to compare others with it. KL is 0 and top-1 is 1."""
    reference = Reference(_head(model), _finish(model))
    losses = []
    for place, window in enumerate(windows):
        reference.hidden.append(_hidden(model, window))
        losses.append([_nll(reference.logits(place, part), window, part).sum().item() for part in _parts(len(window))])
        tick()
    zeros = [0.0] * len(windows)
    return _quality([sum(loss) for loss in losses], zeros, [len(w) - 1.0 for w in windows], windows), reference


@torch.inference_mode()
def evaluate(model: PreTrainedModel, windows: Sequence[Sequence[int]], reference: Reference, tick: Tick) -> Quality:
    """One subject beside the reference, on the reference's windows.

    Raises:
        CheckpointError: the two vocabularies differ.
    """
    head, finish = _head(model), _finish(model)
    losses, divergences, agreements = [], [], []
    for place, window in enumerate(windows):
        hidden = _hidden(model, window)
        loss = divergence = agreement = 0.0
        for part in _parts(len(window)):
            mine, theirs = finish(head(hidden[part])), reference.logits(place, part)
            if mine.shape != theirs.shape:
                raise CheckpointError(
                    f"the vocabularies have {mine.shape[-1]} and {theirs.shape[-1]} tokens: only models with the same "
                    "tokenizer can be compared"
                )
            loss += _nll(mine, window, part).sum().item()
            divergence += _kl(theirs, mine).sum().item()
            agreement += (mine.argmax(dim=-1) == theirs.argmax(dim=-1)).sum().item()
        losses.append(loss)
        divergences.append(divergence)
        agreements.append(agreement)
        tick()
    return _quality(losses, divergences, agreements, windows)


def _hidden(model: PreTrainedModel, window: Sequence[int]) -> torch.Tensor:
    """Last hidden states after the final norm of all positions that predict one, (context - 1, hidden)."""
    out = model.base_model(torch.tensor([list(window)]), use_cache=False)
    hidden: torch.Tensor = out.last_hidden_state[0, :-1]
    return hidden.clone()


def _head(model: PreTrainedModel) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()
    return head


def _finish(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an architecture does to its head's output (Gemma's soft cap, Granite's and Cohere's scale), in float32.

    Raises:
        CheckpointError: the model does something else that packlight does not know, found by trying.
    """
    config = model.config.get_text_config(decoder=True)
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1.0
    factor /= getattr(config, "logits_scaling", None) or 1.0

    def finish(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if factor != 1.0:
            logits = logits * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    probe = [0, 1, 2]
    own = model(torch.tensor([probe]), use_cache=False).logits[0, :-1].float()
    made = finish(_head(model)(_hidden(model, probe)))
    if not torch.allclose(own, made, rtol=2e-2, atol=2e-2 * float(own.abs().max())):
        raise CheckpointError(f"{type(model).__name__} changes its logits in a way that packlight does not know yet")
    return finish


def _parts(length: int) -> Iterator[slice]:
    """Slices of the `length - 1` predicting positions."""
    for start in range(0, length - 1, POSITIONS):
        yield slice(start, min(start + POSITIONS, length - 1))


def _nll(logits: torch.Tensor, window: Sequence[int], part: slice) -> torch.Tensor:
    targets = torch.tensor(window[part.start + 1 : part.stop + 1])
    return nn.functional.cross_entropy(logits, targets, reduction="none")  # (positions,)


def _kl(reference: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(reference, dim=-1)
    log_q = torch.log_softmax(subject, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)  # (positions,)


def _quality(
    losses: list[float], divergences: list[float], agreements: list[float], windows: Sequence[Sequence[int]]
) -> Quality:
    counts = [len(window) - 1 for window in windows]
    loss, loss_error = _mean(losses, counts)
    kl, kl_error = _mean(divergences, counts)
    top1, top1_error = _mean(agreements, counts)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    # d exp(x) = exp(x) dx
    return Quality(perplexity, perplexity * loss_error, kl, kl_error, top1, top1_error, sum(counts))


def _mean(sums: list[float], counts: list[int]) -> tuple[float, float]:
    """Mean over positions and the standard error of the window means; 0 where there is one window only."""
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return sum(sums) / sum(counts), error
