"""llama.cpp, through the C library and the struct layouts that the package llama-cpp-python builds and declares.

The original's GGUF file is rewritten with every tensor in float32; llama.cpp quantizes that file into each format and
runs it. Its logits include what its kernels do: they quantize activations to 8 bits. The key-value cache is kept in
float32 and flash attention off, so that nothing but the format differs from the original. The first row, F32, shows
how far the harness itself is from the original in torch.

A format with `+weights` after its name is de-quantized to float32 again before it runs, which leaves the error of its
weights alone. One with `+imatrix` is made with an importance matrix from calibration windows: the mean squared input
of every linear in the blocks, as llama-imatrix collects it. Both may follow one name.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
from benchmarks.peers.common import (
    Recipe,
    Reference,
    Row,
    Subject,
    Window,
    block_linears,
    chosen,
    measure_all,
    parser,
    read_windows,
    start,
    write,
)
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    dequantize,
    get_tensor_name_map,
)

PEER = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"
FORMATS = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_M", "Q6_K", "Q8_0"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "Q4_1"),
)
IMATRIX_FORMATS = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_M", "IQ2_XXS"),
)
_IMATRIX, _WEIGHTS = "imatrix", "weights"

# Of ggml.h and llama.h; the package declares them under changing names or not at all.
_GGML_TYPE_F32 = 0
_FLASH_ATTENTION_OFF = 0
_LOG_LEVELS_KEPT = (3, 4)  # warnings and errors

Importance = Mapping[str, npt.NDArray[np.float32]]


def measure(
    reference: Reference,
    gguf: Path,
    formats: Sequence[str] = FORMATS,
    calibration: Sequence[Window] | None = None,
    threads: int = 1,
) -> Iterator[Row]:
    """F32 first, then the formats.

    Args:
        gguf: the file that the original was converted from.
        formats: names such as `Q2_K`, `Q2_K+weights` or `Q2_K+imatrix`.
        calibration: windows for the importance matrices, which no format needs that is not named so.
    """
    llama_cpp.llama_log_set(_listen, None)
    llama_cpp.llama_backend_init()
    importance = collect_importance(reference, calibration) if calibration else None
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "F32.gguf"
        write_float32(gguf, source)
        recipes: dict[str, Recipe] = {"F32": partial(_open, source, reference, threads, "checks the harness")}
        target = Path(directory) / "quantized.gguf"
        for name in formats:
            recipes[name] = partial(_quantize, source, target, name, importance, reference, threads)
        yield from measure_all(reference, PEER, recipes)


def write_float32(source: Path, target: Path) -> None:
    """Copy a GGUF file with all metadata, but every tensor de-quantized to float32."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        items = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=items)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.inference_mode()
