"""Runs: resume, refusal, reproducibility, and the numbers of the report, recomputed."""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from math import log
from pathlib import Path

import pytest
import torch
from rank_threads import on_ranks
from stage_runs import WINDOWS, calibrated, compress, plan_of, run_of
from test_calibrated_moments import Alone
from tiny_models import artefacts, load_whole, random_tokens

from nowag_pl import ArmorCompressor, NoWagPruner, NoWagQuantizer
from nowag_pl.compressors import Compressor
from nowag_pl.data.tokens import tokens_digest
from nowag_pl.files import read_sealed_json, write_sealed_json
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.reports.build import build_report
from nowag_pl.run.layout import MOMENTS
from nowag_pl.stages import compression
from nowag_pl.stages.compression import read_block
from nowag_pl.stages.compression_run import CompressionRun

pytest_plugins = ["tiny_fixtures"]

QUANTIZER = NoWagQuantizer(subvector_dim=4, codebook_size=8, max_iters=4)
EVALUATION = {"one": random_tokens(5, 24, seed=1), "two": random_tokens(3, 24, seed=2)}


def everything(folder, run_dir, compressor=QUANTIZER, mode="dense", windows=WINDOWS) -> CompressionRun:
    run = calibrated(folder, run_dir, mode, windows=windows)
    compress(run, compressor)
    run.reference(EVALUATION, 2)
    return run


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """Put a copy of a finished run into a folder; each is computed once."""
    made: dict[tuple[str, str], Path] = {}

    def copy(target: Path, compressor: Compressor = QUANTIZER, mode: str = "dense") -> Path:
        key = repr(compressor), mode
        if key not in made:
            made[key] = tmp_path_factory.mktemp("finished") / "run"
            everything(model_folder(), made[key], compressor, mode)
        return Path(shutil.copytree(made[key], target))

    return copy


class CutError(Exception):
    """The process ends here."""


@contextmanager
def cut_behind(num_writes, endings, monkeypatch):
    """Raise CutError when one more file than that is to be put in its place."""
    putting, count = os.replace, 0

    def cutting(source, target):
        nonlocal count
        if str(target).endswith(endings):
            if count == num_writes:
                raise CutError
            count += 1
        putting(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cutting)
        yield


@pytest.mark.parametrize(  # writes of 3 moments, 3 compressed blocks, 2 references, in any mode
    ("mode", "num_writes"),
    [
        *product(["dense"], [1, 4, 7, 8]),
        ("propagated", 4),
        ("corrected", 3),
        *(pytest.param("dense", number, marks=pytest.mark.slow) for number in (0, 2, 3, 5, 6)),
        *(pytest.param("propagated", number, marks=pytest.mark.slow) for number in (0, 1, 2, 3, 5, 6, 7, 8)),
        *(pytest.param("corrected", number, marks=pytest.mark.slow) for number in (0, 4)),
    ],
)
def test_cut_run_goes_on_to_the_same_artefacts(mode, num_writes, finished, model_folder, tmp_path, monkeypatch):
    finished(tmp_path / "whole", mode=mode)
    with cut_behind(num_writes, (".safetensors", ".npy"), monkeypatch):
        if num_writes < 8:
            with pytest.raises(CutError):
                everything(model_folder(), tmp_path / "cut", mode=mode)
        else:
            everything(model_folder(), tmp_path / "cut", mode=mode)
    assert len(artefacts(tmp_path / "cut")) == num_writes
    everything(model_folder(), tmp_path / "cut", mode=mode)
    assert artefacts(tmp_path / "cut") == artefacts(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("**/*.tmp"))


def test_finished_run_does_nothing_again(finished, model_folder, tmp_path, monkeypatch):
    finished(tmp_path / "run")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("*/*.safetensors")}

    def never(self, index):
        raise AssertionError("a block was read")

    monkeypatch.setattr(StreamedModel, "load_block", never)
    everything(model_folder(), tmp_path / "run")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("*/*.safetensors")} == files


@pytest.mark.parametrize("stage", ["moments", "compressed"])
def test_one_lost_artefact_is_made_again(stage, finished, model_folder, tmp_path):
    finished(tmp_path / "run")
    before = artefacts(tmp_path / "run")
    (tmp_path / "run" / stage / "block_001.safetensors").unlink()
    everything(model_folder(), tmp_path / "run")
    assert artefacts(tmp_path / "run") == before


def test_temporary_files_of_a_killed_process_are_not_read(finished, model_folder, tmp_path):
    finished(tmp_path / "whole")
    for stage in ("moments", "compressed"):
        folder = tmp_path / "run" / stage
        folder.mkdir(parents=True)
        (folder / ".block_001.safetensors.0123456789abcdef.tmp").write_bytes(b"half of a file")
    everything(model_folder(), tmp_path / "run")
    assert artefacts(tmp_path / "run") == artefacts(tmp_path / "whole")


def test_same_settings_give_the_same_bytes_whatever_the_global_random_state(finished, model_folder, tmp_path):
    finished(tmp_path / "one")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    everything(model_folder(), tmp_path / "two")
    assert artefacts(tmp_path / "one") == artefacts(tmp_path / "two")
    assert torch.equal(torch.get_rng_state(), state)


def test_two_ranks_fit_the_factors_that_one_fits(model_folder, tmp_path):
    compressor = ArmorCompressor(block_size=8, max_iters=20)
    compress(calibrated(model_folder("qwen2"), tmp_path / "one"), compressor)
    shutil.copytree(tmp_path / "one" / "moments", tmp_path / "two" / "moments")
    shutil.copy(tmp_path / "one" / "manifest.json", tmp_path / "two")

    on_ranks(2, lambda ranks: compress(calibrated(model_folder("qwen2"), tmp_path / "two", ranks=ranks), compressor))
    assert artefacts(tmp_path / "one") == artefacts(tmp_path / "two")


def test_another_seed_gives_other_codes(finished, model_folder, tmp_path):
    finished(tmp_path / "one")
    other = replace(QUANTIZER, seed=1)
    everything(model_folder(), tmp_path / "two", other)
    one, two = artefacts(tmp_path / "one"), artefacts(tmp_path / "two")
    for index in range(3):
        assert one[f"moments/block_{index:03d}.safetensors"] == two[f"moments/block_{index:03d}.safetensors"]
        name = f"compressed/block_{index:03d}.safetensors"
        assert all(one[name][0][key] != two[name][0][key] for key in one[name][0] if "codebook" in key)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"compressor": NoWagPruner(sparsity=0.25)}, r"compression\.sparsity = 0\.5, not 0\.25"),
        ({"compressor": NoWagPruner(pattern=(2, 4))}, r"compression\.pattern = None, not \[2, 4\]"),
        ({"compressor": QUANTIZER}, r"compression\.compressor = 'NoWagPruner', not 'NoWagQuantizer'"),
        ({"windows": WINDOWS[:5]}, r"calibration\.num_sequences = 7, not 5"),
        ({"windows": WINDOWS[:, :20]}, r"calibration\.seq_len = 24, not 20"),
        ({"windows": WINDOWS.flip(0)}, r"calibration\.tokens_sha256"),
        ({"mode": "propagated"}, r"calibration\.mode = 'dense', not 'propagated'"),
    ],
)
def test_other_settings_are_refused_and_named(change, name, finished, model_folder, tmp_path):
    finished(tmp_path / "run", NoWagPruner())
    before = artefacts(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"{name}.*choose another run_dir"):
        everything(model_folder(), tmp_path / "run", **({"compressor": NoWagPruner()} | change))
    assert artefacts(tmp_path / "run") == before


def test_other_calibration_seed_is_refused_and_named(model_folder, tmp_path):
    calibrated(model_folder(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"calibration\.seed = 0, not 3"):
        calibrated(model_folder(), tmp_path / "run", seed=3)


@pytest.mark.parametrize("checkpoint", ["other weights", "other configuration", "other type"])
def test_other_model_is_refused(checkpoint, model_folder, tmp_path):
    other = {
        "other weights": lambda: Checkpoint(str(model_folder(seed=1))),
        "other configuration": lambda: Checkpoint(str(model_folder(rms_norm_eps=1e-5))),
        "other type": lambda: Checkpoint(str(model_folder()), "bfloat16"),
    }[checkpoint]()
    run_of(model_folder(), tmp_path / "run")
    name = r"model\.dtype = 'float32', not 'bfloat16'" if checkpoint == "other type" else r"model\.fingerprint"
    with pytest.raises(ValueError, match=name):
        CompressionRun(other, tmp_path / "run", plan_of())


def test_same_model_elsewhere_is_taken(model_folder, tmp_path):
    from tiny_models import copy_model

    run_of(model_folder(), tmp_path / "run")
    run_of(copy_model(model_folder(), tmp_path / "copy"), tmp_path / "run")


def test_batch_size_may_change_between_runs(model_folder, tmp_path):
    calibrated(model_folder(), tmp_path / "run", batch_size=2)
    calibrated(model_folder(), tmp_path / "run", batch_size=5)


def test_artefacts_without_manifest_are_refused(model_folder, tmp_path):
    calibrated(model_folder(), tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json beside .*block_000"):
        calibrated(model_folder(), tmp_path / "run")


def test_other_format_of_run_dir_is_refused(model_folder, tmp_path):
    calibrated(model_folder(), tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    write_sealed_json(manifest, read_sealed_json(manifest) | {"format": 2})
    with pytest.raises(ValueError, match="format 2"):
        calibrated(model_folder(), tmp_path / "run")


def test_compressing_before_calibrating_is_refused(model_folder, tmp_path):
    with pytest.raises(RuntimeError, match="calibrate before compress"):
        run_of(model_folder(), tmp_path / "run").compress()


def test_compressor_of_ones_own_is_taken(model_folder, tmp_path):
    class Second(Compressor):
        """Keep every second weight."""

        def compress(self, linear, second_moment):
            from nowag_pl.modules import MaskedLinear

            keep = torch.arange(linear.weight.numel()).view(linear.weight.shape) % 2 == 0
            return MaskedLinear(linear.weight, keep, linear.bias)

    run = calibrated(model_folder("qwen2"), tmp_path / "run")
    compress(run, Second())
    weight = run.compressed().assemble().model.layers[2].mlp.up_proj.weight
    assert (weight.flatten()[1::2] == 0).all()
    assert (weight.flatten()[::2] != 0).all()


def test_failing_compressor_names_the_linear(model_folder, tmp_path):
    run = calibrated(model_folder(intermediate_size=46), tmp_path / "run")
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.down_proj: .*divisible by 4.*46"):
        compress(run, NoWagPruner(pattern=(2, 4)))


def test_assembled_model_holds_what_the_artefacts_hold(model_folder, tmp_path):
    run = everything(model_folder("qwen3"), tmp_path / "run")
    model, whole = run.compressed().assemble(), load_whole(model_folder("qwen3"))
    for index in range(3):
        linears = read_block(run.store, index)
        for name, linear in linears.items():
            assert torch.equal(model.model.layers[index].get_submodule(name).weight, linear.weight)
            with torch.no_grad():
                whole.model.layers[index].get_submodule(name).weight.copy_(linear.weight)
    with torch.no_grad():
        torch.testing.assert_close(model(WINDOWS).logits, whole(WINDOWS).logits, atol=1e-5, rtol=0)


def scalar_loss(weight: torch.Tensor, reconstruction: torch.Tensor, moment: torch.Tensor) -> float:
    """Return the objective over its value at zero, from the equations of the paper, in float64."""
    weight, reconstruction = weight.detach().double(), reconstruction.detach().double()
    in_scale = weight.norm(dim=0)
    out_scale = (weight / in_scale).norm(dim=1)
    normalized = weight / in_scale / out_scale[:, None]
    error = normalized - reconstruction / in_scale / out_scale[:, None]
    return float((error.square() * moment).sum() / (normalized.square() * moment).sum())


@pytest.mark.parametrize(
    "compressor", [NoWagPruner(sparsity=0.3), NoWagPruner(pattern=(2, 4)), QUANTIZER], ids=["0.3", "2:4", "vq"]
)
def test_report_numbers_recomputed(compressor, model_folder, tmp_path):
    folder = model_folder("qwen2", tied=True)
    run = everything(folder, tmp_path / "run", compressor)
    metrics = {
        "dense": {"perplexity": {"one": 5.0}},
        "one_shot": {"perplexity": {"one": 6.0}, "kl_divergence": {"one": 0.1}},
    }
    windows = {"one": random_tokens(5, 24)}
    report = build_report(run, windows, metrics, {"evaluation": 1.5})
    assert report["protocol"] == {"one": {"num_windows": 5, "sha256": tokens_digest(windows["one"]), "bos": "stream"}}
    whole, compressed = load_whole(folder), run.compressed().assemble()
    total_bits = total_removed = total = 0.0
    for row in report["linears"]:
        dense, linear = whole.get_submodule(row["name"]), compressed.get_submodule(row["name"])
        index = int(row["name"].split(".")[2])
        moment = run.store.read(MOMENTS, index)[0][row["name"].split(".", 3)[3]]
        rows, columns = dense.weight.shape
        assert row["shape"] == [rows, columns]
        assert row["loss"] == pytest.approx(scalar_loss(dense.weight, linear.weight, moment), rel=1e-4)
        if compressor is QUANTIZER:
            bits = (rows * columns / 4 * log(8, 2) + 16 * (8 * 4 + rows + columns)) / (rows * columns)
            removed = 0.0
        else:
            removed = float((linear.weight == 0).double().mean())
            mask_bits = 1 if compressor.pattern is None else 3 / 4  # 6 of 8 states: C(4, 2)
            bits = (1 - removed) * 32 + mask_bits
        assert row["bits_per_weight"] == pytest.approx(bits)
        assert row["sparsity"] == pytest.approx(removed)
        total_bits += bits * rows * columns
        total_removed += removed * rows * columns
        total += rows * columns
    assert len(report["linears"]) == 21
    assert report["num_compressed_parameters"] == total
    assert report["num_parameters"] == sum(p.numel() for p in whole.parameters())
    assert report["bits_per_weight"] == pytest.approx(total_bits / total)
    assert report["sparsity"] == pytest.approx(total_removed / total)
    assert report["bytes_on_disk"] == pytest.approx(total_bits / 8, rel=0.01)
    assert report["perplexity"] == {"one": {"dense": 5.0, "one_shot": 6.0, "finetuned": None}}
    assert report["kl_divergence"] == {"one": {"one_shot": 0.1, "finetuned": None}}
    assert report["calibration"]["num_tokens"] == WINDOWS.numel()
    assert json.loads(json.dumps(report)) == report


def test_loss_falls_with_more_bits(model_folder, tmp_path):
    losses = []
    for size in (2, 8, 32):
        run = calibrated(model_folder(), tmp_path / str(size))
        compress(run, NoWagQuantizer(subvector_dim=4, codebook_size=size, max_iters=10))
        losses.append(sum(row["loss"] for row in run.statistics()))
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_reference_logits_are_the_dense_models(family, model_folder, tmp_path):
    folder = model_folder(family, tied=True)
    reference = CompressionRun(Checkpoint(str(folder)), tmp_path / "run", plan_of()).reference(EVALUATION, 2)
    whole = load_whole(folder)
    for name, windows in EVALUATION.items():
        indices = torch.tensor([2, 0])
        with torch.no_grad():
            expected = whole(windows[indices]).logits
        torch.testing.assert_close(reference.logits(name, indices), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_windows", [5, 1])
def test_reference_is_the_same_on_every_rank_and_on_one(num_windows, model_folder, tmp_path):
    whole, windows = load_whole(model_folder()), {"one": EVALUATION["one"][:num_windows]}
    with torch.no_grad():
        expected = whole(windows["one"]).logits

    def reference(ranks=None):
        run = CompressionRun(Checkpoint(str(model_folder())), tmp_path / "run", plan_of(), ranks=ranks)
        return run.reference(windows, 2)

    for each in (*on_ranks(2, reference), reference()):
        torch.testing.assert_close(each.logits("one", torch.arange(num_windows)), expected, atol=1e-5, rtol=0)
    assert len(list((tmp_path / "run" / "reference").glob("*.npy"))) == 2  # those of two ranks, kept


def test_reference_of_another_text_is_computed_anew(model_folder, tmp_path):
    run = CompressionRun(Checkpoint(str(model_folder())), tmp_path / "run", plan_of())
    run.reference({"text": EVALUATION["one"]}, 2)
    windows = EVALUATION["one"].flip(0)
    with torch.no_grad():
        expected = load_whole(model_folder())(windows[:1]).logits
    actual = run.reference({"text": windows}, 2).logits("text", torch.tensor([0]))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_linears_are_shared_out_over_the_ranks_once_each(model_folder):
    from nowag_pl.models.selection import find_linears

    linears = find_linears(StreamedModel(Checkpoint(str(model_folder()))).load_block(0))
    shares = [compression._share(linears, Alone(rank, 3)) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(linears)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
