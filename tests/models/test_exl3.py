"""EXL3 folders: an independent reader restores every weight, and linears that do not fit are refused."""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from torch import nn

from nowag_pl import NoWagTrellis
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.exl3 import check_exl3, save_exl3, save_streamed_exl3
from nowag_pl.models.state import compressed_linears
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import MaskedLinear

METHOD = NoWagTrellis(bits=2, state_bits=16, multiple=128, rotation="both")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a compressed tiny model with padded sizes and biases, the folder of the dense one, and an EXL3 folder."""
    folder = tmp_path_factory.mktemp("exl3")
    source = save_tiny_model(folder / "dense", "qwen2", num_blocks=2, hidden_size=64, intermediate_size=144)
    streamed, linears = StreamedModel(Checkpoint(str(source))), {}
    for index in range(len(streamed)):
        for name, linear in streamed.linears(index, streamed.load_block(index)).items():
            # Without a real search: any states will do.
            made = METHOD.empty((linear.out_features, linear.in_features), linear.weight.dtype, linear.bias is not None)
            linears[f"{streamed.block_name(index)}.{name}"] = with_random_values(made, linear, len(linears))
    model = assemble(Checkpoint(str(source)), linears)
    save_exl3(model, folder / "exl3", source=str(source))
    return model, source, folder / "exl3"


def with_random_values(made, linear: nn.Linear, seed: int):
    generator = torch.Generator().manual_seed(seed)
    made = made.to_empty(device="cpu")
    with torch.no_grad():
        made.codes.random_(-(2**31), 2**31 - 1, generator=generator)
        for scale in (made.in_scale, made.out_scale):
            scale.copy_(torch.randn(scale.shape, generator=generator).half())
        if linear.bias is not None:
            made.bias.copy_(linear.bias.half())
    return made


def tensors_in(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_folder_holds_what_the_format_names(exported):
    model, source, folder = exported
    tensors, linears = tensors_in(folder), compressed_linears(model)
    config = json.loads((folder / "config.json").read_text())
    described = config["quantization_config"]
    assert described == json.loads((folder / "quantization_config.json").read_text())
    assert (described["quant_method"], described["bits"], described["codebook"]) == ("exl3", 2.0, "mul1")
    assert config["architectures"] == json.loads((source / "config.json").read_text())["architectures"]
    assert described["tensor_storage"].keys() == linears.keys()
    for name, linear in linears.items():
        padded_out, padded_in = (size + -size % 128 for size in (linear.out_features, linear.in_features))
        assert tensors[f"{name}.trellis"].shape == (padded_in // 16, padded_out // 16, 32)
        assert tensors[f"{name}.trellis"].dtype == torch.int16
        assert tensors[f"{name}.suh"].shape == (padded_in,)
        assert tensors[f"{name}.svh"].shape == (padded_out,)
        assert tensors[f"{name}.mul1"].item() & 0xFFFFFFFF == 0x83DCD12D
        assert (f"{name}.bias" in tensors) == (linear.bias is not None)
        entry = described["tensor_storage"][name]
        for key, stored in entry["stored_tensors"].items():
            assert (stored["shape"], stored["torch_dtype"]) == (
                list(tensors[key].shape),
                str(tensors[key].dtype).removeprefix("torch."),
            )
        assert entry["bits_per_weight"] == 2
    dense = tensors_in(source)
    for name in dense.keys() - {f"{each}.{key}" for each in linears for key in ("weight", "bias")}:
        assert tensors[name].equal(dense[name])


def test_streamed_folder_is_the_same(exported, tmp_path):
    model, source, folder = exported
    streamed = StreamedModel(Checkpoint(str(source)))
    save_streamed_exl3(streamed, lambda index: model.model.layers[index], tmp_path / "streamed")
    actual, expected = tensors_in(tmp_path / "streamed"), tensors_in(folder)
    assert actual.keys() == expected.keys()
    assert all(actual[name].equal(expected[name]) for name in expected)
    contents = [json.loads((each / "config.json").read_text()) for each in (tmp_path / "streamed", folder)]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_bits": 12}, "state_bits 16, but got 12"),
        ({"multiple": 16}, "sizes that 128 divides or that are padded to it .* but got 48 x 32"),
        ({"rotation": "full"}, "rotation 'both', but got 'full'"),
        ({"code": "1mad"}, "code among mul1, mcg, 3inst, but got '1mad'"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    method = NoWagTrellis(**{"state_bits": 16, "multiple": 128, "rotation": "both"} | settings)
    with pytest.raises(ValueError, match=f"layers.0: Expected, with export.format=exl3, .*{message}"):
        check_exl3({"layers.0": method.empty((48, 32), torch.float32)})
    pruned = MaskedLinear(torch.ones(4, 8), torch.ones(4, 8, dtype=torch.bool), None, None)
    with pytest.raises(ValueError, match="but got a MaskedLinear"):
        check_exl3({"layers.0": pruned})


def test_folder_is_read_as_the_dense_model(exported):
    model, _, folder = exported
    checkpoint = Checkpoint(str(folder))
    assert not checkpoint.compressed_linears
    whole = checkpoint.load()
    for name, made in compressed_linears(model).items():
        assert whole.get_submodule(name).weight.equal(made.weight)
    assert whole(torch.arange(5, 25)[None]).logits.isfinite().all()
    streamed = StreamedModel(checkpoint)
    for index in range(len(streamed)):
        for name, linear in streamed.linears(index, streamed.load_block(index)).items():
            made = model.get_submodule(f"{streamed.block_name(index)}.{name}")
            assert linear.weight.equal(made.weight)
            assert linear.bias is None or linear.bias.equal(made.bias)


def reader_class():
    """Load the pure-torch reader of the package gptqmodel by itself, whose other parts ask for a GPU's software.

    The environment's GPTQMODEL_SOURCE names an unpacked source distribution, where the package is not installed.
    """
    root = os.environ.get("GPTQMODEL_SOURCE")
    spec = None if root else importlib.util.find_spec("gptqmodel")
    if root is None and (spec is None or spec.origin is None):
        pytest.skip("needs the package gptqmodel, or its source distribution unpacked in GPTQMODEL_SOURCE")
    package = Path(root) / "gptqmodel" if root else Path(spec.origin).parent
    file = package / "nn_modules" / "exllamav3_torch.py"
    stubs = {
        "utils.cpu_features": {"has_avx512_bf16": lambda: False},
        "utils.env": {"env_flag": lambda name, default: False},
        "utils.logger": {"setup_logger": lambda: None},
        "utils.torch": {"TORCH_HAS_COMPILE": False, "torch_compile": None},
        "nn_modules.exllamav3": {
            "_EXL3_BUFFER_NAMES": ("trellis", "suh", "svh", "su", "sv", "bias", "mcg", "mul1"),
            "_torch_dtype": lambda name: getattr(torch, name),
        },
    }
    modules = {"judge": {}, "judge.utils": {}, "judge.nn_modules": {}} | {
        f"judge.{name}": s for name, s in stubs.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, content in modules.items():
            module = types.ModuleType(name)
            module.__path__ = []
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("judge.nn_modules.exllamav3_torch", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.ExllamaV3TorchLinear


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "code"), [(1, "mul1"), (2, "mul1"), (3, "mcg"), (4, "3inst"), (6, "mul1")])
def test_independent_reader_restores_every_weight(bits, code, exported, tmp_path):
    reader = reader_class()
    model, source, _ = exported
    method, linears = NoWagTrellis(bits=bits, state_bits=16, multiple=128, rotation="both", code=code), {}
    for name, linear in compressed_linears(model).items():
        made = method.empty((linear.out_features, linear.in_features), torch.float32, linear.bias is not None)
        linears[name] = with_random_values(made, linear, len(linears))
    save_exl3(assemble(Checkpoint(str(source)), linears), tmp_path / "exl3", source=str(source))
    tensors = tensors_in(tmp_path / "exl3")
    for name, linear in linears.items():
        own = {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}
        padded_out, padded_in = len(linear.out_scale), len(linear.in_scale)
        judge = reader.from_tensors(in_features=padded_in, out_features=padded_out, name=name, tensors=own)
        weight = judge.get_weight_tensor(torch.float32)[: linear.in_features, : linear.out_features].T
        error = (weight - linear.weight).detach().square().mean().sqrt() / linear.weight.detach().square().mean().sqrt()
        assert error < 1e-3
        inputs = torch.randn(3, linear.in_features)
        outputs = judge(torch.nn.functional.pad(inputs, (0, padded_in - linear.in_features)))
        expected = linear(inputs).detach()
        torch.testing.assert_close(
            outputs[:, : linear.out_features], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )
