"""Each family of models through the command line: compressed, finetuned, exported, measured again."""

import pytest
import torch
from test_finetuning import BLOCKWISE, DISTILLATION, METHODS
from test_fit_and_validate import perplexity, perplexity_shown, read_report, text_windows
from tiny_models import FAMILIES, fit_arguments, load_whole, validate_arguments

from nowag_pl import load_compressed, save_compressed

pytest_plugins = ["tiny_fixtures"]

SHORT = ("--finetuning.max_epochs=1", "--trainer.max_epochs=1")
# Models without finetuning go through in test_fit_and_validate; those here differ most from a Llama.
DEFAULT = {("gemma3", "nowag_p_2_4"), ("qwen2", "nowag_vq")}
RUNS = [
    pytest.param(family, method, marks=[] if (family, method) in DEFAULT else pytest.mark.slow)
    for family in FAMILIES
    for method in METHODS
]


@pytest.mark.parametrize(("family", "method"), RUNS)
def test_family_from_dense_to_finetuned(family, method, command_line, model_folder, workplace, tmp_path):
    folder, run_dir = model_folder(family, sharded=True), tmp_path / "run"
    arguments = (*METHODS[method], *BLOCKWISE, *DISTILLATION, *SHORT)
    assert command_line(fit_arguments(workplace, folder, run_dir, *arguments)).code == 0
    report, windows, dense = read_report(run_dir), text_windows(workplace, folder), load_whole(folder)
    figures, divergences = report["perplexity"]["held_out"], report["kl_divergence"]["held_out"]
    assert figures["dense"] == pytest.approx(perplexity(dense, windows), rel=1e-5)
    assert divergences["finetuned"] < divergences["one_shot"]
    for phase, export in (("one_shot", "export"), ("finetuned", "export_finetuned")):
        model = load_compressed(run_dir / export)
        assert perplexity(model, windows) == pytest.approx(figures[phase], rel=1e-5)
        save_compressed(model, tmp_path / "again")
        with torch.no_grad():
            assert torch.equal(load_compressed(tmp_path / "again")(windows).logits, model(windows).logits)
    outcome = command_line(validate_arguments(workplace, run_dir / "export", tmp_path / "validation"))
    assert perplexity_shown(outcome.output) == pytest.approx(figures["one_shot"], rel=1e-4, abs=1e-3)
