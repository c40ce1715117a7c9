"""What a KV cache saves in a model that keeps a GPU busy: Llama-2-7b's shape with random weights.

    python benchmarks/kv_cache_gpu.py [--small] [--ledger evidence/kv-cache-cuda-7b.jsonl]

Seconds for the token behind so many others, with the cache and without, as `packlight lab kv-cache` measures them. A
small model does not show it: there a token takes as long as the launching of its kernels, with a cache or without.
`--small`, the default without a GPU, takes two narrow layers. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from memory_table import CONFIGS, DTYPE, SMALL, random_model

from packlight import evidence
from packlight.checkpoint.config import spec_from_config
from packlight.lab.kv_cache import CUDA_REPEATS, times

MODEL = "Llama-2-7b"
LENGTHS = (32, 256, 1024, 4000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", default=not torch.cuda.is_available())
    parser.add_argument("--ledger", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = {key: SMALL.get(key, value) if given.small else value for key, value in CONFIGS[MODEL].items()}
    model = random_model(config, spec_from_config({**config, "dtype": DTYPE}, MODEL), None, device)
    table = {}
    for length in LENGTHS[: 2 if given.small else None]:
        rows = evidence.stamped(times(model, length, CUDA_REPEATS))
        if given.ledger:
            evidence.append(given.ledger, rows)
        cached, uncached = (row.value for row in rows)
        print(f"{length} tokens: {cached:.4f} s with the cache, {uncached:.4f} s without")
        table[length] = {row.name: row.value for row in rows}
    print(json.dumps({"device": evidence.environment().get("gpu", "cpu"), "small": given.small, "table": table}))


if __name__ == "__main__":
    main()
