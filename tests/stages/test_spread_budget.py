"""A budget over linears: sensitivities against autograd on the whole model, bits, resume, ranks, and the way back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rank_threads import on_ranks
from stage_runs import WINDOWS, calibrated, compress
from test_compression_run import EVALUATION, CutError, cut_behind
from tiny_models import artefacts, load_whole

from nowag_pl import NoWagPruner, NoWagQuantizer, needs
from nowag_pl.compressors.budget import Budget, settings_of
from nowag_pl.files import read_json
from nowag_pl.functional.predictions.divergence import kl_divergence
from nowag_pl.functional.predictions.sensitivity import drawn_labels
from nowag_pl.reports.build import build_report
from nowag_pl.reports.page import report_page
from nowag_pl.run.layout import CANDIDATES
from nowag_pl.stages import compression
from nowag_pl.stages.budget import candidates, sensitivity
from nowag_pl.stages.budget import spread as spreading
from nowag_pl.stages.budget.candidates import Choices
from nowag_pl.stages.moments import StoredMoments
from nowag_pl.stages.plan import CalibrationSettings
from nowag_pl.stages.sizes import ModelSizes, methods_of

pytest_plugins = ["tiny_fixtures"]

PRUNER = NoWagPruner(sparsity=0.5)
QUANTIZER = NoWagQuantizer(subvector_dim=4, codebook_size=16, max_iters=4)
NUM_SEQUENCES = 5
BUDGET = Budget(num_sequences=NUM_SEQUENCES)
TWO = Budget([{"sparsity": 0.3}, {"sparsity": 0.7}], NUM_SEQUENCES)
SMALL = Budget([{"codebook_size": 8}, {"codebook_size": 32}], num_sequences=2)


def budgeted(folder, run_dir, compressor=PRUNER, budget=BUDGET, **settings):
    run = calibrated(folder, run_dir, **settings)
    compress(run, compressor, budget)
    return run


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """Return runs that are computed once: a budget spread over linears, and the compressor everywhere."""
    folder = tmp_path_factory.mktemp("budget")
    uniform = calibrated(model_folder(), folder / "uniform")
    compress(uniform, PRUNER)
    return SimpleNamespace(spread=budgeted(model_folder(), folder / "run"), uniform=uniform)


@pytest.fixture
def spread_copy(finished, tmp_path):
    """Return the folder of a copy of the finished run, which a test may change."""
    return Path(shutil.copytree(finished.spread.store.folder, tmp_path / "run"))


def with_candidates(folder, run_dir, compressor=PRUNER):
    """Return a run with candidates and sensitivities, and the settings."""
    run, settings = calibrated(folder, run_dir), settings_of(compressor, BUDGET)
    candidates.write_candidates(run.model, run.store, StoredMoments(run.model, run.store), Choices(settings))
    sensitivity.write_sensitivities(run.model, WINDOWS[:NUM_SEQUENCES], run.store, 2)
    return run, settings


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_sensitivities_are_those_of_autograd_on_the_whole_model(family, model_folder, tmp_path):
    run, _ = with_candidates(model_folder(family, tied=True), tmp_path / "run")
    whole, windows = load_whole(model_folder(family, tied=True)).requires_grad_(True), WINDOWS[:NUM_SEQUENCES]
    records: dict[str, list] = {}

    def record(name, inputs, output):
        output.retain_grad()
        records[name] = [inputs.detach(), output]

    for name, module in whole.named_modules():
        if name.startswith("model.layers.") and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, output, name=name: record(name, args[0], output))
    logits = whole(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    uniform = torch.rand(NUM_SEQUENCES, windows.shape[1] - 1, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(logits, drawn_labels(logits.detach(), uniform.flatten()), reduction="sum").backward()
    for index in range(len(run.model)):
        losses, of_block = (
            sensitivity.read_sensitivities(run.store, index),
            candidates.read_candidates(run.store, index),
        )
        for name, by_number in of_block.items():
            inputs, output = records[f"{run.model.block_name(index)}.{name}"]
            dense = whole.get_submodule(f"{run.model.block_name(index)}.{name}").weight
            assert len(by_number) == 7
            for number, linear in by_number.items():
                error = linear.weight - dense
                expected = ((inputs @ error.T) * output.grad).square().sum() / 2 / len(logits)
                assert losses[name][number] == pytest.approx(float(expected.detach()), rel=1e-3)


def test_sensitivity_is_near_the_divergence_of_that_linear_alone(model_folder, tmp_path):
    run, settings = with_candidates(model_folder(), tmp_path / "run")
    number = next(number for number, each in enumerate(settings) if each.sparsity == 0.2)
    predicted, measured = [], []
    with torch.no_grad():
        dense = load_whole(model_folder())(WINDOWS).logits[:, :-1].flatten(0, 1)
        for index in range(len(run.model)):
            losses = sensitivity.read_sensitivities(run.store, index)
            for name, by_number in candidates.read_candidates(run.store, index).items():
                whole = load_whole(model_folder())
                linear = whole.get_submodule(f"{run.model.block_name(index)}.{name}")
                linear.weight.copy_(by_number[number].weight)
                logits = whole(WINDOWS).logits[:, :-1].flatten(0, 1)
                measured.append(float(kl_divergence(dense, logits)[0]) / len(logits))
                predicted.append(losses[name][number])
    assert torch.corrcoef(torch.tensor([predicted, measured]).log())[0, 1] > 0.95
    assert 0.5 < sum(predicted) / sum(measured) < 2


CASES = {"plain": (PRUNER, BUDGET), "refit": (replace(PRUNER, update="refit"), TWO), "quantizer": (QUANTIZER, SMALL)}


@pytest.mark.parametrize("case", CASES)
def test_bits_stay_within_those_of_the_compressor_and_divergence_under_it(case, finished, model_folder, tmp_path):
    compressor, budget = CASES[case]
    run, uniform = finished.spread, finished.uniform
    if case != "plain":
        run = budgeted(model_folder(), tmp_path / "run", compressor, budget)
        uniform = calibrated(model_folder(), tmp_path / "uniform")
        compress(uniform, compressor)
    assert run.budget["taken"] == "spread"

    def bits(each) -> float:
        return sum(row["bits_per_weight"] * row["shape"][0] * row["shape"][1] for row in each.statistics())

    assert bits(run) == pytest.approx(run.budget["spread"]["bits"], abs=1e-6)
    assert bits(uniform) == pytest.approx(run.budget["uniform"]["bits"], abs=1e-6)
    assert bits(run) <= bits(uniform)
    assert len({row["setting"] for row in run.statistics()}) > 1
    with torch.no_grad():
        windows = WINDOWS[: budget.num_sequences]
        dense, spread, same = (
            model(windows).logits[:, :-1].flatten(0, 1)
            for model in (load_whole(model_folder()), run.compressed().assemble(), uniform.compressed().assemble())
        )
    for logits, name in ((spread, "spread"), (same, "uniform")):
        expected = float(kl_divergence(dense, logits)[0]) / len(dense)
        assert run.budget[name]["divergence"] == pytest.approx(expected, rel=1e-4)
    assert run.budget["spread"]["divergence"] < run.budget["uniform"]["divergence"]
    assert not (run.store.folder / "budget" / "candidates").exists()


def test_each_linear_is_what_its_setting_makes_of_it(finished, model_folder, tmp_path):
    run = finished.spread
    by_sparsity, titles = {}, {row["name"]: row["setting"] for row in run.statistics()}
    for index in range(len(run.model)):
        for name, linear in compression.read_block(run.store, index).items():
            title = titles[f"{run.model.block_name(index)}.{name}"]
            sparsity = float(title.removeprefix("sparsity="))
            assert linear.sparsity == pytest.approx(sparsity, abs=1e-3)
            if sparsity not in by_sparsity:
                alone = calibrated(model_folder(), tmp_path / title)
                compress(alone, replace(PRUNER, sparsity=sparsity))
                by_sparsity[sparsity] = alone
            assert linear.weight.equal(compression.read_block(by_sparsity[sparsity].store, index)[name].weight)


def test_uniform_is_taken_where_it_diverges_less(finished, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(spreading, "divergences", lambda *_: [0.1, 0.1])
    run = budgeted(model_folder(), tmp_path / "run")
    assert run.budget["taken"] == "uniform"
    assert {row["setting"] for row in run.statistics()} == {"sparsity=0.5"}
    for index in range(len(run.model)):
        for name, linear in compression.read_block(run.store, index).items():
            assert linear.weight.equal(compression.read_block(finished.uniform.store, index)[name].weight)


def without_times(run_dir) -> tuple:
    decision = read_json(run_dir / "budget" / "decision.json")
    return artefacts(run_dir), {name: value for name, value in decision.items() if name not in ("seconds", "sha256")}


# 3 moments, 3 + 3 to choose, 3 + 3 to compare, the decision, then 3 + 3 are moved
@pytest.mark.parametrize("num_writes", [10, 19, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 7, 13, 15, 16))])
def test_cut_run_goes_on_to_the_same_artefacts(num_writes, model_folder, tmp_path, monkeypatch):
    budgeted(model_folder(), tmp_path / "whole", budget=TWO)
    with cut_behind(num_writes, (".safetensors", "decision.json"), monkeypatch), pytest.raises(CutError):
        budgeted(model_folder(), tmp_path / "cut", budget=TWO)
    budgeted(model_folder(), tmp_path / "cut", budget=TWO)
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")


def test_lost_block_is_made_again_as_it_was_decided(model_folder, tmp_path, monkeypatch):
    compressor, budget = replace(PRUNER, update="refit"), TWO
    budgeted(model_folder(), tmp_path / "run", compressor, budget)
    before = without_times(tmp_path / "run")
    (tmp_path / "run" / "compressed" / "block_001.safetensors").unlink()
    monkeypatch.setattr(spreading, "spread_bits", None)
    budgeted(model_folder(), tmp_path / "run", compressor, budget)
    assert without_times(tmp_path / "run") == before


@pytest.mark.parametrize("num_sequences", [NUM_SEQUENCES, 1])
def test_two_ranks_decide_as_one(num_sequences, model_folder, tmp_path):
    budget = replace(TWO, num_sequences=num_sequences)
    alone = budgeted(model_folder(), tmp_path / "one", budget=budget)
    calibrated(model_folder(), tmp_path / "two")  # ranks in threads cannot add up second moments
    runs = on_ranks(2, lambda ranks: budgeted(model_folder(), tmp_path / "two", budget=budget, ranks=ranks))
    for run in runs:
        assert [row["setting"] for row in run.statistics()] == [row["setting"] for row in alone.statistics()]
        for name in ("spread", "uniform"):
            assert run.budget[name] == pytest.approx(alone.budget[name], rel=1e-5)


def test_settings_that_do_not_fit_a_linear_are_left_out_for_it(model_folder, tmp_path):
    many = {"codebook_size": 300}  # more codewords than the small linears have subvectors
    run = budgeted(model_folder(), tmp_path / "run", QUANTIZER, Budget([many, {"codebook_size": 8}], NUM_SEQUENCES))
    sizes = {tuple(row["shape"]): row["setting"] for row in run.statistics()}
    assert {row["setting"] for row in run.statistics()} <= {f"codebook_size={size}" for size in (16, 8, 300)}
    assert len(sizes) > 1


def test_other_budgets_are_refused_in_a_run_directory(spread_copy, model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"compression\.budget = .*num_sequences': 5.* not .*num_sequences': 4"):
        budgeted(model_folder(), tmp_path / "run", budget=replace(BUDGET, num_sequences=4))
    with pytest.raises(ValueError, match=r"compression\.budget = .* not None"):
        compress(calibrated(model_folder(), tmp_path / "run"), PRUNER)


def test_settings_are_not_mixed_while_it_is_being_decided(model_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(spreading, "spread_bits", None)
        with pytest.raises(TypeError):
            budgeted(model_folder(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"budget\.update = None, not 'refit'"):
        budgeted(model_folder(), tmp_path / "run", replace(PRUNER, update="refit"))
    with pytest.raises(ValueError, match=r"calibration\.mode = 'dense', not 'propagated'"):
        budgeted(model_folder(), tmp_path / "run", mode="propagated")


@pytest.mark.parametrize("mode", ["propagated", "corrected"])
def test_other_calibrations_spread_the_bits_of_the_dense_one(mode, finished, model_folder, tmp_path):
    run, dense = budgeted(model_folder(), tmp_path / mode, mode=mode), finished.spread
    uniform = calibrated(model_folder(), tmp_path / "uniform", mode)
    compress(uniform, PRUNER)
    for figure in ("bits", "predicted"):
        assert run.budget["spread"][figure] == pytest.approx(dense.budget["spread"][figure], rel=1e-5)
    whole = run.compressed().assemble(), uniform.compressed().assemble(), load_whole(model_folder())
    with torch.no_grad():
        taken, same, reference = (each(WINDOWS[:NUM_SEQUENCES]).logits[:, :-1].flatten(0, 1) for each in whole)
    for logits, name in ((taken, run.budget["taken"]), (same, "uniform")):
        expected = float(kl_divergence(reference, logits)[0]) / len(reference)
        assert run.budget[name]["divergence"] == pytest.approx(expected, rel=1e-4)
    least = min(run.budget[name]["divergence"] for name in ("spread", "uniform"))
    assert run.budget[run.budget["taken"]]["divergence"] == least
    before = without_times(tmp_path / mode)
    (tmp_path / mode / "compressed" / "block_002.safetensors").unlink()
    budgeted(model_folder(), tmp_path / mode, mode=mode)
    assert without_times(tmp_path / mode) == before


def test_report_and_page_say_what_was_taken(finished):
    run = finished.spread
    metrics = {"dense": {"perplexity": {"one": 5.0}}, "one_shot": {"perplexity": {"one": 6.0}}}
    report = build_report(run, {"one": EVALUATION["one"]}, metrics, {"evaluation": 1.0})
    assert json.loads(json.dumps(report)) == report
    assert report["budget"]["taken"] == "spread"
    assert report["seconds"]["budget"] > 0
    assert report["budget"]["settings"][0] == "sparsity=0.5"
    assert all(row["setting"] in report["budget"]["settings"] for row in report["linears"])
    assert report["settings"]["compression.budget"]["num_sequences"] == NUM_SEQUENCES
    page = report_page(report)
    assert "sparsity=0.5 everywhere" in page
    assert "spread by sensitivity (taken)" in page
    report = build_report(finished.uniform, {"one": EVALUATION["one"]}, metrics, {"evaluation": 1.0})
    assert report["budget"] is None
    assert "Budget" not in report_page(report)


def test_preflight_foresees_the_candidates(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(spreading.ArtefactStore, "remove", lambda self, stage: None)
    run = budgeted(model_folder(), tmp_path / "run", QUANTIZER, SMALL)
    sizes = ModelSizes.of(run.checkpoint, methods_of(run))
    stage = needs.budget(sizes, CalibrationSettings(batch_size=2), NUM_SEQUENCES, 24)
    written = [sum(t.nbytes for t in run.store.read(CANDIDATES, index)[0].values()) for index in range(3)]
    assert [sizes.total.candidates, sizes.block.candidates] == [sum(written), max(written)]
    assert stage.disk == sum(written) + sizes.total.stored
    assert stage.shared_host == 5 * NUM_SEQUENCES * 24 * run.model.hidden_size * 4
    assert stage.device > sizes.skeleton + sizes.dense_block + max(written)
