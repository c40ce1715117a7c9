"""Hadamard matrices, the rotations of QuaRot (Ashkboos et al., arXiv 2404.00456) and SpinQuant (arXiv 2405.16406).

A Hadamard matrix has entries +-1 and orthogonal rows; divided by sqrt(n) it is a rotation that spreads an outlier
evenly over all n columns. Kronecker products of Hadamard matrices are Hadamard matrices again, so that

    H_n = H_2^k (Sylvester)  x  H_12 x ... x H_20 x ... x H_28 ...

exists here for every n = 2^k * 12^a * 20^b * 28^c, such as 64, 288 = 2 * 12 * 12, 576 = 4 * 12 * 12, 960 = 4 * 12 * 20
and 1536 = 128 * 12. The bases are Paley's constructions ("On orthogonal matrices", 1933) over the fields of 11, 19 and
13 elements. Its limit: other orders (36, 60, 11008 = 256 * 43) are refused, whether or not a Hadamard matrix of that
order is known.
"""

from __future__ import annotations

import math

import torch

from packlight.errors import UsageError

BASES = {3: 12, 5: 20, 7: 28}
"""The order of the base matrix that brings an odd prime factor along; each uses up two factors of 2."""


def is_available(n: int) -> bool:
    """Whether `hadamard(n)` exists here."""
    return _factors(n) is not None


def hadamard(n: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix of order n, float64 (n, n), entries +-1 / sqrt(n).

    Raises:
        UsageError: n is no product of a power of two with 12, 20 and 28.
    """
    power, bases = _required_factors(n)
    made = _sylvester(power)
    for base in bases:
        made = torch.kron(made, _base(base))
    return made / math.sqrt(n)


def random_signs(n: int, seed: int) -> torch.Tensor:
    """n signs, float64 (n,), each +1 or -1; equal for equal seeds."""
    bits = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))
    return 1.0 - 2.0 * bits.double()


def randomized_hadamard(n: int, seed: int) -> torch.Tensor:
    """diag(random signs) H, float64 (n, n): orthonormal as well, and no weight is aligned with its rows by chance.

    `x @ randomized_hadamard(n, seed)` is `rotate(x * random_signs(n, seed), n)`.

    Raises:
        UsageError: as `hadamard`.
    """
    return hadamard(n) * random_signs(n, seed).unsqueeze(1)


def rotate(x: torch.Tensor, n: int, inverse: bool = False) -> torch.Tensor:
    """`x @ hadamard(n)` for each run of n columns, one Kronecker factor after the other: n (k + sum of the bases)
    operations a row instead of n^2, and no (n, n) matrix.

    Args:
        x: floating point (..., cols), cols a multiple of n: one run for a hidden state, one for each head otherwise.
        n: order of the rotation.
        inverse: multiply by the transposed matrix, which undoes the rotation.

    Returns:
        The same shape and dtype; 16-bit inputs are computed in float32 and rounded once.

    Raises:
        UsageError: as `hadamard`, and where n does not divide the columns.
    """
    power, bases = _required_factors(n)
    if x.ndim == 0 or x.shape[-1] % n:
        raise UsageError(
            f"a rotation of order {n} needs rows of a multiple of {n} columns, not a tensor {tuple(x.shape)}"
        )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.to(wide).reshape(-1, n)  # (rows, n)
    after = n
    twos = [_sylvester(2)] * (power.bit_length() - 1)
    for matrix in [*twos, *map(_base, bases)]:
        after //= len(matrix)
        values = _contract(values, matrix, after, inverse)
    return (values / math.sqrt(n)).reshape(x.shape).to(x.dtype)


def _contract(values: torch.Tensor, matrix: torch.Tensor, after: int, inverse: bool) -> torch.Tensor:
    """Multiply one Kronecker factor, which stands before `after` columns' worth of others, onto (rows, n)."""
    order = len(matrix)
    parts = values.reshape(-1, order, after)  # (rows * factors before, order, factors after)
    onto = matrix if inverse else matrix.T
    return (onto.to(values.dtype) @ parts).reshape(values.shape)


def _required_factors(n: int) -> tuple[int, list[int]]:
    found = _factors(n)
    if found is None:
        raise UsageError(
            f"there is no Hadamard matrix of order {n} here: choose a power of two times any of 12, 20 and 28"
        )
    return found


def _factors(n: int) -> tuple[int, list[int]] | None:
    """(power of two, orders of the bases) whose product is n, or None."""
    if n < 1:
        return None
    bases, rest = [], n
    for prime, order in BASES.items():
        while rest % prime == 0:
            rest //= prime
            bases.append(order)
    power, over = divmod(rest, 4 ** len(bases))
    if over or power < 1 or power & (power - 1):
        return None
    return power, bases


def _sylvester(order: int) -> torch.Tensor:
    """H_2n = [[H_n, H_n], [H_n, -H_n]], float64 (order, order), entries +-1."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < order:
        made = torch.cat([torch.cat([made, made], dim=1), torch.cat([made, -made], dim=1)])
    return made


def _base(order: int) -> torch.Tensor:
    """Paley's matrices of order 12, 20 and 28, float64, entries +-1."""
    return _paley_2(13) if order == 28 else _paley_1(order - 1)


def _paley_1(q: int) -> torch.Tensor:
    """Order q + 1 for a prime q = 3 mod 4: I + S, where the bordered Jacobsthal matrix S is skew."""
    bordered = _bordered(q)
    bordered[1:, 0] = -1
    return torch.eye(q + 1, dtype=torch.float64) + bordered


def _paley_2(q: int) -> torch.Tensor:
    """Order 2 (q + 1) for a prime q = 1 mod 4, where the bordered Jacobsthal matrix S is symmetric:
    S x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]."""
    inside = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(_bordered(q), inside) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _bordered(q: int) -> torch.Tensor:
    """[[0, 1], [1, Q]], float64 (q + 1, q + 1); Q_ij is 0 for i = j, else 1 where i - j is a square mod q, else -1."""
    squares = {value * value % q for value in range(1, q)}
    signs = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, q)], dtype=torch.float64)
    place = torch.arange(q)
    made = torch.ones(q + 1, q + 1, dtype=torch.float64)
    made[0, 0] = 0
    made[1:, 1:] = signs[(place.unsqueeze(1) - place.unsqueeze(0)) % q]
    return made
