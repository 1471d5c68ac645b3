"""Saved compressed models come back bit by bit, and smaller."""

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_assembly import COMPRESSORS, compressed_linears, logits
from tiny_models import copy_model, edit_json, load_whole

from nowag_pl import NoWagPruner, NoWagQuantizer, load_compressed, save_compressed, save_dense
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.saving import is_compressed
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear

pytest_plugins = ["tiny_fixtures"]

WEIGHTS = "model-00001-of-00001.safetensors"


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


@pytest.mark.parametrize("method", COMPRESSORS)
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_round_trip_gives_identical_logits_from_a_smaller_file(family, method, tied, saved):
    model, folder, dense = saved(COMPRESSORS[method], family, tied=tied)
    saving = (dense / "model.safetensors").stat().st_size - (folder / WEIGHTS).stat().st_size
    assert saving > 30_000  # of 86 kB in the blocks' linears
    loaded = load_compressed(folder, packed=True)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    torch.testing.assert_close(logits(load_compressed(folder)), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(loaded), logits(load_whole(dense)), atol=1e-2)


@pytest.mark.parametrize("method", ["pruned", "quantized", "armor"])
def test_stored_in_bfloat16_it_comes_back_and_runs_in_float32(method, saved):
    model, folder, _ = saved(COMPRESSORS[method], "qwen2", dtype="bfloat16")
    loaded = load_compressed(folder, packed=True)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    actual = logits(load_compressed(folder, torch.float32, packed=True))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, logits(model).float(), atol=0.2, rtol=0.1)


def test_stored_bytes_are_those_that_the_linears_claim(saved):
    model, folder, _ = saved(NoWagQuantizer(subvector_dim=4, codebook_size=16, max_iters=2))
    tensors = load_file(folder / WEIGHTS)
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            stored = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(f"{name}."))
            assert stored == module.storage_bytes
            assert abs(stored * 8 / module.weight.numel() - module.bits_per_weight) < 0.02


def test_tied_head_is_stored_once(saved):
    _, folder, _ = saved(NoWagPruner(), tied=True)
    names = load_file(folder / WEIGHTS).keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_no_dense_weight_of_a_compressed_linear_is_stored(saved):
    model, folder, _ = saved(NoWagPruner())
    tensors = load_file(folder / WEIGHTS)
    names = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, CompressedLinear)]
    # Empty ones, so that a program that does not know the format refuses them.
    assert {tensors[name].numel() for name in names} == {0}


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
    assert torch.equal(logits(load_compressed(folder, packed=True)), logits(model))


def test_saving_leaves_the_model_as_it_was(saved):
    model, folder, _ = saved(COMPRESSORS["quantized"])
    before = logits(model)
    save_compressed(model, folder)
    assert torch.equal(logits(model), before)


def edit_quantization(folder, **changes):
    """Change the description of a compressed model, as if it had been written so."""
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", quantization_config=config["quantization_config"] | changes)
    drop_checksums(folder, "config.json")


def drop_checksums(folder, *names):
    index = folder / "model.safetensors.index.json"
    metadata = json.loads(index.read_text())["metadata"]
    for name in names:
        del metadata["sha256"][name]
    edit_json(index, metadata=metadata)


def test_newer_format_is_refused(saved):
    _, folder, _ = saved(NoWagPruner())
    edit_quantization(folder, format=99, something_new=1)
    with pytest.raises(ValueError, match=r"format 2 or older.*99.*update nowag_pl"):
        load_compressed(folder)


@pytest.mark.parametrize("changes", [{"format": None}, {"format": "2"}, {"linears": None}])
def test_incomplete_description_is_refused(changes, saved):
    _, folder, _ = saved(NoWagPruner())
    edit_quantization(folder, **changes)
    with pytest.raises(ValueError, match=r"format and linears in quantization_config.*damaged"):
        load_compressed(folder)


def test_model_of_another_program_is_refused(model_folder, tmp_path):
    folder = copy_model(model_folder(), tmp_path / "gptq")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"quant_method 'gptq'"):
        StreamedModel(Checkpoint(str(folder)))


def test_unknown_class_of_linear_is_refused(saved):
    _, folder, _ = saved(NoWagPruner())
    linears = json.loads((folder / "config.json").read_text())["quantization_config"]["linears"]
    next(iter(linears.values()))["class"] = "TernaryLinear"
    edit_quantization(folder, linears=linears)
    with pytest.raises(ValueError, match=r"TernaryLinear.*another version"):
        load_compressed(folder)


def as_format_1(folder):
    """Turn a saved folder into what the first version of this package wrote."""
    config = json.loads((folder / "config.json").read_text())
    linears = config.pop("quantization_config")["linears"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "nowag_pl.json").write_text(json.dumps({"format": 1, "linears": linears}))
    (folder / WEIGHTS).rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize("method", ["pruned", "quantized"])
