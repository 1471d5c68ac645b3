"""Opening model folders: what is read, what is refused, and that pickles stay shut."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import copy_model, edit_tensors, load_whole, random_tokens, save_tiny_model

from nowag_pl.models.checkpoint import EMBEDDED, Checkpoint, resolve_folder

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture
def own_model(model_folder, tmp_path):
    return copy_model(model_folder(), tmp_path / "own_model")


@pytest.mark.parametrize("tied", [False, True])
def test_load_gives_the_transformers_model(tied, model_folder):
    folder, tokens = model_folder("qwen2", tied=tied), random_tokens(2)
    model = Checkpoint(str(folder)).load()
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load_whole(folder)(tokens).logits)


def test_weight_map_names_the_file_of_every_tensor(model_folder):
    folder = model_folder(sharded=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file.name for name, file in Checkpoint(str(folder)).weight_map.items()} == index


def test_read_gives_stored_tensors_over_all_shards(model_folder):
    checkpoint = Checkpoint(str(model_folder(sharded=True)))
    expected = {
        name: tensor for file in checkpoint.folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    actual = checkpoint.read(list(expected))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_auto_type_is_the_checkpoints(model_folder):
    assert Checkpoint(str(model_folder(dtype=torch.bfloat16))).dtype == torch.bfloat16
    assert Checkpoint(str(model_folder(dtype=torch.bfloat16)), "float32").dtype == torch.float32


def test_unknown_type_is_refused(model_folder):
    with pytest.raises(ValueError, match="int8"):
        Checkpoint(str(model_folder()), "int8")


def test_max_seq_len_is_the_configurations(model_folder):
    assert Checkpoint(str(model_folder())).max_seq_len == 64


def test_embedded_model_is_found_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (resolve_folder(EMBEDDED) / "tokenizer.json").is_file()


@pytest.mark.parametrize("path", ["/no/such/folder", "./typo", "../typo", "typo", "a/b/c"])
def test_missing_folder_is_refused_without_asking_the_hub(path, tmp_path, monkeypatch):
    import huggingface_hub

    def never(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    with pytest.raises(ValueError, match=f"no folder.*{re.escape(path)}"):
        Checkpoint(path)


@pytest.mark.parametrize("index", [None, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]])
def test_hub_download_takes_small_files_and_what_the_index_names(index, monkeypatch, tmp_path):
    from fnmatch import fnmatch

    import huggingface_hub

    wanted = ["config.json", "tokenizer.model", "chat_template.jinja", "LICENSE", *(index or ["model.safetensors"])]
    others = ["pytorch_model.bin", "model.pt", "x.pkl", "modeling.py", "consolidated.safetensors", "model.gguf"]
    others += ["model.fp16.safetensors", "original/params.json", "original/consolidated.00.pth", "onnx/config.json"]
    fetched = set()

    def download(path, allow_patterns, ignore_patterns):
        assert path == "someone/model"
        for name in wanted + others:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                fetched.update([name] if not any(fnmatch(name, pattern) for pattern in ignore_patterns) else [])
        if index:
            content = {"weight_map": {str(number): name for number, name in enumerate(index)}}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_folder("someone/model") == tmp_path
    assert fetched == set(wanted)


def test_failing_download_is_told_with_the_name(monkeypatch):
    import huggingface_hub

    def download(path, **patterns):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"someone/model.*could not be fetched.*no route to host"):
        Checkpoint("someone/model")


def test_folder_without_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        Checkpoint(str(tmp_path))


def test_pickles_are_named_and_never_opened(own_model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (own_model / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, own_model / "pytorch_model.bin")
    for use in (lambda checkpoint: checkpoint.weight_map, lambda checkpoint: checkpoint.load()):
        with pytest.raises(ValueError, match=r"only pickle files \(pytorch_model\.bin\)"):
            use(Checkpoint(str(own_model)))
    assert not (tmp_path / "exploded").exists()


def test_no_weights_at_all(own_model):
    (own_model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="got none"):
        Checkpoint(str(own_model)).load()


@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_truncated_file_is_named(cut, own_model):
    file = own_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"model\.safetensors.*cut short"):
        Checkpoint(str(own_model)).load()


def test_empty_file_is_named(own_model):
    (own_model / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Checkpoint(str(own_model)).load()


def test_missing_shard_is_named(model_folder, tmp_path):
    folder = copy_model(model_folder(sharded=True), tmp_path / "model")
    shard = sorted(folder.glob("*-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        Checkpoint(str(folder)).load()


def test_damaged_index_is_named(model_folder, tmp_path):
    folder = copy_model(model_folder(sharded=True), tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(str(folder)).load()


def test_missing_tensor_is_named_on_read(model_folder):
    with pytest.raises(ValueError, match=r"'model\.layers\.7\.weight'.*not there"):
        Checkpoint(str(model_folder())).read(["model.norm.weight", "model.layers.7.weight"])


def test_missing_tensor_is_named_on_load(own_model):
    edit_tensors(own_model, {"model.layers.2.self_attn.k_proj.weight": None})
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.k_proj\.weight"):
        Checkpoint(str(own_model)).load()


def test_tensor_of_another_shape_is_named_on_load(own_model):
    edit_tensors(own_model, {"model.layers.2.self_attn.k_proj.weight": torch.zeros(3, 32)})
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.k_proj\.weight"):
        Checkpoint(str(own_model)).load()


def test_code_in_a_model_folder_is_never_run(own_model, tmp_path):
    from tiny_models import edit_json

    marker = tmp_path / "ran"
    (own_model / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    edit_json(own_model / "config.json", model_type="evil", auto_map={"AutoConfig": "modeling_evil.Config"})
    with pytest.raises(ValueError, match="configuration"):
        Checkpoint(str(own_model)).config  # noqa: B018
    assert not marker.exists()


def test_set_module_replaces_by_dotted_name():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    new = torch.nn.Identity()
    model.set_submodule("0.1", new)
    model.set_submodule("extra", new)
    assert model[0][1] is new
    assert model.extra is new


def test_build_makes_random_weights_in_the_wanted_type(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    built = Checkpoint(str(folder), "bfloat16").build()
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    assert not torch.equal(built.lm_head.weight.float(), load_whole(folder).lm_head.weight)
