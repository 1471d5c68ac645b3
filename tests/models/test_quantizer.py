"""transformers opens compressed models by itself once nowag_pl is imported."""

import json
import os
import subprocess
import sys
import tomllib

import pytest
import torch
from test_assembly import COMPRESSORS, TOKENS, compressed_linears, logits
from tiny_models import ROOT, copy_model, edit_json, subprocess_environment
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nowag_pl import accelerate, load_compressed, save_compressed
from nowag_pl.kernels.dispatch import has_module
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format import registration
from nowag_pl.models.state import compressed_linears as linears_of
from nowag_pl.models.state import stored_state

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture(scope="module")
def export(model_folder, tmp_path_factory):
    """Return a function that gives the folder of a compressed model, which tests only read."""
    made = {}

    def get(method="quantized", family="llama", **settings):
        key = (method, family, *settings.items())
        if key not in made:
            source, made[key] = model_folder(family, **settings), tmp_path_factory.mktemp("export")
            model = assemble(Checkpoint(str(source)), compressed_linears(source, COMPRESSORS[method]))
            save_compressed(model, made[key], source=str(source), max_shard_bytes=100_000)
        return made[key]

    return get


def assert_equal_states(one, other):
    one, other = stored_state(one), stored_state(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    ("method", "family", "tied"),
    [("armor", "llama", True), ("pruned", "qwen2", False), ("2:4", "gemma2", True), ("quantized", "qwen2", True)],
)
def test_auto_model_gives_the_compressed_model(method, family, tied, export):
    folder = export(method, family, tied=tied)
    expected, actual = load_compressed(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert len(linears_of(actual)) == 21
    assert_equal_states(actual, expected)
    assert torch.equal(logits(actual), logits(expected))
    assert not actual.training
    assert (actual.lm_head.weight is actual.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("method", ["armor", "quantized"])
def test_greedy_generation_is_that_of_load_compressed(method, export):
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS), "pad_token_id": 1}
    models = load_compressed(export(method)), AutoModelForCausalLM.from_pretrained(export(method))
    texts = [model.generate(TOKENS, **settings) for model in models]
    assert texts[0].shape[1] > TOKENS.shape[1]
    assert torch.equal(*texts)


@pytest.mark.skipif(not has_module("numba"), reason="Numba is an extra")
def test_an_accelerated_model_generates_the_same_and_is_saved_as_before(export, tmp_path):
    folder = export("quantized")
    expected, actual = load_compressed(folder).eval(), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert accelerate(actual) is actual
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS), "pad_token_id": 1}
    assert torch.equal(actual.generate(TOKENS, **settings), expected.generate(TOKENS, **settings))
    save_compressed(actual, tmp_path)
    assert_equal_states(load_compressed(tmp_path), expected)


@pytest.mark.parametrize(
    ("device_map", "dtype"), [("cpu", torch.float32), ("auto", torch.bfloat16), ({"": "cpu"}, torch.float16)]
)
def test_device_map_and_dtype_are_honoured(device_map, dtype, export):
    model = AutoModelForCausalLM.from_pretrained(export(dtype=torch.bfloat16), device_map=device_map, dtype=dtype)
    expected = load_compressed(export(dtype=torch.bfloat16), dtype)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == model.config.dtype == dtype
    assert_equal_states(model, expected)
    assert torch.equal(logits(model), logits(expected))
    assert logits(model).dtype == dtype


