"""A flipped byte anywhere in an export is found, or changes nothing."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_assembly import COMPRESSORS, compressed_linears, logits
from tiny_models import copy_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from nowag_pl import load_compressed, save_compressed, save_dense
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format import checksums
from nowag_pl.models.format.checksums import Checksums
from nowag_pl.models.format.saving import is_compressed
from nowag_pl.models.streaming import StreamedModel

pytest_plugins = ["tiny_fixtures"]

INDEX = "model.safetensors.index.json"
UNCHECKED = (INDEX, "README.md")
TEXT = "a matrix of weights"


@pytest.fixture(scope="module")
def export(model_folder, tmp_path_factory):
    """Return folders of a packed and a dense export in several shards, and what their model says."""
    source, folder = model_folder(), tmp_path_factory.mktemp("exports")
    model = assemble(Checkpoint(str(source)), compressed_linears(source, COMPRESSORS["quantized"]))
    save_compressed(model, folder / "packed", source=str(source), max_shard_bytes=6000)
    save_dense(model, folder / "dense", source=str(source), max_shard_bytes=6000)
    return folder, logits(model)


def open_by_package(folder):
    checkpoint = Checkpoint(str(folder))
    model = load_compressed(folder) if is_compressed(folder) else checkpoint.load()
    return logits(model), checkpoint.tokenizer(TEXT)["input_ids"], model.generation_config.to_dict()


@pytest.fixture(scope="module")
def opened(export):
    """Return what the whole folders give."""
    return {kind: open_by_package(export[0] / kind) for kind in ("packed", "dense")}


@pytest.mark.parametrize("kind", ["packed", "dense"])
@settings(max_examples=15)
@given(data=st.data())
def test_flipped_byte_is_found_or_harmless(kind, export, opened, data):
    folder, expected = export[0] / kind, opened[kind]
    file = data.draw(st.sampled_from(sorted(path for path in folder.iterdir())))
    content = file.read_bytes()
    place, flip = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
    damaged = bytearray(content)
    damaged[place] ^= flip
    file.write_bytes(damaged)
    try:
        actual = open_by_package(folder)
    except ValueError:
        return
    finally:
        file.write_bytes(content)
    assert file.name in UNCHECKED
    assert torch.equal(actual[0], expected[0])
    assert actual[1:] == expected[1:]


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_every_file_but_the_index_is_refused_by_name(kind, export, tmp_path):
    names = sorted(path.name for path in (export[0] / kind).iterdir() if path.name not in UNCHECKED)
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < set(names)
    for name in names:
        folder = copy_model(export[0] / kind, tmp_path / kind / name)
        content = bytearray((folder / name).read_bytes())
        content[-2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(name)):
            open_by_package(folder)


@pytest.mark.parametrize("pattern", ["tokenizer.json", "model-00002-of-*.safetensors"])
def test_missing_file_is_named(pattern, export, tmp_path):
    folder = copy_model(export[0] / "packed", tmp_path / "packed")
    [file] = folder.glob(pattern)
    file.unlink()
    with pytest.raises(ValueError, match=re.escape(file.name)):
        load_compressed(folder)


@settings(max_examples=15)
@given(data=st.data())
def test_transformers_finds_flipped_bytes(export, data):
    folder = export[0] / "packed"
    file = data.draw(st.sampled_from(sorted(path for path in folder.iterdir() if path.name not in UNCHECKED)))
    content = file.read_bytes()
    start = content.find(b'"format"') if file.name == "config.json" else 0
    place = data.draw(st.integers(start, len(content) - 1))
    file.write_bytes(content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :])
    try:
        with pytest.raises((ValueError, OSError)):
            AutoModelForCausalLM.from_pretrained(folder)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_transformers_refuses_small_files_by_name(name, export, tmp_path):
    folder = copy_model(export[0] / "packed", tmp_path / "packed")
    (folder / name).write_text((folder / name).read_text() + "\n")
    expected = rf"Expected {re.escape(str(folder / name))} as it was written, but its SHA-256"
    with pytest.raises(ValueError, match=expected):
        AutoModelForCausalLM.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config |= {"verify": False, "packed": True}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, config=config)), export[1])


def test_transformers_checks_the_files_that_are_there(export, tmp_path):
    folder = copy_model(export[0] / "packed", tmp_path / "packed")
    for name in ("generation_config.json", "tokenizer.json"):
        (folder / name).unlink()
    actual = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(actual, export[1], rtol=1e-4, atol=1e-4)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json as it was written"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_transformers_checks_what_it_fetches_after_the_weights(export, tmp_path, monkeypatch):
    folder = copy_model(export[0] / "packed", tmp_path / "packed")
    file = folder / "generation_config.json"
    content = file.read_text()
    file.unlink()
    from_pretrained = GenerationConfig.from_pretrained

    def fetch(*arguments, **settings):
        file.write_text(content + "\n")
        return from_pretrained(*arguments, **settings)

    monkeypatch.setattr(GenerationConfig, "from_pretrained", fetch)
    with pytest.raises(ValueError, match=r"generation_config\.json as it was written"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def compared(monkeypatch):
    """Return the names of the files whose checksums were computed."""
    names = []
    digest = checksums.file_digest
    monkeypatch.setattr(checksums, "file_digest", lambda path: (names.append(path.name), digest(path))[1])
    return names


def test_transformers_compares_each_file_once_and_the_weights_last(export, compared):
    AutoModelForCausalLM.from_pretrained(export[0] / "packed")
    assert compared == sorted(compared, key=lambda name: name.endswith(".safetensors"))
    assert sorted(compared) == sorted(
        path.name for path in (export[0] / "packed").iterdir() if path.name not in UNCHECKED
    )


def test_trusted_files_are_not_compared(export, tmp_path):
    folder = copy_model(export[0] / "packed", tmp_path / "packed")
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"generation_config\.json.*SHA-256"):
        load_compressed(folder)
    assert torch.equal(logits(load_compressed(folder, verify=False, packed=True)), export[1])
    assert Checkpoint(str(folder), verify=False).config.vocab_size


def test_streaming_compares_each_file_once_and_only_what_it_reads(export, compared):
    model = StreamedModel(Checkpoint(str(export[0] / "packed")))
    model.load_block(2)
    for index in (0, 1, 2, 0, 1, 2):
        model.load_block(index)
    assert sorted(compared) == sorted(
        path.name for path in (export[0] / "packed").iterdir() if path.name not in UNCHECKED
    )


def test_damaged_block_is_found_when_it_is_read(export, tmp_path):
    folder = copy_model(export[0] / "packed", tmp_path / "packed")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    file = folder / weight_map["model.layers.2.mlp.down_proj.codes"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 128
    file.write_bytes(content)
    model = StreamedModel(Checkpoint(str(folder)))
    model.load_block(0)
    for _ in range(2):  # it is no better the second time
        with pytest.raises(ValueError, match=re.escape(file.name)):
            model.load_block(2)


@pytest.mark.parametrize("content", ["[]", '{"metadata": []}', '{"metadata": {"sha256": 1}}', "{"])
def test_index_that_is_none_is_refused(content, tmp_path):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match="damaged"):
        Checksums(tmp_path).check_small_files()


def test_folder_of_another_program_passes(model_folder):
    folder = model_folder(sharded=True)
    Checksums(folder).check(*folder.iterdir())
    assert not Checksums(folder).covers([folder / "config.json"])
