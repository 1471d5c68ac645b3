"""How the final loss couples outputs: against autograd on the whole model, on two ranks, and in a compression."""

import pytest
import torch
import torch.nn.functional as F
from stage_runs import WINDOWS, calibrated
from tiny_models import artefacts, load_whole

from nowag_pl import NoWagQuantizer, NoWagTrellis
from nowag_pl.run.layout import OUTPUT_MOMENTS
from nowag_pl.stages.compression import read_block
from nowag_pl.stages.plan import GuidanceSettings

pytest_plugins = ["tiny_fixtures"]

TEXT = GuidanceSettings()
TRELLIS = NoWagTrellis(state_bits=8, update="two_sided")
QUANTIZER = NoWagQuantizer(subvector_dim=2, codebook_size=16, max_iters=2, rounds=1, update="two_sided")


def test_output_moments_equal_autograd_of_the_whole_model(model_folder, tmp_path):
    run = calibrated(model_folder(), tmp_path / "run", guidance=TEXT, compressor=TRELLIS)
    model = load_whole(model_folder())
    name = "model.layers.1.mlp.up_proj"
    weight, expected = model.get_parameter(f"{name}.weight"), 0
    for window in WINDOWS:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, window[1:], reduction="sum"), weight)
        expected = expected + gradient @ gradient.T / gradient.shape[1] / len(WINDOWS)
    found = run.store.read(OUTPUT_MOMENTS, 1)[0]["mlp.up_proj"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("compressor", [TRELLIS, QUANTIZER])
@pytest.mark.parametrize("mode", ["dense", "corrected"])
def test_compression_takes_both_sides_and_resumes(compressor, mode, model_folder, tmp_path):
    run = calibrated(model_folder(), tmp_path / "run", mode, guidance=TEXT, compressor=compressor)
    run.compress()
    assert read_block(run.store, 2)["mlp.down_proj"].weight.isfinite().all()
    before = artefacts(tmp_path / "run")
    for stage in ("guidance", OUTPUT_MOMENTS, "compressed"):
        (tmp_path / "run" / stage / "block_001.safetensors").unlink()
    again = calibrated(model_folder(), tmp_path / "run", mode, guidance=TEXT, compressor=compressor)
    again.compress()
    assert artefacts(tmp_path / "run") == before


def test_two_sides_need_guidance(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"calibration\.guidance with update 'two_sided', but got none"):
        calibrated(model_folder(), tmp_path / "run", compressor=TRELLIS)
    linear = torch.nn.Linear(16, 16)
    for compressor in (TRELLIS, QUANTIZER):
        with pytest.raises(ValueError, match="compress_coupled with them"):
            compressor.compress(linear, torch.eye(16))
        with pytest.raises(ValueError, match=r"gradients of shape \(16, 16\), but got shape \(3, 3\)"):
            compressor.compress_coupled(linear, torch.eye(16), torch.eye(3))
    with pytest.raises(ValueError, match="Expected feedback with update 'two_sided'"):
        NoWagTrellis(feedback=False, update="two_sided")
