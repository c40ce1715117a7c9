"""How sparse a vector is: one number for how unequal its magnitudes are, and what that says about pruning it.

Every function takes a tensor of a float dtype and looks at its last axis, shape (..., d) -> (...); flatten a matrix to
look at it as a whole. Results are float64 whatever came in. Magnitudes are divided by their largest before they are
raised to a power, and means of powers are kept as logarithms, so that neither scale nor order overflows; powers are
taken in parts, so that a float64 copy of a large tensor is never made. A vector of zeros has equal magnitudes like any
other constant one, and is measured as such.

With M_r = (mean |w_i|^r)^(1/r) the power mean, everything but Gini is a function of one quotient M_p / M_q, p < q.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from packlight.errors import UsageError

PART_ELEMENTS = 1 << 22
"""How many elements are in float64 at once."""


def pq_index(w: torch.Tensor, p: float = 0.5, q: float = 1.0) -> torch.Tensor:
    """PQ Index, 1 - d^(1/q - 1/p) ||w||_p / ||w||_q = 1 - M_p / M_q (Diao et al., arXiv 2302.05601).

    0 where all magnitudes are equal, up to 1 - d^(1/q - 1/p) where one alone is not zero; larger is sparser.

    Limit: the six properties of a measure of sparsity hold for p <= 1 <= q. With both orders on one side of 1, moving
    weight from a large entry to a small one can raise the index.

    Raises:
        UsageError: not 0 < p < q, an empty vector, or an infinity or NaN in it.
    """
    return (-torch.expm1(_log_quotient(w, p, q))).clamp_min(0.0)


def hoyer(w: torch.Tensor) -> torch.Tensor:
    """(sqrt(d) - ||w||_1 / ||w||_2) / (sqrt(d) - 1) (Hoyer, JMLR 5, 2004).

    0 where all magnitudes are equal, 1 where one alone is not zero; larger is sparser. For d = 1, where the formula is
    0 / 0, it is 0, as the other measures have it.

    Limit: a vector beside its own copy is called less sparse than the vector (no Cloning), so layers of different sizes
    cannot be compared by it; for large d it nears the PQ Index of p = 1, q = 2, whose multiple it is.

    Raises:
        UsageError: an empty vector, or an infinity or NaN in it.
    """
    index, root = pq_index(w, 1.0, 2.0), math.sqrt(w.shape[-1])
    return index if root == 1.0 else index * (root / (root - 1.0))


def gini(w: torch.Tensor) -> torch.Tensor:
    """sum_k (2k - d - 1) c_k / (d sum_k c_k), c the magnitudes in ascending order, k = 1..d.

    The same as 1 - 2 sum_k c_k / ||w||_1 (d - k + 1/2) / d of Hurley & Rickard (arXiv 0811.4706), and exactly 0 where
    all magnitudes are equal; up to 1 - 1/d where one alone is not zero; larger is sparser.

    Limit: needs the magnitudes sorted, and knows their order but not how a tail decays, so that no bound on what
    pruning leaves follows from it.

    Raises:
        UsageError: an empty vector, or an infinity or NaN in it.
    """
    top, d = _largest(w), w.shape[-1]
    moment = total = torch.zeros_like(top)
    place = 1 - d  # 2k - d - 1 of the first
    for part in _parts(_ascending(w)):
        size = part.shape[-1]
        weights = torch.arange(place, place + 2 * size, 2, dtype=torch.float64, device=w.device)
        scaled = part.double() / _divisor(top)[..., None]
        moment, total = moment + scaled @ weights, total + scaled.sum(-1)
        place += 2 * size
    return torch.where(top > 0, moment / (d * total), 0.0).clamp_min(0.0)


def soft_sparsity(w: torch.Tensor, q: float = 0.5) -> torch.Tensor:
    """||w||_q / ||w||_1 for 0 < q < 1: how many entries carry the vector, to the power 1/q - 1.

    The index behind the pruning bounds for l_q balls (Yang et al., arXiv 2206.05604). 1 where one entry alone is not
    zero, up to d^(1/q - 1) where all magnitudes are equal: smaller is sparser.

    Limit: it counts entries and not their share: a copy of the vector beside it raises it (no Cloning), a zero leaves
    it as it was (no Babies). It is d^(1/q - 1) (1 - PQ Index of q, 1).

    Raises:
        UsageError: not 0 < q < 1, an empty vector, or an infinity or NaN in it.
    """
    return torch.exp(_log_quotient(w, q, 1.0) + (1 / q - 1) * math.log(w.shape[-1]))


def least_kept(w: torch.Tensor, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> torch.Tensor:
    """How many weights must stay, at least: d (1 + eta)^(-q/(q-p)) (1 - I)^(pq/(q-p)), I the PQ Index.

    Whoever keeps the r largest magnitudes, so that the |w_i|^p of the others add up to at most eta times theirs, keeps
    r >= this many (Diao et al., arXiv 2302.05601, theorem 2). Not rounded; the index alone is known, not the tail.

    Limit: a lower bound: r is often larger. And with eta = 0, which pruners use it with, it counts the weights that
    would carry the vector if they were all equal.

    Raises:
        UsageError: as `pq_index`, or a negative eta.
    """
    if not (eta >= 0 and math.isfinite(eta)):
        raise UsageError(f"eta is what may be lost over what stays, a number from 0 on, not {eta}")
    log_share = (p * q * _log_quotient(w, p, q) - q * math.log1p(eta)) / (q - p)
    return w.shape[-1] * torch.exp(log_share)


def enough_kept(w: torch.Tensor, q: float = 0.5, error: float = 0.1) -> torch.Tensor:
    """How many of the largest weights are enough to keep: min(d, (S / error)^(q/(1-q))), S the soft sparsity.

    The magnitudes of the others then add up to at most `error` times ||w||_1 (Stechkin's inequality; the use is that of
    Yang et al., arXiv 2206.05604). With the same factor d (1 - PQ Index of q, 1)^(q/(1-q)) as `least_kept`, from above.

    Limit: enough, not needed: `num_needed` with p = 1 counts, and is at most this.

    Raises:
        UsageError: as `soft_sparsity`, or an error outside 0..1.
    """
    if not 0 < error < 1:
        raise UsageError(f"a relative error lies between 0 and 1, not at {error}")
    return ((soft_sparsity(w, q) / error) ** (q / (1 - q))).clamp_max(float(w.shape[-1]))


def num_needed(w: torch.Tensor, lost: float, p: float = 2.0) -> torch.Tensor:
    """How many of the largest magnitudes it takes, so that the others hold at most `lost` of sum |w_i|^p; int64.

    With p = 2 `lost` is the share of the energy, the square of the relative error in the Frobenius norm. At least 1.

    Limit: counts at the weights alone, whatever the inputs that they meet.

    Raises:
        UsageError: `lost` outside 0 <= lost < 1, p not positive, an empty vector, or an infinity or NaN in it.
    """
    _check_order(p)
    if not 0 <= lost < 1:
        raise UsageError(f"a share that may be lost lies from 0 up to 1, not at {lost}")
    top = _largest(w)
    rising = _ascending(w)
    allowed = lost * _power_sum(rising, top, p)
    removed = torch.zeros_like(top, dtype=torch.int64)
    carried = torch.zeros_like(top)
    for part in _parts(rising):
        lost_so_far = carried[..., None] + _powers(part, top, p).cumsum(-1)
        removed += (lost_so_far <= allowed[..., None]).sum(-1)
        carried = lost_so_far[..., -1]
    return (w.shape[-1] - removed).clamp_min(1)


def tail_ratio(w: torch.Tensor, kept: int, p: float) -> torch.Tensor:
    """sum |w_i|^p of what is left when the `kept` largest are taken away, over theirs: the eta of `least_kept`.

    From 0 up to d / kept - 1; 0 for a vector of zeros.

    Raises:
        UsageError: `kept` outside 1..d, p not positive, an empty vector, or an infinity or NaN in it.
    """
    _check_order(p)
    top, d = _largest(w), w.shape[-1]
    if not 1 <= kept <= d:
        raise UsageError(f"of {d} weights 1 to {d} can be kept, not {kept}")
    rising = _ascending(w)
    tail, head = _power_sum(rising[..., : d - kept], top, p), _power_sum(rising[..., d - kept :], top, p)
    return torch.where(top > 0, tail / head, 0.0)


def _log_quotient(w: torch.Tensor, p: float, q: float) -> torch.Tensor:
    """log(M_p / M_q), at most 0; 0 where all magnitudes are equal."""
    _check_order(p)
    _check_order(q)
    if not p < q:
        raise UsageError(f"a PQ quotient takes two orders 0 < p < q, not p = {p:g} and q = {q:g}")
    top = _largest(w)
    return _log_power_mean(w, top, p) - _log_power_mean(w, top, q)


def _log_power_mean(w: torch.Tensor, top: torch.Tensor, order: float) -> torch.Tensor:
    """log of the power mean over the largest magnitude; 0 for zeros. The mean itself underflows for small orders."""
    return torch.where(top > 0, torch.log(_power_sum(w, top, order) / w.shape[-1]) / order, 0.0)


def _power_sum(w: torch.Tensor, top: torch.Tensor, order: float) -> torch.Tensor:
    total = torch.zeros_like(top)
    for part in _parts(w):
        total += _powers(part, top, order).sum(-1)
    return total


def _powers(part: torch.Tensor, top: torch.Tensor, order: float) -> torch.Tensor:
    """(|w| / top)^order in float64, in memory of its own."""
    return part.abs().double().div_(_divisor(top)[..., None]).pow_(order)


def _largest(w: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in float64, (...). Raises UsageError for what has none."""
    if w.ndim == 0 or w.numel() == 0:
        raise UsageError(f"sparsity is measured along the last axis, which is empty in the shape {tuple(w.shape)}")
    if not w.is_floating_point():
        raise UsageError(f"sparsity is measured on floating-point tensors, not on {w.dtype}: convert it first")
    top = torch.maximum(w.amax(-1), -w.amin(-1)).double()
    if not bool(torch.isfinite(top).all()):
        raise UsageError("sparsity is measured on finite numbers, and there is an infinity or NaN among these")
    return top


def _divisor(top: torch.Tensor) -> torch.Tensor:
    return torch.where(top > 0, top, 1.0)


def _ascending(w: torch.Tensor) -> torch.Tensor:
    """Magnitudes in ascending order, in the dtype that they came in."""
    return w.abs().sort(-1).values


def _parts(w: torch.Tensor) -> Iterator[torch.Tensor]:
    """Slices of the last axis with at most about `PART_ELEMENTS` elements."""
    rows = max(1, w.numel() // max(1, w.shape[-1]))
    yield from w.split(max(1, PART_ELEMENTS // rows), dim=-1)


def _check_order(order: float) -> None:
    if not (order > 0 and math.isfinite(order)):
        raise UsageError(f"the order of a norm is a positive number, not {order}")
