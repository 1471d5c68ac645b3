"""Any folder of the same architecture is measured against the dense model."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, edit_tensors, load_whole, save_tiny_model

from benchmarks.folder_quality import compare, measure
from benchmarks.protocol import HELD_OUT, STANDARD, Protocol, Texts, arguments, texts
from nowag_pl.models.checkpoint import Checkpoint

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(0))


def test_figures_are_those_of_the_definitions(model_folder, windows):
    model, reference = load_whole(model_folder()), load_whole(model_folder(seed=1))
    figures = compare(model, reference, windows)
    nll = divergence = equal = 0.0
    with torch.no_grad():
        for window in windows:
            p, q = (each(window[None]).logits[0].double().softmax(-1) for each in (reference, model))
            for position in range(len(window) - 1):
                nll -= float(q[position, window[position + 1]].log())
                divergence += float((p[position] * (p[position] / q[position]).log()).sum())
                equal += int(p[position].argmax() == q[position].argmax())
    predictions = 5 * 15
    assert figures["perplexity"] == pytest.approx(float(torch.tensor(nll / predictions).exp()), rel=1e-4)
    assert figures["kl_divergence"] == pytest.approx(divergence / predictions, rel=1e-4)
    assert figures["top1_agreement"] == pytest.approx(equal / predictions)
    assert figures["windows"] == 5


def test_a_model_agrees_with_itself(model_folder, windows):
    model = load_whole(model_folder())
    figures = compare(model, model, windows)
    assert figures["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert figures["top1_agreement"] == 1
    assert figures["dense_perplexity"] == figures["perplexity"] == compare(model, None, windows)["perplexity"]


def test_folder_of_another_program_is_measured(model_folder, workplace, tmp_path):
    folder = Path(shutil.copytree(model_folder(), tmp_path / "other"))
    edit_tensors(folder, {"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)})
    chosen = Texts(workplace / "eval.txt", None)
    figures = measure(Checkpoint(str(folder)), Checkpoint(str(model_folder())), chosen, 32, 2)
    assert figures["windows"] == 2
    assert figures["kl_divergence"] > 1e-4


def test_another_vocabulary_is_refused(model_folder, workplace, tmp_path):
    other = save_tiny_model(tmp_path / "other", vocab_size=VOCABULARY + 8)
    with pytest.raises(ValueError, match=r"to be of the reference's architecture, with 2048 tokens, but got 2056"):
        measure(Checkpoint(str(other)), Checkpoint(str(model_folder())), Texts(workplace / "eval.txt", None), 32, 2)


def test_stretch_is_cut_by_bytes_and_held_out_text_is_another(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext2-raw-test.txt").write_bytes("abcé\nfgh".encode())
    (tmp_path / "data" / "prose-calibration.txt").write_text("prose")
    cut = texts(Protocol("a", 0, 4, 0), tmp_path, tmp_path / "out")
    assert cut.evaluation.read_bytes() == b"abc"  # the fourth byte is half of a character
    assert texts(Protocol("b", 5, 9, 0), tmp_path, tmp_path / "out").evaluation.read_bytes() == b"\nfgh"
    assert STANDARD.stop <= HELD_OUT.start
    assert STANDARD.seed != HELD_OUT.seed


def test_without_the_shared_texts_the_built_in_one_is_taken(tmp_path):
    chosen = texts(STANDARD, tmp_path, tmp_path / "out")
    assert chosen.eval_name == "python-docs"
    assert not any("files" in option for option in arguments(STANDARD, chosen, None))
    assert "--data.max_eval_windows=3" in arguments(STANDARD, chosen, 3)
