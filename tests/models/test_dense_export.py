"""A dense export is an ordinary model, which transformers opens without this package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_assembly import COMPRESSORS, FAMILY_METHODS, compressed_linears, logits
from tiny_models import FAMILIES, load_whole, subprocess_environment

from nowag_pl import save_compressed, save_dense
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.saving import is_compressed, save_streamed
from nowag_pl.models.state import compressed_linears as linears_of
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import MaskedLinear

pytest_plugins = ["tiny_fixtures"]


def tensors_in(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def models(model_folder):
    """Return a function that gives a compressed tiny model and the folder of the dense one."""

    def make(method, family="llama", **settings):
        source = model_folder(family, **settings)
        return assemble(Checkpoint(str(source)), compressed_linears(source, COMPRESSORS[method])), source

    return make


@pytest.mark.parametrize(("method", "tied"), [(name, index % 2 == 0) for index, name in enumerate(COMPRESSORS)])
def test_it_has_the_tensors_of_the_dense_model_and_the_weights_of_the_compressed_one(method, tied, models, tmp_path):
    model, source = models(method, "qwen2", tied=tied, dtype=torch.bfloat16)
    before = logits(model)
    save_dense(model, tmp_path / "dense", source=str(source))
    assert torch.equal(logits(model), before)
    assert linears_of(model)
    actual, dense = tensors_in(tmp_path / "dense"), tensors_in(source)
    assert actual.keys() == dense.keys()
    linears = linears_of(model)
    for name, tensor in actual.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape == dense[name].shape
        owner = name.removesuffix(".weight")
        assert torch.equal(tensor, linears[owner].weight if owner in linears else dense[name])
        if isinstance(linears.get(owner), MaskedLinear):
            assert (tensor == 0).float().mean() >= 0.5
            assert torch.equal(tensor[tensor != 0], dense[name][tensor != 0])
    assert not is_compressed(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize(("family", "method"), FAMILY_METHODS)
def test_transformers_opens_it(family, method, models, tmp_path):
    model, source = models(method, family)
    save_dense(model, tmp_path / "dense", source=str(source))
    torch.testing.assert_close(logits(load_whole(tmp_path / "dense")), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_is_opened_where_the_package_is_not_installed(models, tmp_path):
    model, source = models("quantized", tied=True)
    save_dense(model, tmp_path / "dense", source=str(source), max_shard_bytes=50_000)
    tokens = list(range(5, 25))
    expected = model(torch.tensor([tokens])).logits.detach()
    code = (
        "import sys, importlib.abc\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'nowag_pl': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder, out, *tokens = sys.argv[1:]\n"
        "model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys'], info\n"
        "AutoTokenizer.from_pretrained(folder)('a word')\n"
        "torch.save(model(torch.tensor([[int(t) for t in tokens]])).logits.detach(), out)\n"
    )
    arguments = [str(tmp_path / "dense"), str(tmp_path / "logits.pt"), *map(str, tokens)]
    # Where the package is not installed, it has no entry point that torch would load.
    environment = subprocess_environment() | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)


READ_BY_ANOTHER = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
for folder in sys.argv[1:]:
    # In version 4 the other way to compute attention leaves Gemma 2's soft cap out.
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    AutoTokenizer.from_pretrained(folder)("a word")
    torch.save(model.eval()(torch.tensor([list(range(5, 25))])).logits.detach(), folder + ".pt")
"""


@pytest.mark.slow
@pytest.mark.skipif("NOWAG_PL_TRANSFORMERS_4" not in os.environ, reason="needs a Python that has transformers 4.57")
def test_transformers_4_reads_every_family_with_the_same_logits(models, tmp_path):
    expected = {}
    for family in FAMILIES:
        model, source = models("pruned", family)
        folder = tmp_path / family
        save_dense(model, folder, source=str(source))
        expected[family] = model(torch.tensor([list(range(5, 25))])).logits.detach()
    folders = [str(tmp_path / family) for family in FAMILIES]
    done = subprocess.run(
        [os.environ["NOWAG_PL_TRANSFORMERS_4"], "-c", READ_BY_ANOTHER, *folders],
        capture_output=True, text=True, cwd=tmp_path, timeout=280, env=subprocess_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for family, own in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{family}.pt"), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "family", "tied", "dense"),
    [
        ("armor", "llama", True, False),
        ("pruned", "qwen2", False, True),
        ("2:4", "qwen2", False, False),
        ("quantized", "llama", True, True),
        ("quantized", "qwen2", False, False),
    ],
)
def test_streamed_export_holds_the_same_tensors(method, family, tied, dense, models, tmp_path):
    model, source = models(method, family, tied=tied, sharded=True)
    streamed = StreamedModel(Checkpoint(str(source)))

    def load_block(index):
        block, prefix = streamed.load_block(index), f"{streamed.block_name(index)}."
        for name, linear in linears_of(model).items():
            if name.startswith(prefix):
                block.set_submodule(name.removeprefix(prefix), linear)
        return block

    save_streamed(streamed, load_block, tmp_path / "streamed", dense)
    (save_dense if dense else save_compressed)(model, tmp_path / "whole", source=str(source))
    actual, expected = tensors_in(tmp_path / "streamed"), tensors_in(tmp_path / "whole")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        content = [json.loads((tmp_path / kind / name).read_text()) for kind in ("streamed", "whole")]
        assert content[0] == content[1], name
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    for number in range(3):
        files = {file for name, file in index["weight_map"].items() if name.startswith(f"model.layers.{number}.")}
        assert files == {f"model-{number + 2:05d}-of-00004.safetensors"}


def test_finetuned_in_float32_it_is_saved_in_the_type_of_the_model(models, tmp_path):
    model, _ = models("quantized", dtype=torch.bfloat16)
    linear = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        linear.codebook += 1e-3
    save_dense(model, tmp_path / "dense")
    saved = tensors_in(tmp_path / "dense")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(saved, linear.weight.detach().to(torch.bfloat16))
