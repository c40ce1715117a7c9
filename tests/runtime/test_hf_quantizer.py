"""packlight's own layout through plain transformers code, in fresh processes; and what importing packlight does."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.artifacts import make_artifact
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import CheckpointError, UsageError
from packlight.runtime import registration
from packlight.runtime.complete import complete
from packlight.runtime.hf_quantizer import METHOD, PacklightConfig, PacklightQuantizer
from packlight.runtime.load import load_model
from packlight.runtime.packed import PackedEmbedding, PackedLinear
from packlight.runtime.registration import WAITED_FOR
from packlight.runtime.sampling import Sampling

PROMPT = list(b"Well, Prince")
THREE_BITS: dict[str, Any] = {"bits": 3, "group_size": 32, "symmetric": False, "embeddings": 4}
DOWN = "model.layers.0.mlp.down_proj.weight"
MADE: dict[str, tuple[bool, dict[str, Any]]] = {
    "3 bits, tied": (True, THREE_BITS),
    "3 bits, untied": (False, THREE_BITS),
    "an 8-bit table that the tied head shares": (True, {**THREE_BITS, "embeddings": 8}),
    "dense embeddings, tied": (True, {**THREE_BITS, "embeddings": None}),
    "a grid of its own": (True, {**THREE_BITS, "grids": [[DOWN, "int8-row-sym"]]}),
    "one matrix left alone": (False, {**THREE_BITS, "grids": [[DOWN, None]]}),
    "quantized scales": (False, {**THREE_BITS, "scale_bits": 6}),
}

ORDERS = {
    "packlight first": "import packlight\nfrom transformers import AutoModelForCausalLM",
    "packlight last": "from transformers import AutoModelForCausalLM\nimport packlight",
    "transformers half imported": "import transformers, packlight\nfrom transformers import AutoModelForCausalLM",
}
LOAD = """
import json, sys, torch
ids = torch.tensor([json.loads(sys.argv[1])])
for directory in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                          eos_token_id=None, pad_token_id=0)
    print(json.dumps(made[0, ids.shape[1]:].tolist()))
"""
IN_FRESH_PROCESSES = ("3 bits, tied", "3 bits, untied", "a grid of its own", "quantized scales")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that does not see the repository's root."""
    done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


Artifact = Callable[[str], Path]


@pytest.fixture(scope="module")
def artifact(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """`artifact(name)`: one of MADE; copy it before changing a file."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            tied, options = MADE[name]
            made[name] = make_artifact(tiny_model_dir(tied=tied), tmp_path_factory.mktemp("own") / "out", **options)
        return made[name]

    return make


@pytest.fixture
def tied(artifact: Artifact) -> Path:
    return artifact("3 bits, tied")


def load(directory: Path | str, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **options)
    return model


# --- what is loaded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_it_is_the_model_of_packlights_own_loader(artifact: Artifact, name: str) -> None:
    directory = artifact(name)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    ours = load_model(open_checkpoint(directory))
    found, wanted = model.state_dict(), ours.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    kinds = {key: type(module) for key, module in model.named_modules()}
    assert kinds == {key: type(module) for key, module in ours.named_modules()}
    assert PackedLinear in kinds.values() and not model.training and model.is_quantized
    made = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert made[0, len(PROMPT) :].tolist() == list(complete(ours, PROMPT, Sampling(max_tokens=24)))


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_other_families(architecture_dir: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Gemma multiplies its embedding by a factor that lies in a buffer, Qwen2 has biases."""
    directory = make_artifact(architecture_dir(family), tmp_path / "out", **THREE_BITS)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(load(directory)(ids).logits, load_model(open_checkpoint(directory))(ids).logits)


def test_a_tied_head_shares_its_codes(artifact: Artifact) -> None:
    model = load(artifact("an 8-bit table that the tied head shares"))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear)
    assert head.codes.data_ptr() == embedding.codes.data_ptr()


def test_a_dense_tied_head_stays_tied(artifact: Artifact) -> None:
    model = load(artifact("dense embeddings, tied"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_model_can_be_copied_and_pickled(tied: Path) -> None:
    model = load(tied)
    ids = torch.tensor([PROMPT])
    wanted = model(ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, wanted)


def test_a_models_config_says_what_the_file_says(tied: Path, tmp_path: Path) -> None:
    load(tied).config.save_pretrained(tmp_path)
    saved, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, tied))
    assert saved["quantization_config"] == original["quantization_config"]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_plain_transformers_code_in_a_fresh_process(artifact: Artifact, order: str) -> None:
    directories = [artifact(name) for name in IN_FRESH_PROCESSES]
    done = python(order + LOAD, json.dumps(PROMPT), *map(str, directories))
    models = (load_model(open_checkpoint(directory)) for directory in directories)
    wanted = [list(complete(model, PROMPT, Sampling(max_tokens=24))) for model in models]
    assert [json.loads(line) for line in done.stdout.splitlines()] == wanted
    for complaint in ("newly initialized", "UNEXPECTED", "MISSING", "arning"):
        assert complaint not in done.stderr


# --- what is refused, in one sentence ---------------------------------------------------------------------------


