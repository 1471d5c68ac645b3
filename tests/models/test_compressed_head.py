"""A compressed head is stored once, with the embeddings that are tied to it, and opens everywhere."""

import pytest
import torch
import transformers
from stage_runs import WINDOWS, run_of
from tiny_models import random_tokens

import nowag_pl
from nowag_pl import NoWagPruner, NoWagTrellis
from nowag_pl.files import read_json
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.compressed_head import compressed_head, head_name, tied_embedding
from nowag_pl.models.format.saving import save_dense
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.models.weights import read_headers
from nowag_pl.stages.export import check_export_of_run
from nowag_pl.stages.plan import CompressionSettings

pytest_plugins = ["tiny_fixtures"]

TOKENS = random_tokens(2, 16, seed=5)
CLOSE = 3e-3  # few tokens are multiplied by packed tiles
EXL3 = NoWagTrellis(bits=2, state_bits=16, multiple=128, rotation="both")


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def compressed(folder, run_dir, **more):
    run = run_of(folder, run_dir, NoWagPruner(0.5), head=6, **more)
    run.calibrate(WINDOWS)
    run.compress()
    return run


@pytest.fixture(scope="module", params=["tied", "untied"])
def run(request, tmp_path_factory):
    """Return a run over a model with or without a head of its own, whose export lies in its folder."""
    from tiny_models import save_tiny_model

    folder = tmp_path_factory.mktemp("head")
    source = save_tiny_model(folder / "dense", tied=request.param == "tied")
    found = compressed(source, folder / "run")
    found.compressed().save(folder / "run" / "export")
    return found


def stored_names(folder):
    return set(read_headers(sorted(folder.glob("*.safetensors"))))


def test_embeddings_are_stored_unless_the_packed_head_gives_them(run):
    names, is_tied = stored_names(run.store.folder / "export"), run.checkpoint.config.tie_word_embeddings
    assert {"lm_head.codes", "lm_head.in_scale", "lm_head.out_scale"} <= names
    assert ("model.embed_tokens.weight" in names) != is_tied
    assert tied_embedding(run.model.skeleton) == ("model.embed_tokens.weight" if is_tied else None)


def test_all_ways_to_open_an_export_give_the_same_logits(run, tmp_path):
    folder = run.store.folder / "export"
    expected = logits(run.compressed().assemble())
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for model in (opened, nowag_pl.load_compressed(folder), nowag_pl.load_compressed(folder, packed=True)):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=CLOSE)
    opened.save_pretrained(tmp_path / "again")
    assert stored_names(tmp_path / "again") == stored_names(folder)
    streamed = StreamedModel(Checkpoint(str(folder)))
    hidden = streamed.embed(TOKENS).hidden
    for index in range(len(streamed)):
        block = streamed.load_block(index)
        hidden = streamed.forward_block(block, hidden, streamed.arguments(index, *TOKENS.shape))
    torch.testing.assert_close(streamed.head(hidden), expected, rtol=0, atol=CLOSE)
    save_dense(opened, tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert isinstance(dense.lm_head, torch.nn.Linear)
    torch.testing.assert_close(logits(dense), expected, rtol=0, atol=CLOSE)


def test_a_model_opens_tied_when_it_is_unpacked_or_dequantized(run):
    model = transformers.AutoModelForCausalLM.from_pretrained(run.store.folder / "export", dtype="auto")
    is_tied, embeddings = model.config.tie_word_embeddings, model.get_input_embeddings()
    with torch.no_grad():
        assert (embeddings.weight.data_ptr() == model.lm_head.dense_weight(model.dtype).data_ptr()) == is_tied
    expected = logits(model)
    model = model.dequantize()
    assert (embeddings.weight is model.lm_head.weight) == is_tied
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=CLOSE)


def test_the_head_loses_little_and_counts_in_the_size(run):
    figures = run.head_statistics()
    assert figures["name"] == "lm_head"
    # 6 bits lose some 4^-6 of a Gaussian weight.
    assert 1e-4 < figures["loss"] < 2e-3
    size, hidden = figures["shape"]
    assert figures["bits_per_weight"] == pytest.approx(6 + 16 * (size + hidden) / (size * hidden))
    assert figures["bytes"] * 8 == pytest.approx(figures["bits_per_weight"] * size * hidden)


def test_another_head_in_the_same_run_is_refused_and_the_same_one_is_read(run, monkeypatch):
    monkeypatch.setattr(NoWagTrellis, "compress", None)
    again = run_of(run.checkpoint.folder, run.store.folder, NoWagPruner(0.5), head=6)
    again.calibrate(WINDOWS)
    assert compressed_head(again.model.skeleton) is not None
    other = run_of(run.checkpoint.folder, run.store.folder, NoWagPruner(0.5), head=5)
    with pytest.raises(ValueError, match="bits = 6, not 5"):
        other.calibrate(WINDOWS)


@pytest.mark.parametrize("bits", [0, 9, True])
def test_bits_out_of_range_are_refused(bits, model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"compression\.head"):
        run_of(model_folder(), tmp_path, head=bits)


def test_exl3_holds_a_head_and_embeddings_of_their_own(model_folder, tmp_path):
    folder = model_folder(tied=True, hidden_size=128, intermediate_size=128)
    fitting = run_of(folder, tmp_path / "run", EXL3, head=6)
    check_export_of_run(fitting)
    fitting.plan.compression = CompressionSettings(NoWagTrellis(rotation="both"), head=6)
    with pytest.raises(ValueError, match="state_bits 16"):
        check_export_of_run(fitting)


@pytest.mark.slow
def test_exl3_folder_with_a_head(model_folder, tmp_path):
    folder = model_folder(tied=True, hidden_size=128, intermediate_size=128)
    run = run_of(folder, tmp_path / "run", EXL3, head=6)
    run.calibrate(WINDOWS)
    run.compress()
    run.compressed().save(tmp_path / "exl3", "exl3")
    config = read_json(tmp_path / "exl3" / "config.json")["quantization_config"]
    assert (config["bits"], config["head_bits"]) == (2.0, 6)
    names = stored_names(tmp_path / "exl3")
    assert {"lm_head.trellis", "model.embed_tokens.weight"} <= names
    torch.testing.assert_close(
        logits(Checkpoint(str(tmp_path / "exl3")).load()), logits(run.compressed().assemble()), rtol=0, atol=2e-2
    )


def test_modules_without_a_head_have_none():
    assert head_name(torch.nn.Linear(2, 2)) is None
    assert compressed_head(torch.nn.Linear(2, 2)) is None
