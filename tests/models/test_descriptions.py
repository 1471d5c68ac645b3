"""A damaged description, or tensors that do not fit it, are refused in one line, whoever loads the model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_assembly import COMPRESSORS, compressed_linears
from tiny_models import copy_model, edit_json
from transformers import AutoModelForCausalLM

from nowag_pl import NoWagQuantizer, NoWagTrellis, load_compressed, save_compressed
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel

pytest_plugins = ["tiny_fixtures"]

UP = "model.layers.1.mlp.up_proj"
WEIGHTS = "model-00001-of-00001.safetensors"


def load_streamed(folder):
    model = StreamedModel(Checkpoint(str(folder)))
    return [model.load_block(index) for index in range(len(model))]


LOADERS = [load_compressed, AutoModelForCausalLM.from_pretrained, load_streamed]


@pytest.fixture(scope="module")
def exports(model_folder, tmp_path_factory):
    """Return folders of exports without checksums: with codes of a codebook of 11, and with masks."""
    made, source = {}, model_folder()
    methods = {
        "quantized": NoWagQuantizer(subvector_dim=4, codebook_size=11, max_iters=2),
        "trellis": NoWagTrellis(feedback=False),
    }
    for name in ("pruned", "2:4", "armor"):
        methods[name] = COMPRESSORS[name]
    for name, compressor in methods.items():
        made[name] = tmp_path_factory.mktemp("exports") / name.replace(":", "_")
        save_compressed(assemble(Checkpoint(str(source)), compressed_linears(source, compressor)), made[name])
        index = made[name] / "model.safetensors.index.json"
        edit_json(index, metadata={})
    return made


def describe(folder, name=UP, **changes):
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    for key, value in changes.items():
        quantization["linears"][name][key] = value
    edit_json(folder / "config.json", quantization_config=quantization)


def change(folder, key, function, name=UP):
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{name}.{key}"] = function(tensors[f"{name}.{key}"]).contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def refused(folder, match, loaders=LOADERS[:1]):
    for load in loaders:
        with pytest.raises(ValueError, match=match) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "changes", "match"),
    [
        ("quantized", {"class": "LookupLinear"}, r"up_proj: Expected a compressed linear of class .*'LookupLinear'"),
        ("pruned", {"class": "SemiStructuredLinear"}, r"of class .*'SemiStructuredLinear'"),
        ("quantized", {"class": "CodedLinear"}, r"of class .*'CodedLinear'"),
        ("quantized", {"class": ["VQLinear"]}, r"of class .*\['VQLinear'\]"),
        ("quantized", {"in_features": 0}, r"in_features of at least 1, but got 0"),
        ("quantized", {"out_features": True}, r"out_features of at least 1, but got True"),
        ("quantized", {"subvector_dim": 4.0}, r"subvector_dim of at least 1, but got 4\.0"),
        ("quantized", {"codebook_size": 2**40}, r"codebook_size up to 2\^24"),
        ("quantized", {"in_features": 10**12}, r"'model\.layers\.1\.mlp\.up_proj\.\w+' of shape"),
        ("quantized", {"in_features": 10**30}, r"settings of a VQLinear, but they are damaged"),
        ("quantized", {"dtype": "int8"}, r"dtype to be one of float64.*'int8'"),
        ("quantized", {"dtype": "load"}, r"dtype to be one of float64.*'load'"),
        ("quantized", {"bias": "uint8"}, r"bias to be null or one of"),
        ("quantized", {"surprise": 1}, r"'surprise' is missing or unknown"),
        ("pruned", {"num_kept": 10**6}, r"num_kept in \[0, 1536\], but got 1000000"),
        ("2:4", {"pattern": [2, 5]}, r"pattern to be N and M.*divides 32, but got \[2, 5\]"),
        ("2:4", {"pattern": [5, 4]}, r"pattern to be N and M"),
        ("2:4", {"pattern": "2:4"}, r"pattern to be N and M"),
        ("armor", {"pattern": None}, r"pattern to be N and M"),
        ("trellis", {"code": "secret"}, r"a code among mul1.*'secret' and 'full'"),
        ("trellis", {"state_bits": 30}, r"state_bits in \[4, 16\] and no more bits, but got 30"),
        ("trellis", {"bits": 17}, r"no more bits, but got 12 and 17"),
        ("trellis", {"padded": [32, 8]}, r"padded to be \[32, 48\] made up to multiples of 16, but got \[32, 8\]"),
        ("trellis", {"padded": 16}, r"padded to be two sizes"),
        ("armor", {"in_block": 5}, r"in_block to divide 32, but got 5"),
    ],
)
def test_damaged_description_is_refused(method, changes, match, exports, tmp_path):
    folder = copy_model(exports[method], tmp_path / "damaged")
    describe(folder, **changes)
    refused(folder, match)


def test_missing_setting_is_named(exports, tmp_path):
    folder = copy_model(exports["quantized"], tmp_path / "damaged")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    del quantization["linears"][UP]["codebook_size"]
    edit_json(folder / "config.json", quantization_config=quantization)
    refused(folder, r"up_proj: Expected the settings of a VQLinear.*'codebook_size' is missing", LOADERS)


@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj", "model.norm", "model.layers.0.self_attn.k_proj"])
def test_linear_that_is_not_in_the_model_is_refused(name, exports, tmp_path):
    folder = copy_model(exports["quantized"], tmp_path / "damaged")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization["linears"][name] = quantization["linears"][UP]
    edit_json(folder / "config.json", quantization_config=quantization)
    tensors = load_file(folder / WEIGHTS)
    tensors |= {key.replace(UP, name): tensor.clone() for key, tensor in tensors.items() if key.startswith(UP)}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    refused(folder, rf"{name}.*do not belong to this config\.json", LOADERS)


def all_bits(tensor):
    return torch.full_like(tensor, 255)


def with_nan(tensor):
    tensor[..., -1] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("method", "key", "function", "match"),
    [
        ("quantized", "codes", all_bits, r"up_proj is damaged: Expected codes in \[0, 11\), but got 15"),
        ("quantized", "codes", lambda codes: codes[:-1], r"up_proj\.codes' of shape"),
        ("quantized", "codes", lambda codes: codes.to(torch.int32), r"up_proj\.codes' of shape .*uint8.*int32"),
        ("quantized", "codes", lambda codes: codes.float(), r"up_proj\.codes' of shape .*uint8.*float32"),
        ("quantized", "codebook", lambda codebook: codebook[:-1], r"up_proj\.codebook' of shape \(11, 4\)"),
        ("quantized", "codebook", lambda codebook: codebook.to(torch.int16), r"up_proj\.codebook' of .*float.*int16"),
        ("quantized", "in_scale", with_nan, r"up_proj is damaged: Expected finite values, but in_scale"),
        ("pruned", "mask", all_bits, r"up_proj is damaged: Expected a mask that keeps \d+ weights, but it keeps 1536"),
        ("pruned", "values", with_nan, r"up_proj is damaged: Expected finite values, but values"),
        ("2:4", "mask", all_bits, r"up_proj is damaged: Expected codes in \[0, 6\), but got 7"),
        ("armor", "mask", all_bits, r"up_proj is damaged: Expected codes in \[0, 6\), but got 7"),
        ("trellis", "codes", lambda codes: codes[:, :-1], r"up_proj\.codes' of shape"),
        ("trellis", "out_scale", with_nan, r"up_proj is damaged: Expected finite values, but out_scale"),
        ("armor", "out_factor", with_nan, r"up_proj is damaged: Expected finite values, but out_factor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(method, key, function, match, exports, tmp_path):
    folder = copy_model(exports[method], tmp_path / "damaged")
    change(folder, key, function)
    refused(folder, match)


@pytest.mark.parametrize(
    ("method", "key", "function", "match"),
    [
        ("quantized", "codes", all_bits, "Expected codes in"),
        ("armor", "out_factor", with_nan, "Expected finite values"),
    ],
)
def test_every_loader_refuses_tensors_that_do_not_fit(method, key, function, match, exports, tmp_path):
    folder = copy_model(exports[method], tmp_path / "damaged")
    change(folder, key, function)
    refused(folder, match, LOADERS)


def test_missing_tensor_is_named(exports, tmp_path):
    folder = copy_model(exports["quantized"], tmp_path / "damaged")
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"{UP}.codes"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    refused(folder, r"up_proj\.codes', but it is missing", LOADERS)


@pytest.mark.parametrize("number", [0, -1, True, 2.0, None])
def test_format_that_is_none_is_refused(number, exports, tmp_path):
    folder = copy_model(exports["quantized"], tmp_path / "damaged")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=quantization | {"format": number})
    refused(folder, r"format and linears in quantization_config, but it is damaged", LOADERS)


def test_whole_models_pass(exports):
    for folder in exports.values():
        for load in LOADERS:
            load(folder)
