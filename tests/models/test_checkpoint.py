"""Saved compressed models come back bit by bit, and smaller."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_assembly import COMPRESSORS, compressed_linears, logits
from tiny_models import copy_model, edit_json, load_whole

from nowag_pl import NoWagPruner, NoWagQuantizer, load_compressed, save_compressed
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import is_compressed
from nowag_pl.models.loading import Checkpoint
from nowag_pl.modules import CompressedLinear

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture
def saved(model_folder, tmp_path):
    """Return a function that saves a compressed tiny model, and gives the model and its folder."""

    def save(compressor, family="llama", dtype="auto", **settings):
        folder = model_folder(family, **settings)
        if dtype != "auto":
            settings["dtype"] = getattr(torch, dtype)
            folder = model_folder(family, **settings)
        model = assemble(Checkpoint(str(folder)), compressed_linears(folder, compressor))
        save_compressed(model, tmp_path / "saved", source=str(folder))
        return model, tmp_path / "saved", folder

    return save


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", COMPRESSORS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_round_trip_gives_identical_logits(family, method, tied, saved):
    model, folder, dense = saved(COMPRESSORS[method], family, tied=tied)
    loaded = load_compressed(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert not torch.allclose(logits(loaded), logits(load_whole(dense)), atol=1e-2)


@pytest.mark.parametrize("method", ["pruned", "quantized"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_round_trip_in_bfloat16(family, method, saved):
    model, folder, _ = saved(COMPRESSORS[method], family, dtype="bfloat16")
    loaded = load_compressed(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["pruned", "quantized"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_stored_in_bfloat16_it_runs_in_float32(family, method, saved):
    model, folder, _ = saved(COMPRESSORS[method], family, dtype="bfloat16")
    actual = logits(load_compressed(folder, torch.float32))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, logits(model).float(), atol=0.2, rtol=0.1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", COMPRESSORS)
def test_file_is_smaller_than_the_dense_one(method, tied, saved):
    _, folder, dense = saved(COMPRESSORS[method], tied=tied)
    saving = (dense / "model.safetensors").stat().st_size - (folder / "model.safetensors").stat().st_size
    assert saving > 30_000  # of 86 kB in the blocks' linears


def test_stored_bytes_are_those_that_the_linears_claim(saved):
    model, folder, _ = saved(NoWagQuantizer(subvector_dim=4, codebook_size=16, max_iters=2))
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            stored = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(f"{name}."))
            assert stored == module.storage_bytes
            assert abs(stored * 8 / module.weight.numel() - module.bits_per_weight) < 0.02


def test_tied_head_is_stored_once(saved):
    _, folder, _ = saved(NoWagPruner(), tied=True)
    names = load_file(folder / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_no_dense_weight_of_a_compressed_linear_is_stored(saved):
    model, folder, _ = saved(NoWagPruner())
    names = load_file(folder / "model.safetensors").keys()
    assert not any(f"{name}.weight" in names for name, m in model.named_modules() if isinstance(m, CompressedLinear))


def test_folder_has_tokenizer_and_configuration(saved):
    _, folder, dense = saved(NoWagPruner())
    text = "a matrix of weights"
    assert Checkpoint(str(folder)).tokenizer(text) == Checkpoint(str(dense)).tokenizer(text)
    assert Checkpoint(str(folder)).config.hidden_size == 32
    assert is_compressed(folder)
    assert not is_compressed(dense)


def test_saving_twice_replaces_the_first(saved, tmp_path):
    saved(COMPRESSORS["quantized"])
    model, folder, _ = saved(COMPRESSORS["pruned"])
    assert torch.equal(logits(load_compressed(folder)), logits(model))


def test_saving_leaves_the_model_as_it_was(saved):
    model, folder, _ = saved(COMPRESSORS["quantized"])
    before = logits(model)
    save_compressed(model, folder)
    assert torch.equal(logits(model), before)


def test_newer_format_is_refused(saved):
    _, folder, _ = saved(NoWagPruner())
    edit_json(folder / "nowag_pl.json", format=99)
    with pytest.raises(ValueError, match=r"format 1 or older.*99.*update nowag_pl"):
        load_compressed(folder)


def test_unknown_class_of_linear_is_refused(saved):
    _, folder, _ = saved(NoWagPruner())
    linears = json.loads((folder / "nowag_pl.json").read_text())["linears"]
    next(iter(linears.values()))["class"] = "TernaryLinear"
    edit_json(folder / "nowag_pl.json", linears=linears)
    with pytest.raises(ValueError, match=r"TernaryLinear.*another version"):
        load_compressed(folder)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no_such"):
        load_compressed(tmp_path / "no_such")


def test_dense_folder_is_refused(model_folder):
    with pytest.raises(ValueError, match=r"compressed model \(nowag_pl\.json\)"):
        load_compressed(model_folder())


def test_folder_without_configuration_is_refused(saved, tmp_path):
    _, folder, _ = saved(NoWagPruner())
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_compressed(folder)


@pytest.mark.parametrize("cut", [1, 3000])
def test_truncated_weights_are_refused(cut, saved, tmp_path):
    _, folder, _ = saved(NoWagPruner())
    folder = copy_model(folder, tmp_path / "damaged")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"model\.safetensors.*cut short"):
        load_compressed(folder)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.values", "model.layers.1.mlp.up_proj.mask"]
)
def test_missing_tensor_is_named(name, saved):
    from tiny_models import edit_tensors

    _, folder, _ = saved(NoWagPruner())
    edit_tensors(folder, {name: None})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_compressed(folder)


def test_unknown_tensor_is_named(saved):
    _, folder, _ = saved(NoWagPruner())
    edit_json(folder / "nowag_pl.json", linears={})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+"):
        load_compressed(folder)


def test_other_readers_of_safetensors_take_the_file(model_folder, tmp_path):
    dense = load_whole(model_folder())
    save_compressed(dense, tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert torch.equal(logits(load_whole(tmp_path / "saved")), logits(dense))


def test_file_that_another_tool_wrote_again_is_taken(saved):
    model, folder, _ = saved(NoWagPruner())
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "note": "copied"})
    assert torch.equal(logits(load_compressed(folder)), logits(model))
