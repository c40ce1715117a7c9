"""One pass forward through the model and one back, for gradients at every matrix, with one block's weights at a time.

Forward, what enters each block is kept; back, each block is run once more, with the gradient of what left it.
The gradient is that of -log p(y) with labels y drawn from the model's own distribution: its mean square is the Fisher
information, which says how much a small change at a place changes what the model predicts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from packlight.checkpoint.cache import build_once, cache_root
from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.save import content_hash
from packlight.compress.walk import (
    Calibration,
    Guide,
    cast_,
    find_layers,
    free_,
    record_calls,
    run_block,
    stages,
    standing_in,
)
from packlight.plan.memory import SWEPT_TOGETHER
from packlight.runtime.allocator import trim
from packlight.runtime.load import empty_model, load_dense_

Note = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Takes a tensor's name, the input (n, cols) of its matrix, and the gradient (n, rows) at its output."""

SEED = 0
VERSION = 3
"""Of what a guide holds; part of the cache's key."""
GUIDE_NAME = "guide.safetensors"
TOKENS, ENDS = "tokens:", "ends:"
"""How the names of a guide's tensors begin."""


class Sweep:
    """A model and some windows of text on their way through it, computed in float32.

    `gradient`, (windows, tokens, hidden), is at what left the block that `back` has come to, and at the looked-up
    embeddings when it has ended. `head_moment`, square in the width of the head's input, is filled by `head`: the
    sum over tokens of (1 - sum_y p(y)^2) x x^T, x what entered it.
    """

    def __init__(self, checkpoint: Checkpoint, windows: list[list[int]], batch: int) -> None:
        self.checkpoint, self.ids, self.batch = checkpoint, torch.tensor(windows), batch
        self.model = empty_model(checkpoint, "float32")
        self.layers = find_layers(self.model)
        self._embedding, *self._blocks, self._head = stages(checkpoint, self.model, self.layers)
        self._states = torch.empty(0)
        self.gradient = torch.empty(0)
        self.head_moment = torch.zeros(0, 0)

    @property
    def block_names(self) -> list[str]:
        """Module names of the blocks."""
        return [name for name, *_ in self._blocks]

    def forward(self, tick: Callable[[], None]) -> None:
        """Through the embedding and all blocks; `tick` after each."""
        self._load(self._embedding[3])
        self.model.tie_weights()
        with torch.no_grad():
            first = record_calls(self.model, self.layers, self.ids[:1])
            self._calls = [call.in_float32() for call in first]
            # One piece for all blocks: pieces of their own would lie between temporaries in a heap full of holes.
            width = first[0].hidden_states.shape[-1]
            self._states = torch.empty(len(self._blocks) + 1, *self.ids.shape, width)
            for part in self._parts():
                self._states[0, part] = record_calls(self.model, self.layers, self.ids[part])[0].hidden_states.float()
            tick()
            for place, (_, _, module, names) in enumerate(self._blocks):
                self._load(names)
                for part in self._parts():
                    self._states[place + 1, part] = run_block(module, self._states[place, part], self._calls[place])
                free_(self.model, names)
                trim()
                tick()

    def head(self) -> torch.Tensor:
        """Start the gradient at the logits; returns what entered the head, (windows, tokens, hidden)."""
        self._load(self._head[3])
        head = self.model.get_output_embeddings()
        generator = torch.Generator().manual_seed(SEED)
        hidden = self._states[-1]
        self.gradient = torch.empty_like(hidden)
        entered: list[torch.Tensor] = []
        handle = head.register_forward_pre_hook(lambda module, args: entered.append(args[0].detach()))
        for place in range(len(self.ids)):
            one = hidden[place : place + 1].clone().requires_grad_()
            with standing_in(self.layers, output=one):
                logits = self.model(self.ids[place : place + 1], use_cache=False).logits  # (1, tokens, vocab)
            p = torch.softmax(logits.detach()[0].float(), dim=-1)
            x, uncertain = entered[-1][0], 1 - torch.linalg.vector_norm(p, dim=-1, keepdim=True).square()
            if place == 0:  # what enters the head may have another width than what leaves the blocks
                self.head_moment = torch.zeros(x.shape[-1], x.shape[-1])
            self.head_moment.addmm_(x.T, x * uncertain)
            labels = draw(p, generator)
            p.scatter_add_(1, labels, torch.full(labels.shape, -1.0))  # the gradient of -log p(label) at the logits
            logits.backward(p[None].to(logits.dtype))
            assert one.grad is not None
            self.gradient[place] = one.grad[0]
        handle.remove()
        return torch.cat(entered)

    def back(self, note: Note, tick: Callable[[], None]) -> Iterator[tuple[str, list[str]]]:
        """Back through the blocks, the last one first.

        Yields (block name, names of its tensors) when `note` has been given everything about a block and its weights
        are still there; `gradient` is then at what entered it.
        """
        for place in reversed(range(len(self._blocks))):
            name, _, module, names = self._blocks[place]
            self._load(names)
            self._pull_back(module, place, names, note)
            yield name, names
            free_(self.model, names)
            trim()
            tick()

    def parameter(self, name: str) -> torch.Tensor:
        """A tensor of what is loaded now, in float32."""
        return self.model.get_parameter(name).data

    def _parts(self) -> Iterator[slice]:
        """Slices of the windows that pass together."""
        for start in range(0, len(self.ids), self.batch):
            yield slice(start, start + self.batch)

    def _load(self, names: list[str]) -> None:
        load_dense_(self.model, self.checkpoint, names, keep_dtype=True)
        cast_(self.model, names, torch.float32)

    def _pull_back(self, module: nn.Module, place: int, names: list[str], note: Note) -> None:
        matrices = {t.name for t in self.checkpoint.spec.tensors if t.kind in ("linear", "expert")}
        owners = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in names if name in matrices}
        handles = [owner.register_forward_hook(_listener(name, note)) for name, owner in owners.items()]
        before = self._states[place + 1]  # what left the block is not needed again: its room takes the new gradient
        for part in self._parts():
            hidden = self._states[place, part].clone().requires_grad_()
            run_block(module, hidden, self._calls[place]).backward(self.gradient[part])
            assert hidden.grad is not None
            before[part] = hidden.grad
        self.gradient = before
        for handle in handles:
            handle.remove()


