"""What other programs import from the package root."""

import subprocess
import sys

import pytest
import torch
from tiny_models import ROOT
from torch import nn

import nowag_pl


@pytest.mark.parametrize(
    "name", ["ArmorCompressor", "NoWagPruner", "NoWagQuantizer", "SecondMoment", "load_compressed", "save_compressed"]
)
def test_promised_names_are_there(name):
    assert name in nowag_pl.__all__
    assert callable(getattr(nowag_pl, name))


def test_every_public_name_can_be_imported():
    for name in nowag_pl.__all__:
        assert getattr(nowag_pl, name).__module__.startswith("nowag_pl.")


def test_the_public_names_are_shown():
    assert set(nowag_pl.__all__) <= set(dir(nowag_pl))
    assert not [name for name in dir(nowag_pl) if name.startswith("_") and name != "__version__"]


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchThing"):
        nowag_pl.NoSuchThing  # noqa: B018


def test_root_import_loads_neither_lightning_nor_transformers():
    code = (
        "import sys, nowag_pl; from nowag_pl import NoWagPruner, NoWagQuantizer, SecondMoment, load_compressed; "
        "print(sorted({'lightning', 'transformers', 'datasets', 'pytorch_lightning'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "compressor",
    [
        lambda: nowag_pl.NoWagPruner(sparsity=0.5),
        lambda: nowag_pl.NoWagPruner(pattern=(2, 4)),
        lambda: nowag_pl.NoWagQuantizer(subvector_dim=6, codebook_size=16, seed=0, max_iters=100),
        lambda: nowag_pl.ArmorCompressor(block_size=8, max_iters=5),
    ],
    ids=["50 %", "2:4", "vq", "armor"],
)
def test_promised_use(compressor, bias):
    torch.manual_seed(0)
    linear, activations = nn.Linear(32, 24, bias=bias), torch.randn(50, 32)
    before = linear.weight.detach().clone()
    moment = nowag_pl.SecondMoment(32)
    moment.update(activations)
    compressed = compressor().compress(linear, moment.compute())
    assert compressed.weight.shape == (24, 32)
    assert 0 < compressed.bits_per_weight < 32
    expected = activations @ compressed.weight.T + (linear.bias if bias else 0)
    torch.testing.assert_close(compressed(activations), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(linear.weight, before)
    assert not torch.equal(compressed.weight, before)


def test_defaults_are_the_promised_ones():
    quantizer = nowag_pl.NoWagQuantizer()
    assert (quantizer.subvector_dim, quantizer.codebook_size, quantizer.seed, quantizer.max_iters) == (6, 4096, 0, 100)
    linear = nn.Linear(32, 24)
    assert nowag_pl.NoWagPruner().compress(linear, torch.ones(32)).sparsity == 0.5
