"""Guided second moments against autograd on the whole model, in every mode, on two ranks, and resumed."""

import pytest
import torch
import torch.nn.functional as F
from rank_threads import on_ranks
from stage_runs import WINDOWS, calibrated, run_of
from tiny_models import artefacts, load_whole

from nowag_pl import NoWagPruner
from nowag_pl.functional.predictions.sensitivity import drawn_labels
from nowag_pl.run.layout import GUIDANCE, MOMENTS
from nowag_pl.stages.compression import read_block
from nowag_pl.stages.guidance import read_guidance
from nowag_pl.stages.plan import GuidanceSettings

pytest_plugins = ["tiny_fixtures"]

TEXT, MODEL = GuidanceSettings(), GuidanceSettings(labels="model")
FULL = NoWagPruner(update="refit")


def squared_gradients(model, labels: str) -> tuple[dict, dict]:
    """Return mean squared gradients `[sequences, seq_len]` and inputs of all linears, in float64, by autograd."""
    model, gradients, inputs = model.double(), {}, {}

    def keep(name, args, output):
        inputs.setdefault(name, []).append(args[0].detach())
        output.register_hook(lambda grad: gradients.setdefault(name, []).append(grad.square().mean(-1)))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_hook(lambda _, args, output, name=name: keep(name, args, output))
    uniform = torch.rand(len(WINDOWS), WINDOWS.shape[1] - 1, generator=torch.Generator().manual_seed(0))
    for window, numbers in zip(WINDOWS, uniform, strict=True):
        logits = model(window[None], use_cache=False).logits[0, :-1]
        targets = window[1:] if labels == "text" else drawn_labels(logits.detach().float(), numbers)
        F.cross_entropy(logits, targets, reduction="sum").backward()
    return {name: torch.cat(each) for name, each in gradients.items()}, {n: torch.cat(x) for n, x in inputs.items()}


@pytest.mark.parametrize(("family", "guidance"), [("llama", TEXT), ("qwen2", MODEL), ("gemma2", TEXT)])
def test_moments_are_weighted_by_the_squared_gradients_of_autograd(family, guidance, model_folder, tmp_path):
    run = calibrated(model_folder(family), tmp_path / "run", guidance=guidance)
    gradients, inputs = squared_gradients(load_whole(model_folder(family)), guidance.labels)
    for index in range(3):
        weights, moments = run.store.read(GUIDANCE, index)[0], run.store.read(MOMENTS, index)[0]
        for name, actual in weights.items():
            full = f"model.layers.{index}.{name}"
            torch.testing.assert_close(actual.double(), gradients[full], rtol=1e-3, atol=float(actual.max()) * 1e-5)
            relative = gradients[full] / gradients[full].mean()
            expected = (relative[..., None] * inputs[full].square()).mean(dim=(0, 1))
            torch.testing.assert_close(moments[name].double(), expected, rtol=1e-4, atol=1e-6)


def test_power_tempers_the_weights(model_folder, tmp_path):
    run = calibrated(model_folder(), tmp_path / "run", guidance=TEXT)
    plain, half = (read_guidance(run.store, GuidanceSettings(power=power))(1, "mlp.up_proj") for power in (1.0, 0.5))
    assert float(plain.mean()) == pytest.approx(1)
    torch.testing.assert_close(half, plain.sqrt() / plain.sqrt().mean())


@pytest.mark.parametrize(("mode", "compressor"), [("dense", FULL), ("propagated", FULL), ("corrected", NoWagPruner())])
def test_every_mode_takes_the_weights_and_a_lost_block_comes_back(mode, compressor, model_folder, tmp_path):
    run = calibrated(model_folder(), tmp_path / "run", mode, compressor=compressor, guidance=TEXT)
    run.compress()
    plain = calibrated(model_folder(), tmp_path / "plain", mode, compressor=compressor)
    plain.compress()
    guided, unguided = (read_block(each.store, 1)["mlp.up_proj"].weight for each in (run, plain))
    assert not guided.equal(unguided)
    before = artefacts(tmp_path / "run")
    for stage in ("guidance", "compressed"):
        (tmp_path / "run" / stage / "block_001.safetensors").unlink()
    again = calibrated(model_folder(), tmp_path / "run", mode, compressor=compressor, guidance=TEXT)
    again.compress()
    assert artefacts(tmp_path / "run") == before


def test_ranks_share_the_sequences_in_their_order(model_folder, tmp_path):
    from nowag_pl.stages.guidance import write_guidance

    def write(ranks):
        run = run_of(model_folder(), tmp_path / f"{ranks.world_size}", guidance=TEXT, ranks=ranks)
        write_guidance(run.model, run.store, WINDOWS, run.plan.calibration)
        return run.store.read(GUIDANCE, 0)[0]

    (alone,) = on_ranks(1, write)
    together, same = on_ranks(2, write)
    for name, weights in alone.items():
        torch.testing.assert_close(together[name], weights, rtol=1e-4, atol=0)
        assert together[name].equal(same[name])


def test_other_guidance_is_refused(model_folder, tmp_path):
    calibrated(model_folder(), tmp_path / "run", guidance=TEXT)
    with pytest.raises(ValueError, match=r"guidance\.labels = 'text', not 'model'"):
        calibrated(model_folder(), tmp_path / "run", guidance=MODEL)
    with pytest.raises(ValueError, match=r"calibration\.guidance = .* not None"):
        calibrated(model_folder(), tmp_path / "run")
    with pytest.raises(ValueError, match="power above 0"):
        GuidanceSettings(power=0)
