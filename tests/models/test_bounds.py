"""A model folder that would block or keep its reader busy ends in one line at once."""

import json
import os
import time

import pytest
from tiny_models import copy_model, edit_json

from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.checksums import Checksums
from nowag_pl.models.streaming import StreamedModel

pytest_plugins = ["tiny_fixtures"]

INDEX = "model.safetensors.index.json"


@pytest.fixture
def own_model(model_folder, tmp_path):
    return copy_model(model_folder(), tmp_path / "own_model")


@pytest.fixture
def sharded_model(model_folder, tmp_path):
    return copy_model(model_folder(sharded=True), tmp_path / "own_model")


def opened(folder):
    return StreamedModel(Checkpoint(str(folder)))


def refused(folder, match):
    for use in (opened, lambda folder: Checkpoint(str(folder)).load()):
        started = time.monotonic()
        with pytest.raises(ValueError, match=match) as caught:
            use(folder)
        assert time.monotonic() - started < 10
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [10**7, 10**30, "many", -1, 2.5, True])
def test_absurd_number_of_blocks_is_refused(value, own_model):
    edit_json(own_model / "config.json", num_hidden_layers=value)
    refused(own_model, r"num_hidden_layers in \S+config\.json to be a number in \[1, 10000\], but got")


def test_more_blocks_than_tensors_are_refused(own_model):
    edit_json(own_model / "config.json", num_hidden_layers=5000)
    refused(own_model, r"num_hidden_layers in .* to be that of the weights, but got 5000 blocks and \d+ tensors")


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "head_dim", "num_attention_heads"])
def test_absurd_size_is_refused(key, own_model):
    edit_json(own_model / "config.json", **{key: 10**9})
    refused(own_model, rf"{key} in \S+ to be a number in \[1, 10000000\], but got 1000000000")


@pytest.mark.parametrize("changes", [{"rope_theta": "big"}, {"rope_parameters": {"rope_theta": 1e4, "factor": True}}])
def test_number_that_is_none_is_refused(changes, own_model):
    edit_json(own_model / "config.json", **changes)
    refused(own_model, r"(rope_theta|factor) in \S+config\.json to be a number, but got")


def test_configuration_that_is_a_list_is_refused(own_model):
    (own_model / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json to hold the configuration of a model, but got a list"):
        opened(own_model)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_pipe_is_refused(name, own_model):
    (own_model / name).unlink()
    os.mkfifo(own_model / name)
    refused(own_model, rf"to hold plain files, but '{name}' is a pipe|{name} to be a whole .* no plain file")


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/dev/zero", "a/b.safetensors", "/proc/kcore", "x.bin", "", 3]
)
def test_index_that_leaves_the_folder_is_refused(name, sharded_model):
    weight_map = json.loads((sharded_model / INDEX).read_text())["weight_map"]
    edit_json(sharded_model / INDEX, weight_map=weight_map | {"model.norm.weight": name})
    refused(sharded_model, r"to name safetensors files beside it, but got")


@pytest.mark.parametrize("name", ["../../proc/kcore", "/dev/zero", "chat/../../x"])
def test_checksum_that_leaves_the_folder_is_refused(name, sharded_model):
    edit_json(sharded_model / INDEX, metadata={"sha256": {name: "0" * 64}})
    with pytest.raises(ValueError, match=r"to have checksums of files in its folder, but got"):
        Checksums(sharded_model).check_small_files()
    refused(sharded_model, r"to have checksums of files in its folder, but got")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", "flash_attention_2", {"": "someone/kernel"}])
def test_attention_is_ours_to_choose(key, value, own_model, monkeypatch):
    import transformers.integrations.hub_kernels as kernels

    def never(*arguments, **settings):
        raise AssertionError("asked for a kernel")

    monkeypatch.setattr(kernels, "get_kernel", never, raising=False)
    edit_json(own_model / "config.json", **{key: value})
    for model in (opened(own_model).skeleton, Checkpoint(str(own_model)).load()):
        assert model.config._attn_implementation == "sdpa"