def test_parameters_that_lie_on_disk_are_used(export, tmp_path):
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    model = AutoModelForCausalLM.from_pretrained(export(), device_map=places, offload_folder=tmp_path)
    assert next(model.model.layers[1].parameters()).is_meta
    assert not model.model.layers[1].mlp.up_proj.is_unpacked
    torch.testing.assert_close(logits(model), logits(load_compressed(export())), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "load"), [("armor", load_compressed), ("quantized", AutoModelForCausalLM.from_pretrained)]
)
def test_save_pretrained_writes_the_format_again(method, load, export, tmp_path):
    folder = copy_model(export(method, tied=True), tmp_path / "again")
    model = load(folder)
    for target, size in ((folder, "5GB"), (tmp_path / "other", "60KB"), (folder, "60KB")):
        model.save_pretrained(target, max_shard_size=size)
        for reopened in (load_compressed(target), AutoModelForCausalLM.from_pretrained(target)):
            assert_equal_states(reopened, model)
            assert torch.equal(logits(reopened), logits(model))
        if (target / "model.safetensors").exists():
            (target / "model.safetensors").unlink()


def test_save_pretrained_describes_what_the_model_has_become(export, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(export())
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=False)
    model.save_pretrained(tmp_path / "changed")
    assert len(linears_of(load_compressed(tmp_path / "changed"))) == 20
    assert torch.equal(logits(load_compressed(tmp_path / "changed")), logits(model))


@pytest.mark.parametrize("method", COMPRESSORS)
def test_dequantized_model_is_an_ordinary_one(method, export, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(export(method, "qwen2"))
    before = logits(model)
    model = model.dequantize()
    assert not linears_of(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(model))


def test_newer_format_is_refused(export, tmp_path):
    folder = copy_model(export(), tmp_path / "newer")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=quantization | {"format": 3, "unheard_of": 1})
    with pytest.raises(ValueError, match=r"format 2 or older, but got 3: update nowag_pl"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_damage_is_found_unless_the_files_are_trusted(export, tmp_path):
    folder = copy_model(export(), tmp_path / "damaged")
    file = max(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name} as it was written, but its SHA-256"):
        AutoModelForCausalLM.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["verify"] = False
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert len(linears_of(model)) == 21
    assert "verify" not in model.config.to_dict()["quantization_config"]


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env=subprocess_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import nowag_pl; from transformers import AutoModelForCausalLM",
        pytest.param("from transformers import AutoModelForCausalLM; import nowag_pl", marks=pytest.mark.slow),
    ],
)
def test_one_import_of_the_package_is_enough(imports, export):
    code = (
        f"import sys, warnings; {imports}; warnings.simplefilter('ignore')\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    assert run(code, export()) == "VQLinear"


LOAD = (
    "import sys, warnings; from transformers import AutoModelForCausalLM; warnings.simplefilter('ignore')\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    "print(type(model.model.layers[0].mlp.up_proj).__name__)"
)


def test_where_the_package_is_installed_no_import_is_needed(export, tmp_path, monkeypatch):
    """By the entry point of pyproject.toml, which `pip install` writes into the metadata of a package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "nowag_pl-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nowag_pl\nVersion: 0.1.0\n")
    ((group, entries),) = project["entry-points"].items()
    (metadata / "entry_points.txt").write_text(f"[{group}]\nnowag_pl = {entries['nowag_pl']}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert run(LOAD, export()) == "VQLinear"


@pytest.mark.parametrize("method", ["quantized", "pruned"])
def test_without_the_package_there_are_no_random_weights(method, export, monkeypatch):
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    code = LOAD.replace("model =", "sys.modules['nowag_pl'] = None; model =")
    done = subprocess.run(
        [sys.executable, "-c", code, export(method)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env=subprocess_environment(), check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Unknown quantization type, got nowag_pl" in done.stderr
    assert "mismatch" in done.stderr.lower()


def test_import_of_the_package_imports_no_library():
    code = "import sys, nowag_pl; print(*sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)))"
    assert run(code) == ""


def test_registration_waits_once_and_leaves_other_modules_alone(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "transformers.quantizers.auto")
    for _ in range(2):
        registration.install()
    finders = [finder for finder in sys.meta_path if isinstance(finder, registration._Finder)]
    assert len(finders) == 1
    assert finders[0].find_spec("transformers.quantizers.base") is None