def guide(checkpoint: Checkpoint, calibration: Calibration, file: Path, tick: Callable[[], None]) -> None:
    """Write how much each token matters at each matrix, |g|^2, and the second moments of the two ends.

    An error e of row v of the head changes the logits of token v by e . x, which costs p(v) (1 - p(v)) (e . x)^2 / 2
    nats; one of row v of the embedding costs (e . g)^2 / 2 wherever v is looked up. With x and g taken as independent
    of v, each row's cost is e M e^T / 2 times how often v occurs, M the mean of (1 - sum_y p(y)^2) x x^T for the head,
    of g g^T for the embedding, and their sum where the two are tied.

    Args:
        file: receives what `read_guide` reads.
        tick: called after each of `num_sweeps(calibration) * (2 * layers + 1)` stages.
    """
    # Room for everything at once: small results that outlive a block would lie scattered over the heap between its
    # large temporaries, and the holes between them grow to several times what is alive.
    spec = checkpoint.spec
    names = [tensor.name for tensor in spec.tensors if tensor.kind in ("linear", "expert")]
    count, length = len(calibration.windows), len(calibration.windows[0])
    found = {name: torch.zeros(count * length) for name in names}
    filled = dict.fromkeys(names, 0)
    outer = [tensor for tensor in spec.tensors if tensor.is_end and tensor.shape[-1] == spec.hidden_size]
    ends = {tensor.name: torch.zeros(spec.hidden_size, spec.hidden_size) for tensor in outer}

    def keep(name: str, squares: torch.Tensor) -> None:
        done = filled[name]
        found[name][done : done + len(squares)] = squares
        filled[name] = done + len(squares)

    def note(name: str, _: torch.Tensor, gradient: torch.Tensor) -> None:
        keep(name, gradient.square().sum(dim=1))

    for start in range(0, count, SWEPT_TOGETHER):
        sweep = Sweep(checkpoint, calibration.windows[start : start + SWEPT_TOGETHER], calibration.batch)
        for name in sweep.block_names:
            found.setdefault(name, torch.zeros(count * length))
            filled.setdefault(name, 0)
        sweep.forward(tick)
        sweep.head()
        leaving = sweep.gradient
        for name, _ in sweep.back(note, tick):
            keep(name, leaving.square().sum(dim=-1).reshape(-1))
            leaving = sweep.gradient
        factor = float(getattr(sweep.model.get_input_embeddings(), "embed_scale", 1.0))
        for tensor in outer:
            if tensor.kind == "embedding":
                looked_up = factor * leaving.reshape(-1, spec.hidden_size)
                ends[tensor.name].addmm_(looked_up.T, looked_up)
            if tensor.kind == "head" or (tensor.kind == "embedding" and spec.is_tied):
                ends[tensor.name] += sweep.head_moment
    tokens = {TOKENS + name: squares.reshape(count, length) for name, squares in found.items()}
    save_file(tokens | {ENDS + name: moment for name, moment in ends.items()}, file)


def known_guide(checkpoint: Checkpoint, calibration: Calibration, start: Callable[[int], Callable[[], None]]) -> Guide:
    """What `guide` writes, kept in the cache: another recipe for the same model and text costs nothing.

    Args:
        start: called with the number of stages if there is work to do; returns the `tick` for them.
    """
    asked = [content_hash(checkpoint), calibration.windows, VERSION]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

    def build(directory: Path) -> None:
        stages = num_sweeps(len(calibration.windows)) * (2 * checkpoint.spec.num_layers + 1)
        guide(checkpoint, calibration, directory / GUIDE_NAME, start(stages))

    return read_guide(build_once(cache_root() / "guides" / key, build) / GUIDE_NAME)


def num_sweeps(windows: int) -> int:
    """Sweeps that `guide` makes over so many windows."""
    return -(-windows // SWEPT_TOGETHER)


def read_guide(file: Path) -> Guide:
    """What `guide` has written."""
    stored = load_file(file)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): found for name, found in stored.items() if name.startswith(prefix)}

    return Guide(part(TOKENS), part(ENDS))


def draw(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One label for each row of probabilities, (rows, 1); many times as fast as `torch.multinomial`."""
    up_to = p.cumsum(dim=-1)
    labels = torch.searchsorted(up_to, up_to[:, -1:] * torch.rand(len(p), 1, generator=generator), right=True)
    return labels.clamp_(max=p.shape[1] - 1)


def _listener(name: str, note: Note) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        out.register_hook(lambda gradient: note(name, x, gradient.reshape(-1, gradient.shape[-1])))

    return hook
