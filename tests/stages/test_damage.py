"""Where a compressed model loses, against the whole model."""

import pytest
import torch
from stage_runs import compress, plan_of
from tiny_models import random_tokens

from nowag_pl import NoWagPruner
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.stages import damage
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.damage import measure_damage

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture
def run(model_folder, tmp_path):
    run = CompressionRun(Checkpoint(str(model_folder())), tmp_path / "run", plan_of())
    run.calibrate(random_tokens(4))
    compress(run, NoWagPruner(sparsity=0.8))
    return run


def test_errors_of_blocks_are_those_of_the_whole_model(run):
    windows = random_tokens(3, seed=5)
    model = run.model
    found = measure_damage(model, run.compressed().load_block, windows)
    hidden = [model.embed(windows).hidden]
    compressed = list(hidden)
    for index in range(3):
        arguments = model.arguments(index, *windows.shape)
        hidden.append(model.forward_block(model.load_block(index), hidden[-1], arguments))
        block = run.compressed().load_block(index)
        alone = model.forward_block(block, hidden[index], arguments)
        compressed.append(model.forward_block(block, compressed[-1], arguments))
        added = (hidden[index + 1] - hidden[index]).square().sum()
        assert found.alone[index] == pytest.approx(float((alone - hidden[-1]).square().sum() / added), rel=1e-4)
        assert found.accumulated[index] == pytest.approx(
            float((compressed[-1] - hidden[-1]).square().sum() / added), rel=1e-4
        )
    assert found.alone[0] == found.accumulated[0]
    assert found.accumulated[2] != found.alone[2]


def test_divergence_after_the_last_block_is_that_of_the_whole_models(run, monkeypatch):
    windows = random_tokens(3, seed=5)
    dense, compressed = run.checkpoint.load(), run.compressed().assemble()
    with torch.no_grad():
        p, q = (model(input_ids=windows).logits.double().log_softmax(dim=-1) for model in (dense, compressed))
    expected = float((p.exp() * (p - q)).sum(dim=-1).mean())
    found = measure_damage(run.model, run.compressed().load_block, windows)
    assert found.divergence[-1] == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(damage, "_MAX_POSITIONS", 5)
    sampled = measure_damage(run.model, run.compressed().load_block, windows)
    assert sampled.divergence[-1] == pytest.approx(expected, rel=0.5)
    assert sampled.divergence != found.divergence


def test_dense_blocks_have_no_damage(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    found = measure_damage(model, model.load_block, random_tokens(2))
    assert found.alone == found.accumulated == [0, 0, 0]
    torch.testing.assert_close(torch.tensor(found.divergence), torch.zeros(3), atol=1e-9, rtol=0)
