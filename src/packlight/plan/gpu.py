"""Bytes that a model takes of a GPU's memory, from shapes alone: as PyTorch's allocator counts what is in use.

Weights are exact: every tensor in the dtype of the computation, or as a loader of bitsandbytes leaves it. The KV cache
is that of `plan.memory`. While a model runs, what cuBLAS keeps to work in comes on top, and with NF4 one de-quantized
matrix at a time: a prompt's matrix product de-quantizes all of its weights first.
"""

from __future__ import annotations

from packlight.errors import UsageError
from packlight.plan.memory import PREFILL_CHUNK, MemoryPlan, activation_bytes, kv_cache_bytes
from packlight.spec import DTYPE_BYTES, Budget, ModelSpec, TensorSpec

BLOCK = 512
"""The allocator rounds every tensor up to a multiple of this."""
WORKSPACE_BYTES = 32 * 2**20
"""What cuBLAS is given to work in on Hopper by default, once for each process; 8 MiB before."""
NF4_GROUP, NF4_LEVELS = 64, 16
"""Weights that share a float32 scale, and entries of the table of quantiles that each matrix holds as float32."""
LOADERS = (None, "bnb-int8", "bnb-nf4")


def gpu_weight_bytes(spec: ModelSpec, dtype: str, loader: str | None = None) -> int:
    """Bytes of a loaded model's parameters.

    Args:
        dtype: of what is not quantized, and of the computation.
        loader: None, or which of bitsandbytes' formats the matrices of the blocks are loaded in.

    Raises:
        UsageError: no such loader.
    """
    if loader not in LOADERS:
        raise UsageError(f"a loader is one of {', '.join(map(str, LOADERS))}, not {loader!r}")
    return sum(_round(part) for tensor in spec.tensors for part in _parts(tensor, dtype, loader))


def gpu_bytes(spec: ModelSpec, dtype: str, budget: Budget, loader: str | None = None) -> MemoryPlan:
    """Everything that serving the budget's context and users takes."""
    tokens = min(PREFILL_CHUNK, budget.context) * budget.users
    return MemoryPlan(
        weights=gpu_weight_bytes(spec, dtype, loader),
        kv_cache=kv_cache_bytes(spec, budget.context, budget.users, dtype),
        activations=activation_bytes(spec, tokens, dtype, budget.users).total,
        overhead=WORKSPACE_BYTES + _unpacked_bytes(spec, dtype, loader),
    )


def _parts(tensor: TensorSpec, dtype: str, loader: str | None) -> tuple[int, ...]:
    """Bytes of each block that one tensor becomes."""
    if loader is None or tensor.kind != "linear":
        return (tensor.numel * DTYPE_BYTES[dtype],)
    if loader == "bnb-int8":
        return tensor.numel, 4 * tensor.shape[0]  # a float32 for each row
    return -(-tensor.numel // 2), 4 * -(-tensor.numel // NF4_GROUP), 4 * NF4_LEVELS


def _unpacked_bytes(spec: ModelSpec, dtype: str, loader: str | None) -> int:
    """The largest matrix that NF4 de-quantizes for a prompt."""
    if loader != "bnb-nf4":
        return 0
    return max((t.numel * DTYPE_BYTES[dtype] for t in spec.tensors if t.kind == "linear"), default=0)


def _round(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK) * BLOCK