def damaged(directory: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_another_version_is_refused(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="layout in version 2, and this packlight reads 1"):
        load(damaged(tied, tmp_path / "copy", version=2))


def test_a_damaged_grid_is_refused(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a grid is written like"):
        load(damaged(tied, tmp_path / "copy", linear="int99"))


def test_a_grid_that_the_file_does_not_have_is_refused(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its grid implies"):
        load(damaged(tied, tmp_path / "copy", linear="int4-g32-asym"))


@pytest.mark.parametrize("device_map", ["meta", {"model": "cpu", "lm_head": "disk"}, {"": 0}])
def test_another_device_is_refused(tied: Path, device_map: Any) -> None:
    with pytest.raises(UsageError, match=r"packed weights run on the CPU, not on .*: leave device_map out"):
        load(tied, device_map=device_map)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": torch.device("cpu")}])
def test_the_cpu_may_be_named(tied: Path, device_map: Any) -> None:
    assert load(tied, device_map=device_map).device.type == "cpu"


def test_a_model_that_was_moved_says_so(tied: Path) -> None:
    model = load(tied).to("meta")  # type: ignore[arg-type]  # PreTrainedModel.to is annotated for its wrapper
    with pytest.raises(UsageError, match=r"was moved to meta: move it back with \.to\('cpu'\)"):
        model(torch.tensor([PROMPT], device="meta"))


def test_another_dtype_is_refused(tied: Path) -> None:
    assert load(tied, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="stored and computed in bfloat16, not float32: leave dtype out"):
        load(tied, dtype=torch.float32)


def test_another_class_is_refused(tied: Path) -> None:
    with pytest.raises(CheckpointError, match=r"which a LlamaModel does not have: .* LlamaForCausalLM"):
        AutoModel.from_pretrained(tied)


def test_weights_without_files_are_refused(tied: Path) -> None:
    config = AutoConfig.from_pretrained(tied)
    model = type(load(tied))(config)
    with pytest.raises(UsageError, match="give from_pretrained a directory or a hub id"):
        PacklightQuantizer(PacklightConfig()).preprocess_model(model, checkpoint_files=None)


def test_a_dense_model_is_not_quantized_while_it_is_loaded(tiny_model_dir: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        load(tiny_model_dir(tied=True), quantization_config=PacklightConfig(version=1))


def test_saving_is_refused(tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(tied)
    with pytest.raises(ValueError, match="quantized with packlight and is not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert "copy the directory that it was loaded from" in caplog.text
    assert not (tmp_path / "saved").exists()


# --- registration -----------------------------------------------------------------------------------------------


@pytest.fixture
def meta_path() -> Iterator[list[Any]]:
    before = list(sys.meta_path)
    yield sys.meta_path
    sys.meta_path[:] = before


def test_importing_packlight_imports_neither_torch_nor_transformers() -> None:
    code = """
import sys
before = set(sys.modules)
import packlight
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new <= {"packlight", "__future__"}, new
assert len([finder for finder in sys.meta_path if type(finder).__module__.startswith("packlight")]) == 1
"""
    python(code)


def test_nothing_is_left_behind() -> None:
    code = """
import sys
import packlight
import importlib.util, inspect
spec = importlib.util.find_spec("transformers.quantizers.auto")  # looking for it is not importing it
assert spec is not None and spec.origin.endswith("auto.py")
from transformers.quantizers import auto
assert "packlight" in auto.AUTO_QUANTIZER_MAPPING and "packlight" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert not any(type(finder).__module__.startswith("packlight") for finder in sys.meta_path)
assert type(auto.__loader__) is type(auto.__spec__.loader) is type(inspect.__loader__), auto.__loader__
assert "class AutoHfQuantizer" in inspect.getsource(auto)
"""
    python(code)


def test_it_registers_once(meta_path: list[Any]) -> None:
    registered = auto.AUTO_QUANTIZER_MAPPING[METHOD], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]
    registration.register_on_import()
    import packlight

    importlib.reload(packlight)
    assert (auto.AUTO_QUANTIZER_MAPPING[METHOD], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]) == registered
    assert not any(isinstance(finder, registration._Finder) for finder in meta_path)


def test_it_waits_once(meta_path: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, WAITED_FOR)
    registration.register_on_import()
    registration.register_on_import()
    assert [isinstance(finder, registration._Finder) for finder in meta_path].count(True) == 1


FAKES = {
    "without lists": "",
    "without registration": "AUTO_QUANTIZER_MAPPING = AUTO_QUANTIZATION_CONFIG_MAPPING = {}",
    "that refuses": (
        "AUTO_QUANTIZER_MAPPING = AUTO_QUANTIZATION_CONFIG_MAPPING = {}\n"
        "def register_quantization_config(name):\n    raise TypeError('another interface')"
    ),
}


@pytest.mark.parametrize("body", FAKES.values(), ids=FAKES)
@pytest.mark.parametrize(
    "order", ["import packlight, transformers.quantizers.auto", "import transformers.quantizers.auto, packlight"]
)
def test_an_old_transformers_harms_nobody(tmp_path: Path, body: str, order: str) -> None:
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    for init in (package.parent, package):
        (init / "__init__.py").write_text("")
    (package / "auto.py").write_text(body)
    done = python(f"import sys\nsys.path.insert(0, sys.argv[1])\n{order}\nprint(packlight.__version__)", str(tmp_path))
    assert "cannot load packlight's own artifacts" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.strip()


def test_a_broken_transformers_fails_by_itself(tmp_path: Path) -> None:
    """And a second attempt, after it is mended, registers."""
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    for init in (package.parent, package):
        (init / "__init__.py").write_text("")
    (package / "auto.py").write_text("import sys\nif not hasattr(sys, 'mended'):\n    raise RuntimeError('broken')")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import packlight
try:
    import transformers.quantizers.auto
except RuntimeError as error:
    print(error)
sys.mended = True
import transformers.quantizers.auto
"""
    done = python(code, str(tmp_path))
    assert done.stdout == "broken\n"
    assert done.stderr.count("cannot load packlight's own artifacts") == 1
