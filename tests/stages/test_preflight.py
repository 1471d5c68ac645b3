"""What a run is expected to need, against what it wrote, and what is said where it does not fit."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pipeline_run import EVALUATION, everything
from tiny_models import fit_arguments

from nowag_pl import MagnitudePruner, NoWagPruner, NoWagQuantizer, WandaPruner
from nowag_pl.compressors import Compressor
from nowag_pl.files import read_tensors
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.pipeline import block_needs, preflight
from nowag_pl.pipeline.block_needs import StageNeeds
from nowag_pl.pipeline.preflight import Available, host_bytes, shortages
from nowag_pl.pipeline.sizes import ModelSizes

pytest_plugins = ["tiny_fixtures"]

COMPRESSORS = [
    NoWagPruner(sparsity=0.3),
    NoWagPruner(pattern=(3, 8)),
    NoWagPruner(sparsity=0.3, structured="rows"),
    NoWagPruner(sparsity=0.3, structured="columns"),
    MagnitudePruner(sparsity=0.37),
    WandaPruner(sparsity=0.37),
    WandaPruner(pattern=(1, 4)),
    NoWagQuantizer(subvector_dim=5, codebook_size=12, max_iters=1),
]


class Custom(Compressor):
    def compress(self, linear, second_moment):
        raise NotImplementedError


def tensor_bytes(file: Path) -> int:
    return sum(tensor.nbytes for tensor in read_tensors(file)[0].values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("compressor", [NoWagPruner(pattern=(2, 4)), NoWagQuantizer(subvector_dim=4, codebook_size=32)])
def test_expected_disk_is_what_is_written(family, compressor, model_folder, tmp_path):
    run = everything(model_folder(family, tied=family == "qwen2"), tmp_path / "run", compressor)
    run.compressed().save(tmp_path / "export")
    sizes = ModelSizes.of(run.model, compressor)
    windows = {name: len(tokens) for name, tokens in EVALUATION.items()}

    def written(folder):
        return sum(tensor_bytes(file) for file in (tmp_path / folder).glob("*.safetensors"))

    biases = sum(
        linear.bias.numel() * 4
        for index in range(len(run.model))
        for linear in run.model.linears(index).values()
        if linear.bias is not None
    )
    num_linears = sum(len(run.model.linears(index)) for index in range(len(run.model)))
    rounding = num_linears  # bits of a linear in whole bytes
    assert written("run/moments") == block_needs.calibration_needs(sizes, 7, 24, 3).disk
    assert written("run/compressed") - biases == pytest.approx(block_needs.compression_needs(sizes).disk, abs=rounding)
    assert written("export") == pytest.approx(block_needs.export_needs(sizes, 1).disk, abs=rounding)
    run.compressed().save(tmp_path / "dense", dense=True)
    assert written("dense") == block_needs.export_needs(sizes, 1, dense=True).disk
    arrays = sum(file.stat().st_size - 128 for file in (tmp_path / "run" / "reference").glob("*.npy"))
    assert arrays == block_needs.reference_needs(sizes, windows, 24, 2).disk


def test_sizes_are_those_of_the_model(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder("phi3", dtype=torch.bfloat16))))
    sizes = ModelSizes.of(model, NoWagPruner())
    assert (sizes.itemsize, sizes.hidden, sizes.widest) == (2, 32, 96)  # gate and up in one
    assert sizes.block == sum(p.nbytes for p in model.load_block(0).parameters())
    assert sizes.skeleton == sum(p.nbytes for p in model.skeleton.parameters())
    assert sizes.largest_linear == 96 * 32


def test_full_second_moments_are_counted(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder("llama"))))
    plain, full = (ModelSizes.of(model, NoWagPruner(update=update)) for update in (None, "refit"))
    widths = [linear.in_features for linear in model.linears(0).values()]
    assert (plain.full_moments, full.full_moments) == (0, sum(width**2 for width in widths))
    assert full.compressing > plain.compressing + 3 * 8 * max(widths) ** 2  # three matrices in float64
    assert full.restoring == plain.restoring
    stream = block_needs.calibration_needs(full, 7, 24, 3)
    needs = block_needs.compression_needs(full, stream)
    assert needs.host == full.compressed_block + 4 * full.full_moments
    assert needs.shared_host == full.hidden_states(7, 24)
    assert needs.device == full.skeleton + full.block + full.compressing + block_needs.CHUNK_BYTES
    little = replace(full, compressing=-block_needs.CHUNK_BYTES)
    assert block_needs.compression_needs(little, stream).device == stream.device + 8 * full.full_moments


@pytest.mark.parametrize(
    ("mode", "update", "streams"),
    [("dense", None, 0), ("propagated", None, 1), ("dense", "refit", 1), ("corrected", None, 2)],
)
def test_sequences_that_pass_once_more_are_counted(mode, update, streams, model_folder):
    sizes = ModelSizes.of(StreamedModel(Checkpoint(str(model_folder("llama")))), NoWagPruner(update=update))
    needs = block_needs.compression_needs_in_mode(sizes, block_needs.calibration_needs(sizes, 3, 24, 8), mode)
    assert needs.shared_host == streams * sizes.hidden_states(3, 24)
    assert ("calibration.num_sequences" in needs.host_option) == (streams > 0)


@pytest.fixture
def nothing_for_libraries(monkeypatch):
    monkeypatch.setattr(preflight, "LIBRARY_BYTES", 0)


FITS = Available(device=100, host=100, disk=100)
STAGE = StageNeeds("one", 60, 30, 20, 50, "fewer.on_device", "fewer.in_host", "fewer.on_disk")


def test_what_fits_is_not_mentioned(nothing_for_libraries):
    assert shortages([STAGE, replace(STAGE, stage="two")], FITS) == []


@pytest.mark.parametrize(
    ("available", "processes", "stage", "option"),
    [
        (replace(FITS, device=59), 1, "one may need .* of device memory", "change fewer.on_device$"),
        (replace(FITS, host=49), 1, "one may need .* of host memory", "change fewer.in_host$"),
        (FITS, 3, "one may need .* of host memory", "change fewer.in_host$"),
        (Available(None, 109, 100), 1, "one may need .* of host memory", "fewer.in_host or fewer.on_device$"),
        (replace(FITS, disk=49), 1, "the run may need .* of disk", "change fewer.on_disk, run_dir on another disk$"),
    ],
)
def test_what_does_not_fit_is_named_with_an_option(nothing_for_libraries, available, processes, stage, option):
    (sentence,) = shortages([STAGE], available, processes)
    assert re.match(stage, sentence)
    assert re.search(option, sentence)


def test_disk_of_all_stages_adds_up_less_what_is_there(nothing_for_libraries):
    assert len(shortages([STAGE, STAGE, STAGE], FITS)) == 1
    assert shortages([STAGE, STAGE, STAGE], FITS, on_disk=50) == []


def test_device_is_part_of_the_host_on_a_cpu():
    own = 2 * preflight.LIBRARY_BYTES
    assert host_bytes(STAGE, FITS, 2) == 80 + own
    assert host_bytes(STAGE, Available(None, 0, 0), 2) == 200 + own


def test_folder_need_not_exist(tmp_path):
    available = Available.here(tmp_path / "not" / "there", torch.device("cpu"))
    assert available.device is None
    assert available.host > 0
    assert available.disk > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compression.compressor.pattern=[2,5]"], r"layers\.0\.self_attn\.q_proj: .*divisible by 5"),
        (
            ["--compression.compressor=nowag_pl.NoWagQuantizer", "--compression.compressor.codebook_size=180"],
            r"layers\.0\.self_attn\.k_proj: .*180 codewords for 96 subvectors",
        ),
    ],
)
def test_method_that_fits_no_linear_is_refused_before_calibration(
    options, message, command_line, model_folder, workplace, tmp_path
):
    outcome = command_line(fit_arguments(workplace, model_folder(), tmp_path / "run", *options))
    assert outcome.code == 1
    assert re.search(message, outcome.message)
    assert not (tmp_path / "run" / "moments").exists()


def test_fit_shows_every_stage_and_warns(command_line, model_folder, workplace, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Available, "here", classmethod(lambda cls, folder, device: cls(None, 2**14, 2**40)))
    with caplog.at_level(logging.WARNING, "nowag_pl"):
        arguments = fit_arguments(workplace, model_folder(), tmp_path / "run", "--finetuning.enabled=true")
        outcome = command_line([*arguments, "--finetuning.max_epochs=1", "--finetuning.num_sequences=2"])
    assert outcome.code == 0
    said = outcome.message
    for stage in ("calibration", "compression", "dense reference", "validation", "finetuning", "export", "available"):
        assert stage in said, said[:2000]
    assert "calibration.num_sequences" in caplog.text + said
    assert "finetuning.activations=disk" in caplog.text + said


def test_corrected_compression_needs_both_models_drifts_and_a_matrix_to_invert(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder("llama", dtype=torch.bfloat16))))
    sizes = replace(ModelSizes.of(model, NoWagPruner(update="refit")), compressing=0)
    stream = block_needs.calibration_needs(sizes, 7, 24, 3)
    needs = block_needs.corrected_needs(sizes, stream)
    both = sizes.skeleton + sizes.block + sizes.compressed_block + 2 * sizes.activations(72)
    num_weights = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    assert needs.device - both - block_needs.CHUNK_BYTES == 12 * num_weights + 44 * sizes.widest**2
    assert (needs.shared_host, needs.disk) == (2 * sizes.hidden_states(7, 24), sizes.compressed)
    larger = replace(sizes, compressing=50 * sizes.widest**2)
    assert block_needs.corrected_needs(larger, stream).device - needs.device == 10 * sizes.widest**2
