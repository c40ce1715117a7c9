"""Bytes of weights, KV cache, activations and of the compression job itself, from shapes alone.

Weights are exact. The KV cache is exact for a cache that keeps the whole context. Activations and overhead are a
model, written out below term by term.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from packlight.plan.kernels import resident_tensor_bytes
from packlight.plan.layout import Layout, Role, matrix_shape, tensor_layout
from packlight.spec import DTYPE_BYTES, Budget, ModelSpec, Precision, TensorSpec

PREFILL_CHUNK = 128
"""Tokens per user that the runtime prefills at once. Activations grow with it; on two cores 128 tokens prefill within
a few percent of the speed of 512."""
OVERHEAD_SHARE = 0.025
OVERHEAD_BYTES = 2_000_000
OVERHEAD_LAYER_BYTES = 150_000
OVERHEAD_ACTIVATIONS = 2
"""What the allocator rounds up and fragments: a share of the weights, a constant, something for each layer's many
tensors, and holes in the heap of a multiple of the activations. Fitted to the demo model and stories15M in float32,
bfloat16, int8 and int4, where it is within 8 % of the whole peak; see `evidence/`."""
CALIBRATION_BATCH = 4
"""Windows that pass through a block at once."""
SWEPT_TOGETHER = 8
"""Windows of one sweep forward and back: what enters every block is kept for all of them."""
CALIBRATION_MATRICES = 6
"""Square matrices of the widest input that are held at once: second moments, their factors and copies."""
LOGITS_BYTES = 4
"""Logits are float32."""


@dataclass(frozen=True)
class DiskBytes:
    """Exact bytes of tensor data by what they hold. The header is not in here; see `layout.artifact_bytes`."""

    codes: int
    scales: int
    zero_points: int
    shapes: int
    left_alone: int
    masks: int = 0
    values: int = 0
    """Of pruned matrices that leave their zeros out."""

    @property
    def total(self) -> int:
        quantized = self.codes + self.scales + self.zero_points
        return quantized + self.shapes + self.masks + self.values + self.left_alone


@dataclass(frozen=True)
class Activations:
    """Bytes alive at the three places of a forward pass where most is alive; `total` is the worst of them."""

    attention: int
    mlp: int
    logits: int

    @property
    def total(self) -> int:
        return max(self.attention, self.mlp, self.logits)


@dataclass(frozen=True)
class MemoryPlan:
    """What a model adds to a process while it serves a budget, in bytes."""

    weights: int
    kv_cache: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.overhead


@dataclass(frozen=True)
class JobRates:
    """What the compression job gets done per second. Defaults are for two laptop cores."""

    read_bytes_per_s: float = 1000e6
    quantize_weights_per_s: float = 120e6
    write_bytes_per_s: float = 300e6
    flops_per_s: float = 0.1e12


@dataclass(frozen=True)
class Reading:
    """What a method asks of a calibration text.

    Args:
        passes: forward passes of every block over the whole text, the walk's own included; one back to the inputs
            counts as one.
        weighs_tokens: whether a sweep forward and back over the text comes before the first block.
        keeps_targets: whether the text also passes through the blocks as they were, for what should come out.
        ranks_blocks: whether the text passes through the model before the first block is changed, for what each block
            does to it, instead of travelling along.
    """

    passes: float = 1.0
    weighs_tokens: bool = False
    keeps_targets: bool = False
    ranks_blocks: bool = False


@dataclass(frozen=True)
class CalibrationSize:
    """The text that passes through the blocks while they are compressed.

    Args:
        windows, window: how many windows of how many tokens.
        reading: what is done with it.
        on_disk: whether the hidden states between two blocks are kept on disk.
    """

    windows: int
    window: int
    reading: Reading = Reading()
    on_disk: bool = False

    @property
    def tokens(self) -> int:
        return self.windows * self.window


@dataclass(frozen=True)
class JobPlan:
    """The cost of a compression job, block by block, above the base of interpreter and torch."""

    peak_bytes: int
    minutes: float


def disk_bytes(spec: ModelSpec, precision: Precision, layout: Layout | None = None) -> DiskBytes:
    """Exact bytes of tensor data in the file. A tied embedding is stored once."""
    sums: dict[Role, int] = dict.fromkeys(get_args(Role), 0)
    for part in tensor_layout(spec, precision, layout):
        sums[part.role] += part.nbytes
    return DiskBytes(**sums)


def bits_per_weight(spec: ModelSpec, precision: Precision, layout: Layout | None = None) -> float:
    """Bits on disk per parameter, scales and everything left alone included."""
    return 8 * disk_bytes(spec, precision, layout).total / spec.num_params


def resident_bytes(spec: ModelSpec, precision: Precision) -> int:
    """Bytes of weights that packlight's CPU runtime holds, in the layout of each tensor's kernel."""
    return sum(resident_tensor_bytes(tensor, precision, spec.is_tied) for tensor in spec.tensors)


def kv_elements_per_token(spec: ModelSpec) -> int:
    """Cached elements per token over all layers.

    MHA 2 n_h d_h l, GQA 2 n_g d_h l, MLA (d_c + d_R) l (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    """
    return spec.num_layers * kv_elements_per_layer(spec)


def kv_elements_per_layer(spec: ModelSpec) -> int:
    """Cached elements per token of one layer: keys and values of its KV heads, or a latent and its rotary key."""
    if spec.kv_lora_rank is not None:
        return spec.kv_lora_rank + (spec.qk_rope_head_dim or 0)
    return 2 * spec.num_kv_heads * spec.head_dim


def kv_cache_bytes(
    spec: ModelSpec, context: int, users: int = 1, dtype: str = "bfloat16", is_windowed: bool = False
) -> int:
    """Bytes of keys and values for `users` sequences of `context` tokens.

    Layers with a sliding window are counted for the whole context, an upper bound that holds for any cache;
    `is_windowed` counts them for their window only, as a cache that evicts does.
    """
    positions = spec.num_layers * context
    if is_windowed and spec.sliding_window is not None:
        positions -= spec.num_sliding_layers * max(0, context - spec.sliding_window)
    return users * positions * kv_elements_per_layer(spec) * DTYPE_BYTES[dtype]


def activation_bytes(spec: ModelSpec, tokens: int, dtype: str = "bfloat16", users: int = 1) -> Activations:
    """Bytes of activations of one forward pass over `tokens` tokens, of which the last of each user gets logits.

    Alive at once, per token: the residual stream and its normed copy, then either queries, keys, values and the
    attention output, or gate, up and their product. Attention is tiled, so nothing grows with context squared.
    """
    queries = spec.num_heads * spec.head_dim
    keys_and_values = 2 * _expanded_kv_heads(spec) * spec.head_dim
    residual_and_norm = 2 * spec.hidden_size
    size = DTYPE_BYTES[dtype]
    return Activations(
        attention=tokens * size * (residual_and_norm + queries + keys_and_values + queries),
        mlp=tokens * size * (residual_and_norm + 3 * spec.intermediate_size),
        logits=tokens * size * residual_and_norm + logits_bytes(spec, users),
    )


def logits_bytes(spec: ModelSpec, tokens: int) -> int:
    """Float32 logits of `tokens` positions: what evaluation holds for a whole window."""
    return tokens * spec.vocab_size * LOGITS_BYTES


def runtime_bytes(spec: ModelSpec, precision: Precision, budget: Budget) -> MemoryPlan:
    """Everything that serving the budget's context and users adds to the process.

    Overhead is what the allocator rounds up and fragments, see `OVERHEAD_SHARE`.
    """
    weights = resident_bytes(spec, precision)
    tokens = min(PREFILL_CHUNK, budget.context) * budget.users
    activations = activation_bytes(spec, tokens, precision.dtype, budget.users).total
    overhead = int(weights * OVERHEAD_SHARE) + OVERHEAD_BYTES + spec.num_layers * OVERHEAD_LAYER_BYTES
    return MemoryPlan(
        weights=weights,
        kv_cache=kv_cache_bytes(spec, budget.context, budget.users, precision.dtype),
        activations=activations,
        overhead=overhead + OVERHEAD_ACTIVATIONS * activations,
    )


def stream_bytes(spec: ModelSpec, calibration: CalibrationSize) -> int:
    """Bytes of the hidden states that a calibrated walk keeps between two blocks, in float32: one stream, and two more
    where what should come out is kept."""
    return (3 if calibration.reading.keeps_targets else 1) * 4 * calibration.tokens * spec.hidden_size


def job_plan(
    spec: ModelSpec, precision: Precision, calibration: CalibrationSize | None = None, rates: JobRates | None = None
) -> JobPlan:
    """Peak memory and minutes of a block-by-block job.

    The walk holds one block at a time: first everything outside the layers but the head, then each layer, then the
    head. A block takes its weights as they are stored in the source, the codes and the de-quantized values of its
    largest matrix, and what it leaves alone in the result's dtype. What lies outside the layers stays to the end.
    """
    rates = rates or JobRates()
    read = sum(tensor.nbytes for tensor in spec.tensors)
    changed = sum(tensor.numel for tensor in spec.tensors if precision.grid_of(tensor) is not None)
    seconds = (
        read / rates.read_bytes_per_s
        + changed / rates.quantize_weights_per_s
        + disk_bytes(spec, precision).total / rates.write_bytes_per_s
    )
    outside, *others = _blocks(spec.tensors)
    stays = sum(tensor.numel * DTYPE_BYTES[precision.dtype] for tensor in outside)
    peaks = [_block_peak(outside, precision), *(stays + _block_peak(block, precision) for block in others)]
    if calibration is None:
        return JobPlan(max(peaks), seconds / 60)
    matrices = [tensor for tensor in spec.tensors if tensor.kind in ("linear", "expert")]
    per_token = sum(2 * tensor.numel for tensor in matrices)
    if calibration.reading.ranks_blocks:
        seconds += calibration.tokens * calibration.reading.passes * per_token / rates.flops_per_s
        return JobPlan(max(*peaks, _ranking_peak(spec, calibration)), seconds / 60)
    squares = sum(matrix_shape(tensor)[2] ** 2 for tensor in matrices)  # 2 cols^2 each, and two matrices share an input
    seconds += calibration.tokens * (calibration.reading.passes * per_token + squares) / rates.flops_per_s
    sweep = _sweep_peak(spec, calibration) if calibration.reading.weighs_tokens else 0
    return JobPlan(max(_walk_peak(spec, precision, calibration), sweep), seconds / 60)


def _walk_peak(spec: ModelSpec, precision: Precision, calibration: CalibrationSize) -> int:
    """Of a walk that text passes through: weights of a block in float32 as they were, as they are and as the method has
    them, what flows through a batch of windows, second moments, and the hidden states between two blocks."""
    outside, *blocks = _blocks(spec.tensors)
    widest = max((matrix_shape(t)[2] for t in spec.tensors if t.kind in ("linear", "expert")), default=0)
    batch = min(CALIBRATION_BATCH, calibration.windows) * calibration.window
    flowing = 2 * activation_bytes(spec, batch, "float32").total
    held = max((3 * 4 * sum(tensor.numel for tensor in block) for block in blocks), default=0)
    stays = sum(tensor.numel * DTYPE_BYTES[precision.dtype] for tensor in outside)
    states = 0 if calibration.on_disk else stream_bytes(spec, calibration)
    at_first = _block_peak(outside, precision) + states
    guide = _guide_bytes(spec, calibration)
    return guide + max(at_first, stays + states + CALIBRATION_MATRICES * 4 * widest**2 + flowing + held)


def _ranking_peak(spec: ModelSpec, calibration: CalibrationSize) -> int:
    """Of one pass through the model in float32: what lies outside the blocks and one block as it is stored and as it
    runs, what flows through a batch of windows, and the hidden states between two blocks."""
    outside, *blocks = _blocks(spec.tensors)
    batch = min(CALIBRATION_BATCH, calibration.windows) * calibration.window
    held = sum(4 * tensor.numel for tensor in outside)
    held += max((sum(4 * t.numel + t.nbytes for t in block) for block in blocks), default=0)
    states = 0 if calibration.on_disk else stream_bytes(spec, calibration)
    return held + states + 2 * activation_bytes(spec, batch, "float32").total


def _sweep_peak(spec: ModelSpec, calibration: CalibrationSize) -> int:
    """Of a sweep forward and back: what enters every block for the windows of one sweep, the embedding in float32, and
    at the head the logits of a window with what their gradient takes."""
    windows = min(SWEPT_TOGETHER, calibration.windows)
    states = (spec.num_layers + 3) * 4 * windows * calibration.window * spec.hidden_size
    outside, *blocks = _blocks(spec.tensors)
    weights = 4 * (sum(t.numel for t in outside) + max((sum(t.numel for t in block) for block in blocks), default=0))
    return weights + states + 4 * logits_bytes(spec, calibration.window) + _guide_bytes(spec, calibration)


def _guide_bytes(spec: ModelSpec, calibration: CalibrationSize) -> int:
    """How much each token matters at each matrix and block, in float32, where the method asks."""
    if not calibration.reading.weighs_tokens:
        return 0
    places = spec.num_layers + sum(tensor.kind in ("linear", "expert") for tensor in spec.tensors)
    return 4 * calibration.tokens * places


_BLOCK = re.compile(r"(?:.*?\.)?\d+\.")


def _blocks(tensors: Iterable[TensorSpec]) -> list[list[TensorSpec]]:
    """Tensors as the walk loads them: those outside the layers, then `model.layers.0.` together and so on, the head."""
    blocks: dict[str, list[TensorSpec]] = {"": []}
    for tensor in tensors:
        match = _BLOCK.match(tensor.name)
        name = match.group() if match else tensor.name if tensor.kind == "head" else ""
        blocks.setdefault(name, []).append(tensor)
    return list(blocks.values())


def _block_peak(block: list[TensorSpec], precision: Precision) -> int:
    size = DTYPE_BYTES[precision.dtype]
    quantized = [tensor.numel for tensor in block if precision.grid_of(tensor) is not None]
    alone = sum(tensor.numel for tensor in block) - sum(quantized)
    return sum(tensor.nbytes for tensor in block) + max(quantized, default=0) * (1 + size) + alone * size


def _expanded_kv_heads(spec: ModelSpec) -> int:
    """Heads of keys and values while a block runs: latent attention expands its latents to all heads."""
    return spec.num_heads if spec.kv_lora_rank is not None else spec.num_kv_heads
