"""The rule of thumb: bytes of weights from a number of parameters alone.

4 bytes a parameter in float32, 2 in bfloat16 and float16, 1 on 8 bits, half on 4 bits. It leaves out scales, the KV
cache and activations; a config gives the exact numbers (`packlight plan MODEL`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from packlight.errors import UsageError

BYTES_PER_PARAM: Mapping[str, float] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}

_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([kmbt]?)\s*", re.IGNORECASE)
_POWER = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}
_LARGEST = 10**18


def parse_params(text: str) -> int:
    """Parameters from '70e9', '7B', '1.5b', '135M' or '124000000'.

    Raises:
        UsageError: not a number of this kind, less than one, or beyond 10^18.
    """
    match = _NUMBER.fullmatch(text)
    value = math.nan if match is None else float(match.group(1)) * 10.0 ** _POWER[match.group(2).lower()]
    if not 1 <= value <= _LARGEST:
        raise UsageError(f"a number of parameters looks like 70e9, 7B or 135M, not {text!r}")
    return round(value)


def thumb_bytes(num_params: int) -> dict[str, int]:
    """Bytes of weights by dtype or bit width, in the order of `BYTES_PER_PARAM`."""
    if num_params < 1:
        raise UsageError(f"a model has at least one parameter, not {num_params}")
    return {dtype: math.ceil(num_params * size) for dtype, size in BYTES_PER_PARAM.items()}
