"""Every byte of a model counts; what was found of a large file is remembered until it changes."""

import os

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import copy_model, edit_tensors

from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.run import fingerprint as fingerprints
from nowag_pl.run.fingerprint import check_finite, fingerprint

pytest_plugins = ["tiny_fixtures"]


def of(folder):
    return fingerprint(Checkpoint(str(folder)))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Remember small files too, in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "_WORTH_CACHING", 0)
    return tmp_path / "cache"


@pytest.mark.parametrize("place", [0.0, 0.3, 0.77, 1.0])
def test_one_other_weight_anywhere_is_another_model(place, model_folder, tmp_path):
    source = model_folder()
    names = sorted(load_file(source / "model.safetensors"))
    name = names[round(place * (len(names) - 1))]
    changed = copy_model(source, tmp_path / "model")
    assert of(changed) == of(source)
    weight = load_file(changed / "model.safetensors")[name]
    weight.view(-1)[-1] += 1
    edit_tensors(changed, {name: weight})
    assert of(changed) != of(source)


def test_remembered_file_is_not_read_again_until_it_changes(cache, model_folder, tmp_path, monkeypatch):
    folder = copy_model(model_folder(), tmp_path / "model")
    found = of(folder)
    monkeypatch.setattr(fingerprints, "file_digest", lambda file: pytest.fail("read again"))
    assert of(folder) == found
    assert len(list(cache.rglob("*.json"))) == 1
    file = folder / "model.safetensors"
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    monkeypatch.setattr(fingerprints, "file_digest", lambda file: "other")
    assert of(folder) != found


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensor_that_is_not_finite_is_named(name, value, cache, model_folder, tmp_path):
    folder = copy_model(model_folder(), tmp_path / "model")
    check_finite(Checkpoint(str(folder)))
    weight = load_file(folder / "model.safetensors")[name].clone()
    weight.view(-1)[0] = value
    edit_tensors(folder, {name: weight})
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{name.removesuffix('.weight')}: Expected finite weights"):
            check_finite(Checkpoint(str(folder)))
    assert torch.isfinite(weight.view(-1)[1:]).all()
