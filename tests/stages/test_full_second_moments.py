"""Full second moments in a run: gathered once per input, on any number of ranks, resumed, for those that ask."""

import pytest
import torch
from rank_threads import on_ranks
from stage_runs import WINDOWS, run_of
from test_calibrated_moments import oracle
from test_compression_run import everything
from tiny_models import artefacts, load_whole
from torch import Tensor, nn

from nowag_pl import NoWagPruner, NoWagQuantizer
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.layout import MOMENTS
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.hidden import HiddenStates
from nowag_pl.stages.moments import Observed

pytest_plugins = ["tiny_fixtures"]

PRUNER = NoWagPruner(sparsity=0.5, update="alternating")
QUANTIZER = NoWagQuantizer(4, 32, max_iters=4, update="feedback", rounds=2, refit_scales=True)


def gathered(model: StreamedModel, index: int, windows: Tensor, ranks: Ranks):
    states, block = HiddenStates(model, ranks.share(windows), 2), model.load_block(index)
    with (observed := Observed(model, block, index, full=True)):
        states.run(block, index)
    return observed.shared(ranks), block


def test_matrices_have_the_oracles_diagonal_and_are_shared(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder("qwen2"))))
    moments, block = gathered(model, 0, WINDOWS, Ranks())
    expected = oracle(load_whole(model_folder("qwen2")), WINDOWS)
    assert list(moments) == [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    for name, moment in moments.items():
        squares = expected[f"model.layers.0.{name}"]
        torch.testing.assert_close(moment.compute().diagonal().double(), squares, rtol=2e-6, atol=1e-6)
        assert int(moment.num_tokens) == WINDOWS.numel()
    attention = [moments[f"self_attn.{name}_proj"] for name in "qkv"]
    assert attention[0] is attention[1] is attention[2]
    assert moments["mlp.gate_proj"] is moments["mlp.up_proj"]
    assert len(set(moments.values())) == 4
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_rank_without_sequences_shares_like_the_others(model_folder):
    models = [StreamedModel(Checkpoint(str(model_folder()))) for _ in range(3)]
    alone = gathered(models[2], 0, WINDOWS[:1], Ranks())[0]
    busy, idle = on_ranks(2, lambda ranks: gathered(models[ranks.rank], 0, WINDOWS[:1], ranks)[0])
    assert len(set(idle.values())) == len(set(busy.values())) == 4
    assert all(int(moment.num_tokens) == 0 for moment in idle.values())
    assert all(torch.equal(busy[name].total, alone[name].total) for name in alone)


def test_sharing_that_changes_between_calls_is_refused(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    observed, shared, alone = (
        Observed(model, model.load_block(0), 0, full=True),
        torch.ones(1, 3, 32),
        torch.ones(1, 3, 32),
    )
    observed.observe("self_attn.q_proj", shared)
    observed.observe("self_attn.k_proj", shared)
    observed.observe("self_attn.q_proj", shared)
    with pytest.raises(RuntimeError, match=r"k_proj to share its input with self_attn\.q_proj in every"):
        observed.observe("self_attn.k_proj", alone)


@pytest.mark.parametrize(
    ("compressor", "mode"),
    [
        (PRUNER, "dense"),
        (QUANTIZER, "propagated"),
        pytest.param(QUANTIZER, "dense", marks=pytest.mark.slow),
        pytest.param(PRUNER, "propagated", marks=pytest.mark.slow),
    ],
)
def test_lost_block_is_made_again_bit_for_bit_and_written_moments_are_mean_squares(
    compressor, mode, model_folder, tmp_path
):
    run = everything(model_folder(), tmp_path / "run", compressor, mode)
    before = artefacts(tmp_path / "run")
    assert len(before) == 8
    assert all(tensor.dim() == 1 for index in range(3) for tensor in run.store.read(MOMENTS, index)[0].values())
    for index in (1, 2):
        (tmp_path / "run" / "compressed" / f"block_{index:03d}.safetensors").unlink()
    everything(model_folder(), tmp_path / "run", compressor, mode)
    assert artefacts(tmp_path / "run") == before


@pytest.mark.parametrize(("compressor", "full"), [(NoWagPruner(), [False] * 3), (PRUNER, [True] * 3)])
def test_second_moments_are_gathered_once_and_as_matrices_for_those_that_ask(
    compressor, full, model_folder, tmp_path, monkeypatch
):
    gathered, init = [], Observed.__init__

    def noting(self, model, block, index, full, *more):
        gathered.append(full)
        init(self, model, block, index, full, *more)

    monkeypatch.setattr(Observed, "__init__", noting)
    run = run_of(model_folder(), tmp_path / "run", compressor)
    run.calibrate(WINDOWS)
    run.compress()
    assert gathered == full
    assert run.store.missing(MOMENTS, 3) == []


def test_options_are_part_of_the_manifest(model_folder, tmp_path):
    everything(model_folder(), tmp_path / "run", NoWagPruner())
    with pytest.raises(ValueError, match=r"compression\.update = None, not 'refit'"):
        everything(model_folder(), tmp_path / "run", NoWagPruner(update="refit"))
