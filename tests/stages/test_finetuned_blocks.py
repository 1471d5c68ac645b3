"""What is stored of finetuned blocks, and what training must not have changed."""

import pytest
import torch
from stage_runs import compress, plan_of, run_of
from tiny_models import random_tokens

from nowag_pl import ArmorCompressor, NoWagPruner, NoWagQuantizer
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.state import stored_state
from nowag_pl.stages import compression
from nowag_pl.stages import finetuned as finetuning
from nowag_pl.stages.compression_run import CompressionRun

pytest_plugins = ["tiny_fixtures"]

COMPRESSORS = {
    "armor": ArmorCompressor(block_size=8, max_iters=3),
    "pruner": NoWagPruner(pattern=(2, 4)),
    "quantizer": NoWagQuantizer(subvector_dim=4, codebook_size=32, max_iters=3),
}


@pytest.fixture(params=COMPRESSORS)
def run(request, model_folder, tmp_path) -> CompressionRun:
    run = run_of(model_folder("qwen2"), tmp_path / "run")
    run.calibrate(random_tokens(3))
    compress(run, COMPRESSORS[request.param])
    return run


def trained(run, index):
    """Return a block all of whose parameters have moved, in float32."""
    block = finetuning.load_compressed_block(run.model, run.store, index)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.data = parameter.data.float() + 0.01
    return block


def test_compressed_block_is_that_of_the_whole_model(run):
    whole = run.compressed().assemble().model.layers[1]
    block = finetuning.load_compressed_block(run.model, run.store, 1)
    assert block.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(block.state_dict()[name], tensor), name


def test_finetuned_block_comes_back_rounded_as_it_is_stored(run):
    block = trained(run, 1)
    finetuning.write_block(run.store, 1, block, {"seconds": 0.0})
    back = finetuning.load_finetuned_block(run.model, run.store, 1)
    expected = finetuning.load_compressed_block(run.model, run.store, 1)
    expected.load_state_dict(stored_state(block))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert not torch.equal(back.input_layernorm.weight, run.model.load_block(1).input_layernorm.weight)


def test_storage_of_a_trained_block_is_as_small_as_before(run):
    def size(block):
        return sum(tensor.nbytes for tensor in stored_state(block).values())

    assert size(trained(run, 0)) == size(finetuning.load_compressed_block(run.model, run.store, 0))


def test_assembled_model_takes_the_finetuned_blocks(run):
    for index in range(3):
        finetuning.write_block(run.store, index, trained(run, index), {"seconds": 0.0})
    model = run.compressed(finetuned=True).assemble()
    for index in range(3):
        block = finetuning.load_finetuned_block(run.model, run.store, index)
        for name, tensor in block.state_dict().items():
            assert torch.equal(model.model.layers[index].state_dict()[name], tensor), name
    run.compressed().check_fixed(model)


def test_changed_mask_or_code_is_told(run):
    model = run.compressed().assemble()
    run.compressed().check_fixed(model)
    linear = model.get_submodule("model.layers.2.mlp.up_proj")
    ((name, tensor),) = list(linear.fixed().items())
    tensor.view(-1)[0] ^= 1
    with pytest.raises(RuntimeError, match=rf"{name} of mlp\.up_proj of block 2 to stay fixed"):
        run.compressed().check_fixed(model)


def test_linear_of_another_shape_or_kind_is_told(run):
    model = run.compressed().assemble()
    linears = compression.read_block(run.store, 0)
    model.model.layers[0].mlp.up_proj = linears["mlp.down_proj"]
    with pytest.raises(RuntimeError, match=r"mlp\.up_proj of block 0 to stay"):
        run.compressed().check_fixed(model)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48)
    with pytest.raises(RuntimeError, match=r"mlp\.up_proj of block 0 to stay"):
        run.compressed().check_fixed(model)


def test_finetuning_before_compressing_is_refused(model_folder, tmp_path):
    run = CompressionRun(Checkpoint(str(model_folder())), tmp_path / "other", plan_of())
    with pytest.raises(RuntimeError, match="compress before finetuning"):
        run.claim_finetuning(random_tokens(1), random_tokens(1), None)
