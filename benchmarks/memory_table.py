"""Planned against measured memory of the sizes that are quoted everywhere: on a GPU, or small on a CPU.

    python benchmarks/memory_table.py [--small] [--only NAME ...] [--ledger evidence/memory-table.jsonl]

Each model is built from the numbers of its published config with random weights, matrix by matrix on the device, in
bfloat16 or in bitsandbytes' LLM.int8() and NF4, so that making it never takes much more than having it. Nothing is read
from disk. Two peaks are measured, each after `flush`: with the weights loaded, and while a prompt of 96 tokens is read
and 32 are answered through packlight's loop with a static KV cache of just that size. Both stand beside the plan that
`packlight.plan.gpu` makes of the config alone. A row that the free memory does not hold is planned and not measured.

`--small`, the default without a GPU, shrinks every config to two narrow layers: it runs the same code in seconds, and
its numbers mean nothing (on a CPU the process is measured, interpreter and all). The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from packlight import evidence
from packlight.checkpoint.config import spec_from_config
from packlight.evidence import Measurement
from packlight.measure.memory import current_bytes, flush, peak_bytes
from packlight.plan.gpu import gpu_bytes
from packlight.plan.memory import MemoryPlan
from packlight.runtime.bitsandbytes import loader_config, state_bytes
from packlight.runtime.generate import generate
from packlight.runtime.load import fill_buffers_, put_
from packlight.runtime.model_decoder import CachedDecoder
from packlight.runtime.sampling import Sampling
from packlight.spec import Budget, ModelSpec

DTYPE = "bfloat16"
PROMPT_TOKENS, NEW_TOKENS = 96, 32
SPREAD = 0.01
"""Standard deviation of the matrices: next to nothing that enters one is then above 6, beyond which LLM.int8() takes
whole columns out of the codes. Trained models have few such columns (arXiv 2208.07339), random ones of a larger spread
nearly all."""
RESERVE_BYTES = 3 * 2**29
"""Of the device's free memory: what its context and libraries take while a model runs."""

_LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "StarCoder (OctoCoder)": {  # huggingface.co/bigcode/octocoder, config.json
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        "vocab_size": 49152,
        "n_embd": 6144,
        "n_inner": 24576,
        "n_layer": 40,
        "n_head": 48,
        "n_positions": 8192,
        "multi_query": True,
        "activation_function": "gelu",
    },
    "MPT-30b": {  # huggingface.co/mosaicml/mpt-30b, config.json
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "vocab_size": 50432,
        "d_model": 7168,
        "n_heads": 64,
        "n_layers": 48,
        "expansion_ratio": 4,
        "max_seq_len": 8192,
        "no_bias": True,
        "attn_config": {"alibi": True},
    },
    "Falcon-40b": {  # huggingface.co/tiiuae/falcon-40b, config.json
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": 65024,
        "hidden_size": 8192,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
    },
    "Llama-2-7b": {  # huggingface.co/meta-llama/Llama-2-7b-hf, config.json
        **_LLAMA2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama-2-13b": {  # huggingface.co/meta-llama/Llama-2-13b-hf, config.json
        **_LLAMA2,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "Llama-2-70b": {  # huggingface.co/meta-llama/Llama-2-70b-hf, config.json
        **_LLAMA2,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
SMALL: Mapping[str, int] = {
    "vocab_size": 512,
    **dict.fromkeys(("n_embd", "d_model", "hidden_size"), 256),
    **dict.fromkeys(("n_inner", "intermediate_size"), 512),
    **dict.fromkeys(("n_layer", "n_layers", "num_hidden_layers"), 2),
    **dict.fromkeys(("n_head", "n_heads", "num_attention_heads"), 4),
    **dict.fromkeys(("num_kv_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_positions", "max_position_embeddings", "max_seq_len"), 256),
}
"""What a field becomes with `--small`, where the config has it."""


@dataclass(frozen=True)
class Case:
    """One line of the table: a model, and how it is loaded."""

    model: str
    loader: str | None = None

    @property
    def subject(self) -> str:
        """How the ledger names it."""
        return f"{self.model}, {DTYPE if self.loader is None else self.loader}"


BOTH = ("bnb-int8", "bnb-nf4")
CASES = (
    Case("Llama-2-7b"),
    Case("Llama-2-13b"),
    *(Case("StarCoder (OctoCoder)", loader) for loader in (None, *BOTH)),
    *(Case("MPT-30b", loader) for loader in (None, *BOTH)),
    *(Case("Llama-2-70b", loader) for loader in BOTH),
    Case("Falcon-40b"),  # its linears are a class of their own, which transformers does not quantize
    Case("Llama-2-70b"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", default=not torch.cuda.is_available())
    parser.add_argument("--only", nargs="*", help="Words that a line's name must begin with, for instance Llama-2-70b.")
    parser.add_argument("--ledger", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [case for case in CASES if not given.only or case.subject.startswith(tuple(given.only))]
    table: dict[str, dict[str, object]] = {}
    torch.zeros(1, device=device)  # the device's context is no model's
    for case in cases:
        if device == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # else the first line pays for what all of them use
        rows = evidence.stamped(measured(case, given.small, device))
        if given.ledger:
            evidence.append(given.ledger, rows)
        for row in rows:
            print(f"{row.subject:36} {row.name:18} {_gb(row.value)} GB, planned {_gb(row.predicted)} GB  {row.note}")
        table[case.subject] = {row.name: {"measured": row.value, "planned": row.predicted} for row in rows}
    print(json.dumps({"device": evidence.environment().get("gpu", "cpu"), "small": given.small, "table": table}))


def measured(case: Case, is_small: bool, device: str) -> list[Measurement]:
    """Both peaks of one line, beside the plan; on a CPU above the process as it was."""
    config = {key: SMALL.get(key, value) if is_small else value for key, value in CONFIGS[case.model].items()}
    spec = spec_from_config({**config, "dtype": DTYPE}, case.model)
    plan = gpu_bytes(spec, DTYPE, Budget(context=PROMPT_TOKENS + NEW_TOKENS), case.loader)
    flush(device)
    if device == "cuda" and plan.total + RESERVE_BYTES > (free := torch.cuda.mem_get_info()[0]):
        note = f"not measured: {free / 1e9:.1f} GB were free"
        return _rows(case, (None, None), (plan.weights, plan.total), (note, note))
    try:
        return _measured(case, config, spec, plan, device)
    except torch.OutOfMemoryError:
        note = "not measured: the memory that was free did not hold it"
        return _rows(case, (None, None), (plan.weights, plan.total), (note, note))


def _measured(
    case: Case, config: Mapping[str, Any], spec: ModelSpec, plan: MemoryPlan, device: str
) -> list[Measurement]:
    base, start = current_bytes(device), time.perf_counter()
    model = random_model(config, spec, case.loader, device)
    flush(device)
    loaded, held = peak_bytes(device) - base, state_bytes(model)
    made_s, start = time.perf_counter() - start, time.perf_counter()
    tokens = answer(model)
    run_s = time.perf_counter() - start
    peak = peak_bytes(device) - base
    notes = (
        f"weights alone: {spec.num_params:,} parameters, tensors of {held:,} bytes; made in {made_s:.1f} s",
        f"{PROMPT_TOKENS} tokens of prompt and {tokens} of answer in {run_s:.1f} s",
    )
    return _rows(case, (loaded, peak), (plan.weights, plan.total), notes)


def random_model(config: Mapping[str, Any], spec: ModelSpec, loader: str | None, device: str) -> PreTrainedModel:
    """The model of a config, as its loader would have it: matrices normal, norms 1, biases 0."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=getattr(torch, DTYPE)
        )
    if loader is not None:
        AutoHfQuantizer.from_config(loader_config(loader, DTYPE)).preprocess_model(model=model, device_map={"": device})
    generator = torch.Generator(device).manual_seed(0)
    for tensor in spec.tensors:
        values = torch.empty(tensor.shape, dtype=getattr(torch, DTYPE), device=device)
        if len(tensor.shape) == 1:
            values.fill_(0 if tensor.name.endswith("bias") else 1)
        else:
            values.normal_(0, SPREAD, generator=generator)
        put_(model, tensor.name, values)
        del values
        _quantize_(model, tensor.name, loader)
    model.tie_weights()
    fill_buffers_(model)
    model.to(device)
    model.eval()
    return model


def answer(model: PreTrainedModel) -> int:
    """A prompt of random tokens, and greedily on; returns the number of tokens made."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(0, vocab, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    decoder = CachedDecoder(model, PROMPT_TOKENS + NEW_TOKENS)
    return sum(1 for _ in generate(decoder, [prompt], Sampling(max_tokens=NEW_TOKENS)))


def _quantize_(model: PreTrainedModel, name: str, loader: str | None) -> None:
    """Replace a matrix that has just been put in place by its codes, where its module is one of bitsandbytes'."""
    module: Any = model.get_submodule(name.rpartition(".")[0])
    if loader is None or not name.endswith(".weight") or "bitsandbytes" not in type(module).__module__:
        return
    import bitsandbytes

    dense = module.weight.data
    if loader == "bnb-nf4":
        # 64 weights a scale is the default on CUDA as on a CPU
        packed = bitsandbytes.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", compress_statistics=False)
        module.weight = packed.to(dense.device)
        return
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(dense.to(torch.float16))
    module.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)


def _rows(
    case: Case,
    values: tuple[int | None, int | None],
    planned: tuple[int, int],
    notes: tuple[str, str],
) -> list[Measurement]:
    names = ("weights_bytes", "generation_bytes")
    return [
        Measurement(name, value, "bytes", case.subject, predicted=claim, note=note)
        for name, value, claim, note in zip(names, values, planned, notes, strict=True)
    ]


def _gb(value: object) -> str:
    return f"{value / 1e9:8.3f}" if isinstance(value, int) else "       –"


if __name__ == "__main__":
    main()