def test_format_1_is_read_and_becomes_format_2(method, saved, tmp_path):
    model, folder, _ = saved(COMPRESSORS[method], tied=True)
    as_format_1(folder)
    assert is_compressed(folder)
    loaded = load_compressed(folder, packed=True)
    assert torch.equal(logits(loaded), logits(model))
    save_compressed(loaded, folder, source=str(folder))
    assert not (folder / "nowag_pl.json").exists()
    assert torch.equal(logits(load_compressed(folder, packed=True)), logits(model))


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no_such"):
        load_compressed(tmp_path / "no_such")


def test_dense_folder_is_refused(model_folder):
    with pytest.raises(ValueError, match="that nowag_pl compressed, but it does not"):
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
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"model-00001-of-00001\.safetensors.*cut short"):
        load_compressed(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.mask"])
def test_missing_tensor_is_named(name, saved):
    from tiny_models import edit_tensors

    _, folder, _ = saved(NoWagPruner())
    (folder / WEIGHTS).rename(folder / "model.safetensors")
    edit_tensors(folder, {name: None})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_compressed(folder)


def test_unknown_tensor_is_named(saved):
    _, folder, _ = saved(NoWagPruner())
    edit_quantization(folder, linears={})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+"):
        load_compressed(folder)


def test_other_readers_of_safetensors_take_the_file(model_folder, tmp_path):
    dense = load_whole(model_folder())
    save_compressed(dense, tmp_path / "saved")
    with safe_open(tmp_path / "saved" / WEIGHTS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert torch.equal(logits(load_whole(tmp_path / "saved")), logits(dense))


def test_file_that_another_tool_wrote_again_is_taken_when_it_is_trusted(saved):
    model, folder, _ = saved(NoWagPruner())
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt", "note": "copied"})
    with pytest.raises(ValueError, match=r"SHA-256.*damaged"):
        load_compressed(folder)
    assert torch.equal(logits(load_compressed(folder, verify=False, packed=True)), logits(model))
    drop_checksums(folder, WEIGHTS)
    assert torch.equal(logits(load_compressed(folder, packed=True)), logits(model))


@pytest.mark.parametrize("save", [save_compressed, save_dense])
def test_shards_are_bounded_and_hold_everything(save, saved, tmp_path):
    model, *_ = saved(COMPRESSORS["quantized"], tied=True)
    save(model, tmp_path / "sharded", max_shard_bytes=9000)
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    contents = [load_file(file) for file in files]
    sizes = [sum(tensor.nbytes for tensor in content.values()) for content in contents]
    assert all(size <= 9000 or len(content) == 1 for size, content in zip(sizes, contents, strict=True))
    assert all(one + two > 9000 for one, two in itertools.pairwise(sizes))  # none could have been joined
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {n: f.name for f, c in zip(files, contents, strict=True) for n in c}
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    loaded = load_compressed(tmp_path / "sharded") if save is save_compressed else load_whole(tmp_path / "sharded")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_shards_of_no_bytes_are_refused(model_folder, tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes of at least 1, but got 0"):
        save_compressed(load_whole(model_folder()), tmp_path / "saved", max_shard_bytes=0)


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("save", [save_compressed, save_dense])
def test_interrupted_anywhere_it_never_looks_whole(save, saved, tmp_path, monkeypatch):
    old, folder, dense = saved(NoWagPruner(), tied=True)
    new = assemble(Checkpoint(str(dense)), compressed_linears(dense, NoWagPruner(pattern=(1, 4))))
    changes = 0

    def counted(function, limit):
        def run(*args, **kwargs):
            nonlocal changes
            changes += 1
            if changes > limit:
                raise Killed
            return function(*args, **kwargs)

        return run

    outcomes = set()
    for limit in range(200):
        target, changes = copy_model(folder, tmp_path / str(limit)), 0
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for owner, name in ((os, "replace"), (Path, "replace"), (Path, "rename"), (Path, "unlink")):
                patch.setattr(owner, name, counted(getattr(owner, name), limit))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree, limit))  # a killed process cleans nothing
            save(new, target, max_shard_bytes=200_000)
        if not (target / "config.json").exists():
            outcomes.add("none")
            with pytest.raises(ValueError, match=r"config\.json"):
                load_compressed(target)
            continue
        loaded = load_compressed(target) if is_compressed(target) else Checkpoint(str(target)).load()
        actual = logits(loaded)
        outcomes.add("old" if torch.equal(actual, logits(old)) else "new")
        assert outcomes <= {"old", "none"} or torch.equal(actual, logits(new))
        if not (target / ".incomplete").exists() and limit >= changes:
            break
    assert outcomes == {"old", "none", "new"}
    assert not torch.equal(logits(old), logits(new))


def test_leftovers_of_a_killed_export_are_removed(saved):
    model, folder, _ = saved(NoWagPruner())
    (folder / ".incomplete" / "deep").mkdir(parents=True)
    (folder / ".incomplete" / "0.safetensors").write_bytes(b"half")
    save_compressed(model, folder)
    assert not (folder / ".incomplete").exists()
    assert torch.equal(logits(load_compressed(folder, packed=True)), logits(model))
