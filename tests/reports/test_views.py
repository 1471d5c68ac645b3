import pytest
import torch
from stage_runs import compress, plan_of
from tiny_models import random_tokens
from torch import nn

from nowag_pl import NoWagPruner, NoWagQuantizer
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.reports.figures.linears import split_name
from nowag_pl.reports.views import Limits, inspect_linear, inspect_linears, inspected_blocks
from nowag_pl.stages.compression_run import CompressionRun

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture
def run(model_folder, tmp_path):
    run = CompressionRun(Checkpoint(str(model_folder())), tmp_path / "run", plan_of())
    run.calibrate(random_tokens(4))
    return run


@pytest.mark.parametrize(
    ("num_blocks", "max_blocks", "expected"),
    [(4, 3, [0, 2, 3]), (32, 3, [0, 16, 31]), (5, 9, [0, 1, 2, 3, 4]), (7, 1, [0]), (1, 3, [0]), (80, 2, [0, 79])],
)
def test_blocks_are_spread_from_first_to_last(num_blocks, max_blocks, expected):
    assert inspected_blocks(num_blocks, max_blocks) == expected


def test_images_of_a_pruned_linear_are_those_of_the_paper(generator):
    linear = nn.Linear(8, 6, bias=False)
    moment = torch.rand(8, generator=generator) + 0.1
    compressed = NoWagPruner(sparsity=0.5).compress(linear, moment)
    view = inspect_linear(3, "mlp.up_proj", linear, compressed, moment, Limits(max_image_size=100, num_samples=1000))
    weight = linear.weight.detach().double()
    r1 = weight.square().sum(dim=0).sqrt()
    r2 = (weight / r1).square().sum(dim=1).sqrt()
    bar = weight / r1 / r2[:, None]
    expected = {
        "weight": weight.abs(),
        "normalized": bar.abs(),
        "importance": moment * weight.square(),
        "normalized_importance": moment * bar.square(),
    }
    for name, matrix in expected.items():
        torch.testing.assert_close(view.images[name].double(), matrix.log10(), atol=1e-4, rtol=1e-4)
    keep = compressed.weight != 0
    error = torch.where(keep, 0, moment * bar.square())
    kept_largest = view.images["normalized_importance"][keep].min() >= view.images["normalized_importance"][~keep].max()
    assert kept_largest
    torch.testing.assert_close(view.images["error"][~keep].double(), error[~keep].log10(), atol=1e-4, rtol=1e-4)
    assert view.images["error"][keep].max() < view.images["error"][~keep].min()
    assert torch.equal(view.mask, keep)
    assert torch.equal(view.kept, keep.float())
    assert view.codewords is None
    assert (view.block, view.name) == (3, "mlp.up_proj")


def test_codewords_lie_in_the_plane_of_the_subvectors():
    torch.manual_seed(0)
    linear, moment = nn.Linear(10, 9, bias=False), torch.ones(10)  # 4 does not divide 10
    compressed = NoWagQuantizer(subvector_dim=4, codebook_size=5).compress(linear, moment)
    view = inspect_linear(0, "q", linear, compressed, moment, Limits(num_samples=10**6))
    found = view.codewords
    assert view.mask is None
    assert found.points.shape == (27, 2)
    assert found.codewords.shape == (5, 2)
    assert found.counts.tolist() == [int((compressed.unpacked_codes == code).sum()) for code in range(5)]
    distances = torch.cdist(compressed.codebook, compressed.codebook)
    assert (torch.cdist(found.codewords, found.codewords) <= distances + 1e-5).all()  # a projection shortens
    torch.testing.assert_close(found.points.mean(dim=0), torch.zeros(2), atol=1e-5, rtol=0)
    spread = found.points.var(dim=0)
    assert spread[0] >= spread[1]


def test_limits_bound_what_is_looked_at(run):
    compress(run, NoWagPruner())
    limits = Limits(max_blocks=2, linears=("up_proj", "self_attn.q_proj"), max_image_size=7, num_samples=11)
    views = list(inspect_linears(run, limits))
    names = [(view.block, view.name) for view in views]
    assert names == [(block, name) for block in (0, 2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    for view in views:
        assert {tuple(image.shape) for image in view.images.values()} == {(7, 7)}
        assert {len(values) for values in view.histograms.values()} == {11}


def test_name_in_the_block_begins_behind_the_first_number():
    assert split_name("transformer.h.12.attn.experts.3.proj") == (12, "attn.experts.3.proj")