def collect_importance(reference: Reference, calibration: Sequence[Window]) -> Importance:
    """Mean squared input of every linear in the blocks, by the name of its tensor in a GGUF file."""
    model = reference.model
    architecture = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == model.config.model_type)
    assert architecture == MODEL_ARCH.LLAMA, "other architectures may lay out their linears differently"
    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    sums: dict[str, torch.Tensor] = {}

    def listen(name: str, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        squares = inputs[0][0].square().sum(dim=0)  # (in_features,)
        sums[name] = sums[name] + squares if name in sums else squares

    handles = []
    for name, linear in block_linears(model).items():
        tensor = f"{names.get_name(f'model.{name}')}.weight"
        handles.append(linear.register_forward_pre_hook(partial(listen, tensor)))
    for window in calibration:
        model.base_model(torch.tensor([list(window)]), use_cache=False)
    for handle in handles:
        handle.remove()
    count = sum(len(window) for window in calibration)
    return {name: (total / count).numpy() for name, total in sums.items()}


def _quantize(
    source: Path, target: Path, name: str, importance: Importance | None, reference: Reference, threads: int
) -> Subject:
    """Quantize `source` into `target` and open that.

    Raises:
        RuntimeError: llama.cpp refuses, with what it said last.
    """
    kind, *extras = name.split("+")
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if _IMATRIX in extras:
        if importance is None:
            raise ValueError("an importance matrix needs calibration windows")
        params.imatrix = _as_struct(importance)
    target.unlink(missing_ok=True)  # the model before may still be mapped from this path
    _said.clear()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError("llama_model_quantize: " + _reason())
    own = "the grid that the original itself was stored in; " if kind == "Q4_1" else ""
    note, size = own + _types(target), target.stat().st_size
    if _WEIGHTS in extras:
        dequantized = target.with_name("dequantized.gguf")
        dequantized.unlink(missing_ok=True)
        write_float32(target, dequantized)
        return replace(_open(dequantized, reference, threads, note), bytes=size)
    return _open(target, reference, threads, note)


def _as_struct(importance: Importance) -> Any:
    """The array of llama_model_imatrix_data, ended by an entry without a name, that the parameters point to."""
    array = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(array, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return array


def _types(file: Path) -> str:
    """How many of the weights llama.cpp gave to each type, for a format is a mixture: `Q4_0 71%, Q8_0 21%`.

    A row that is no multiple of 256 wide cannot take a K-quant, and gets a simpler and larger type instead.
    """
    counts: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        counts[GGMLQuantizationType(tensor.tensor_type).name] += int(tensor.n_elements)
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in counts.most_common() if count / total > 0.005)


def _open(file: Path, reference: Reference, threads: int, note: str) -> Subject:
    """A file in a context as long as the longest window. Freed with the subject."""
    run = _Run(file, max(len(window) for window in reference.windows), threads)
    return Subject(run.logits, file.stat().st_size, note)


class _Run:
    """A loaded model and its context."""

    def __init__(self, file: Path, context: int, threads: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama_model_load_from_file: " + _reason())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = _FLASH_ATTENTION_OFF
        params.type_k = params.type_v = _GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama_init_from_model: " + _reason())
        self._vocab: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)

    def logits(self, window: Window) -> torch.Tensor:
        """(n - 1, vocab) float32; valid until the next call, since it is llama.cpp's own buffer."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._batch.n_tokens = len(window)
        for place, token in enumerate(window):
            self._batch.token[place] = token
            self._batch.pos[place] = place
            self._batch.n_seq_id[place] = 1
            self._batch.seq_id[place][0] = 0
            self._batch.logits[place] = place < len(window) - 1
        if code := llama_cpp.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {code}: " + _reason())
        shape = (len(window) - 1, self._vocab)
        return torch.from_numpy(np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape))

    def __del__(self) -> None:
        if hasattr(self, "_batch"):
            llama_cpp.llama_batch_free(self._batch)
        if getattr(self, "_context", None):
            llama_cpp.llama_free(self._context)
        if getattr(self, "_model", None):
            llama_cpp.llama_model_free(self._model)


def _reason() -> str:
    """What llama.cpp said last, for its functions return no more than that they failed."""
    return _said[-1] if _said else "it gave no reason"


_said: list[str] = []


@llama_cpp.llama_log_callback
def _listen(level: int, text: bytes, _: Any) -> None:
    """Keep warnings and errors for the notes on what failed, and print nothing."""
    if level in _LOG_LEVELS_KEPT:
        _said.append(text.decode(errors="replace").strip())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--gguf", type=Path, required=True, help="the GGUF file that the original was converted from")
    options.add_argument("--calibration", type=Path, help="JSON, a list of lists of token ids, for importance matrices")
    given = options.parse_args()
    calibration = read_windows(given.calibration) if given.calibration else None
    names = FORMATS if calibration is None else (*FORMATS, *(f"{name}+{_IMATRIX}" for name in IMATRIX_FORMATS))
    write(measure(start(given), given.gguf, chosen(given, names), calibration, given.threads), given.out)


if __name__ == "__main__":
    main()
