"""The nouns: what a model, a storage precision, a budget and a machine are.

No torch, no input or output: everything here can be built by hand in a test and printed as JSON.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from packlight.errors import UsageError

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
FLOAT_DTYPES = ("float32", "bfloat16", "float16")

TensorKind = Literal["linear", "embedding", "head", "expert", "other"]
"""What a tensor is to a quantizer: a matrix inside a block, the input embedding, the LM head, a fused 3-D
stack of expert matrices, or one of the tensors that are always left alone (norms, biases, buffers)."""


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor, known from a header or a config. `shape` is (out_features, in_features) for a linear."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: TensorKind

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def is_end(self) -> bool:
        """The input embedding or the LM head."""
        return self.kind in ("embedding", "head")


@dataclass(frozen=True)
class Grid:
    """An integer grid for weights: `bits` wide, one scale per row or per `group_size` input columns.

    Args:
        bits: 2 to 8.
        group_size: columns that share a scale; None means the whole row.
        symmetric: no zero point; otherwise each scale has an integer zero point of `bits` bits.
        scale_bits: scales are themselves unsigned codes of this many bits, 4 to 8, times one float for each row
            ("double quantization", QLoRA, arXiv 2305.14314, section 3); None stores every scale as a float.

    Raises:
        UsageError: a value outside these ranges.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_bits: int | None = None

    def __post_init__(self) -> None:
        if not (_is_count(self.bits) and 2 <= self.bits <= 8):
            raise UsageError(f"bits must be 2 to 8, not {self.bits}")
        if self.group_size is not None and not (_is_count(self.group_size) and self.group_size >= 1):
            raise UsageError(f"group size must be 'row' or a positive number of columns, not {self.group_size}")
        if self.scale_bits is not None and not (_is_count(self.scale_bits) and 4 <= self.scale_bits <= 8):
            raise UsageError(f"scale bits must be 4 to 8, not {self.scale_bits}")
        if self.scale_bits is not None and self.group_size is None:
            raise UsageError("a scale for each row cannot be quantized along the row: give a group size")

    @property
    def qmin(self) -> int:
        """Smallest code, signed: -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code, signed: 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def num_groups(self, cols: int) -> int:
        """Scales per row of `cols` columns. Raises UsageError where the group does not divide the row."""
        if self.group_size is None:
            return 1
        if cols % self.group_size:
            raise UsageError(
                f"a group of {self.group_size} columns does not divide a row of {cols}: "
                f"choose a divisor of {cols}, or 'row'"
            )
        return cols // self.group_size

    def fits(self, cols: int) -> bool:
        """Whether the group divides a row of `cols` columns."""
        return self.group_size is None or cols % self.group_size == 0

    def __str__(self) -> str:
        group = "row" if self.group_size is None else f"g{self.group_size}"
        scales = "" if self.scale_bits is None else f"-s{self.scale_bits}"
        return f"int{self.bits}-{group}-{'sym' if self.symmetric else 'asym'}{scales}"

    @classmethod
    def parse(cls, text: str) -> Grid:
        """The grid that `str` writes: 'int4-g64-asym', 'int8-row-sym', 'int3-g32-asym-s6'.

        Raises:
            UsageError: anything else.
        """
        match = _GRID.fullmatch(text)
        if match is None:
            raise UsageError(f"a grid is written like int4-g64-asym, int8-row-sym or int3-g32-asym-s6, not {text!r}")
        bits, group, symmetry, scales = match.groups()
        size = None if group == "row" else int(group[1:])
        return cls(int(bits), size, symmetry == "sym", None if scales is None else int(scales))


@dataclass(frozen=True)
class Sparsity:
    """Which share of the matrices inside the blocks is zero, and among which weights that share is counted.

    Args:
        share: 0 to below 1. A number of zeros that is not whole is rounded, half up.
        scope: 'layer' (each matrix), 'row' (each row of each matrix), 'global' (all matrices together), or N:M such as
            2:4 (of every M consecutive columns N are kept; the share is then 1 - N/M).
        counts: for 'global', (full tensor name, zeros) of every matrix: how they share the zeros depends on the
            weights, so it is found before.

    Raises:
        UsageError: a value outside these.
    """

    share: float
    scope: str = "layer"
    counts: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.share, int | float) and 0 <= self.share < 1):
            raise UsageError(f"sparsity is a share from 0 to below 1, not {self.share}")
        if self.scope not in SCOPES and self.pattern is None:
            raise UsageError(f"scope is {', '.join(SCOPES)} or N:M such as 2:4, not {self.scope!r}")
        if self.pattern is not None and self.share != _share(*self.pattern):
            raise UsageError(
                f"{self.scope} is a sparsity of {_share(*self.pattern):g}, not {self.share:g}: leave the sparsity out"
            )
        if self.counts and self.scope != "global":
            raise UsageError(f"zeros are counted out for the scope global, not for {self.scope}")

    @classmethod
    def of(cls, share: float | None, scope: str, counts: tuple[tuple[str, int], ...] = ()) -> Sparsity:
        """With the share that N:M implies, or a half, where none is given."""
        pattern = _pattern(scope)
        if share is None:
            share = 0.5 if pattern is None else _share(*pattern)
        return cls(share, scope, counts)

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M) of N:M; None for another scope."""
        return _pattern(self.scope)

    def covers(self, tensor: TensorSpec) -> bool:
        """Whether zeros are asked of a tensor: of the matrices inside the blocks, not of embedding and head."""
        return tensor.kind == "linear" and len(tensor.shape) == 2

    def num_zeros(self, tensor: TensorSpec) -> int:
        """Zeros of one tensor, exactly.

        Raises:
            UsageError: M divides no row, or the tensor's share of a global count is not known.
        """
        if not self.covers(tensor):
            return 0
        rows, cols = tensor.shape
        if self.scope == "global":
            if tensor.name not in self._counts:
                raise UsageError(f"how many zeros {tensor.name} takes of a global share has not been counted")
            return self._counts[tensor.name]
        if self.pattern is not None:
            keep, group = self.pattern
            if cols % group:
                raise UsageError(
                    f"{self.scope} does not divide a row of {cols} ({tensor.name}): choose an M that divides {cols}"
                )
            return rows * (cols // group) * (group - keep)
        if self.scope == "row":
            return rows * _rounded(self.share * cols)
        return _rounded(self.share * tensor.numel)

    @cached_property
    def _counts(self) -> Mapping[str, int]:
        return dict(self.counts)

    def __str__(self) -> str:
        return self.scope if self.pattern is not None else f"{100 * self.share:g}%-{self.scope}"


SCOPES = ("layer", "row", "global")
"""What a share of zeros may be counted in, beside N:M."""


def _pattern(scope: object) -> tuple[int, int] | None:
    match = _N_OF_M.fullmatch(scope) if isinstance(scope, str) else None
    if match is None:
        return None
    keep, group = int(match[1]), int(match[2])
    return (keep, group) if 0 < keep < group else None


def _share(keep: int, group: int) -> float:
    return 1 - keep / group


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


_N_OF_M = re.compile(r"(\d{1,4}):(\d{1,4})")


def _is_count(value: object) -> bool:
    """An integer and no truth value: recipes and --option hold whatever a user wrote."""
    return isinstance(value, int) and not isinstance(value, bool)


_GRID = re.compile(r"int(\d)-(row|g\d{1,9})-(sym|asym)(?:-s(\d))?")


@dataclass(frozen=True)
class Precision:
    """How every weight of a model is stored.

    Args:
        dtype: of all tensors that are left alone, and of scales; also the compute dtype.
        linear: grid of the matrices inside the blocks; None leaves them in `dtype`.
        embedding: grid of the input embedding and the LM head; None leaves them in `dtype`.
        tensors: (full tensor name, grid) of those that differ from the rest of their kind.
        sparse: which weights are stored as a bitmask and the values that are not zero; None stores zeros like others.
    """

    dtype: str = "bfloat16"
    linear: Grid | None = None
    embedding: Grid | None = None
    tensors: tuple[tuple[str, Grid | None], ...] = ()
    sparse: Sparsity | None = None

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, not {self.dtype!r}")
        assert self.sparse is None or not self.grids, "a bitmask holds floats"

    @classmethod
    def of(cls, dtype: str, grids: Mapping[str, Grid | None], tensors: Iterable[TensorSpec]) -> Precision:
        """The shortest precision that gives every tensor its grid: the most common ones stand for their kinds.

        Args:
            grids: by full tensor name; one that is missing is left alone.
            tensors: of the model.
        """
        matrices = [tensor for tensor in tensors if tensor.kind != "other"]
        counts: dict[bool, Counter[Grid | None]] = {True: Counter(), False: Counter()}
        for tensor in matrices:
            counts[tensor.is_end][grids.get(tensor.name)] += tensor.numel
        ends, inner = (counts[is_end].most_common(1)[0][0] if counts[is_end] else None for is_end in (True, False))
        others = {t.name: grids.get(t.name) for t in matrices if grids.get(t.name) != (ends if t.is_end else inner)}
        return cls(dtype, inner, ends, tuple(sorted(others.items())))

    @cached_property
    def _single(self) -> Mapping[str, Grid | None]:
        return dict(self.tensors)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Every grid that is used, without repetition."""
        named = [self.linear, self.embedding, *(grid for _, grid in self.tensors)]
        return tuple(dict.fromkeys(grid for grid in named if grid is not None))

    @property
    def is_own(self) -> bool:
        """Whether anything is stored other than as one float tensor."""
        return bool(self.grids) or self.sparse is not None

    def is_masked(self, tensor: TensorSpec) -> bool:
        """Whether a tensor is stored as a bitmask and values."""
        return self.sparse is not None and self.sparse.covers(tensor)

    def grid_of(self, tensor: TensorSpec) -> Grid | None:
        """The grid that a tensor is stored on, or None where it stays in `dtype`."""
        if tensor.name in self._single:
            return self._single[tensor.name]
        if tensor.kind == "other":
            return None
        return self.embedding if tensor.is_end else self.linear

    def __str__(self) -> str:
        if self.sparse is not None:
            return f"{self.dtype}-bitmask-{self.sparse}"
        if not self.grids:
            return self.dtype
        embedding = f"+embed-{self.embedding}" if self.embedding else ""
        others = f"+{len(self.tensors)} others" if self.tensors else ""
        return f"{self.linear or self.dtype}{embedding}{others}"


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model as its config and headers describe it; no weights.

    `num_kv_heads * head_dim * 2` elements are cached per token and layer, unless `kv_lora_rank` is set: then the
    cache of multi-head latent attention holds `kv_lora_rank + qk_rope_head_dim` elements (DeepSeek-V2,
    arXiv 2405.04434, section 2.1).
    """

    name: str
    architecture: str
    model_type: str
    dtype: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    is_tied: bool
    tensors: tuple[TensorSpec, ...]
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    sliding_window: int | None = None
    num_sliding_layers: int = 0
    """Layers that attend to the last `sliding_window` tokens only."""
    num_experts: int | None = None
    experts_per_token: int | None = None
    """Routed experts in a mixture layer, and how many of them one token uses."""
    stored: Precision | None = None
    """The precision that the checkpoint is already stored in, where it is quantized; None for a dense one.
    `tensors` always lists the logical, dense tensors."""

    @property
    def num_params(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(t.numel for t in self.tensors)

    @property
    def quantizable(self) -> tuple[TensorSpec, ...]:
        """The matrices inside the blocks, which quantizers change by default."""
        return tuple(t for t in self.tensors if t.kind in ("linear", "expert"))


@dataclass(frozen=True)
class Budget:
    """What a user can afford, in the user's units. None means 'not limited'.

    Args:
        memory_bytes: what the model may add to the process: weights, KV cache, activations.
        context: tokens per user, prompt and answer together.
        users: sequences held at the same time.
        min_tps: decode tokens per second that one user must see.
        max_loss_pct: allowed rise of perplexity over the original, in percent.
    """

    memory_bytes: int | None = None
    context: int = 1024
    users: int = 1
    min_tps: float | None = None
    max_loss_pct: float | None = None

    def __post_init__(self) -> None:
        if self.context < 1 or self.users < 1:
            raise UsageError(f"context and users must be at least 1, not {self.context} and {self.users}")


@dataclass(frozen=True)
class KernelRate:
    """What a machine does with weights of one storage format, found by a probe on random weights.

    A decode step over L layers that reads B bytes of weights is predicted to take
    `L * layer_overhead_s + B / bytes_per_s`, and a prefill of T tokens with P matrix parameters
    `L * layer_overhead_s + 2 * P * T / flops_per_s`.
    """

    bytes_per_s: float
    layer_overhead_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Hardware:
    """One machine. `rates` is keyed by kernel name: float32, bfloat16, float16, int8, int4.

    `flops_per_s` is of a float32 matrix product, where no kernel has a rate of its own.
    """

    cpu: str
    cores: int
    threads: int
    ram_bytes: int
    bandwidth_bytes_per_s: float | None = None
    rates: Mapping[str, KernelRate] = field(default_factory=dict)
    flops_per_s: float | None = None


_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmgt]?)(i?)b\s*", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes from '120MB' (10^6), '1GiB' (2^30), '1.5 GB' or '512B'.

    Raises:
        UsageError: no unit, an unknown unit, or nothing at all.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"a size is a number with a unit such as 120MB or 1GiB, not {text!r}")
    number, prefix, binary = match.groups()
    if binary and not prefix:
        raise UsageError(f"a size is a number with a unit such as 120MB or 1GiB, not {text!r}")
    size = int(float(number) * (1024 if binary else 1000) ** _POWER[prefix.lower()])
    if size < 1:
        raise UsageError(f"a size must be positive, not {text!r}")
    return size


def format_size(num_bytes: float) -> str:
    """Decimal units, as `parse_size` reads them back: 98.4 MB, 1.35 GB."""
    if abs(num_bytes) < 1000:
        return f"{num_bytes:.0f} B"
    value, unit = float(num_bytes), "B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        value /= 1000
        if abs(value) < 999.5:
            break
    return f"{value:.3g} {unit}" if abs(value) < 100 else f"{value:.0f} {unit}"
