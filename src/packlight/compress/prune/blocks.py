"""Whole blocks go: those that change least what passes through them.

    influence of block l = 1 - mean over tokens of cos(x_l, x_(l+1))

(Men et al., "ShortGPT", arXiv 2403.03853; `compress/influence.py` measures it on the unchanged model.) Every block that
goes takes its share of the weights, of the cache and of the time of a token with it, on any machine. Its limits:
influence is measured with all other blocks in place, and the blocks that stay are not repaired, so that small models
with few blocks suffer from the second or third one on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoConfig

from packlight.checkpoint.config import changed_config
from packlight.compress.prune.structure import StructuredPruning, rounded
from packlight.compress.walk import Block
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.plan.memory import Reading
from packlight.plan.reshape import without_blocks
from packlight.spec import ModelSpec


@dataclass(frozen=True)
class Blocks(StructuredPruning):
    """Take out the blocks of least influence; see `StructuredPruning` for the hyper-parameters. A quarter of the blocks
    unless another share is given, rounded to whole blocks, half up."""

    sparsity: float = 0.25

    name: ClassVar[str] = "blocks"

    @property
    def reading(self) -> Reading:  # type: ignore[override]  # of the methods that read nothing it is None
        """One pass through the unchanged model."""
        return Reading(1.0, ranks_blocks=True)

    def reshaped(self, spec: ModelSpec) -> ModelSpec:
        """Fewer blocks."""
        count = self._count(spec)
        if self.sparsity and not count:
            raise UsageError(
                f"{100 * self.sparsity:g} % of the {spec.num_layers} blocks of {spec.name} is less than half a block: "
                f"ask for a sparsity of {1 / spec.num_layers:.2g} or more"
            )
        if count == spec.num_layers:
            raise UsageError(
                f"{100 * self.sparsity:g} % of the {spec.num_layers} blocks of {spec.name} leaves none: "
                f"ask for a sparsity of {1 - 1 / spec.num_layers:.2g} or less"
            )
        return without_blocks(spec, count)

    def reconfigured(self, config: Mapping[str, Any], removed: Sequence[int]) -> Mapping[str, Any]:
        """Fewer layers, and none of those that are gone in any list that has an entry for each layer."""
        text = AutoConfig.for_model(**config).get_text_config(decoder=True)
        changes: dict[str, Any] = {"num_layers": text.num_hidden_layers - len(removed)}
        for name, values in per_layer(text.to_dict(), text.num_hidden_layers).items():
            changes[name] = [value for place, value in enumerate(values) if place not in removed]
        return changed_config(config, changes)

    def in_words(self, spec: ModelSpec) -> str:
        """How many blocks."""
        return f"{self._count(spec)} of {spec.num_layers} blocks"

    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """One row per block: its influence on the calibration text; 0 for the two ends, which are no blocks."""
        for block in blocks:
            if block.kind != "layer":
                yield Measurement("block_influence", 0.0, "1", block.name, note="no block: stays as it is")
                continue
            place = block.index - 1
            order = sorted(range(len(block.influences)), key=lambda one: (block.influences[one], -one))
            if place in order[: self._count(block.model)]:
                block.remove_()
            note = "removed" if block.is_removed else "stays"
            yield Measurement("block_influence", block.influences[place], "1", block.name, note=note)

    def _count(self, spec: ModelSpec) -> int:
        return rounded(self.sparsity * spec.num_layers)


def per_layer(built: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    """The lists with one entry for each layer in a config as transformers builds it, those among them that it derives
    from other fields: a rule such as 'every sixth layer' does not hold for the layers that stay."""
    return {name: v for name, v in built.items() if "layer" in name and isinstance(v, list) and len(v) == count}
