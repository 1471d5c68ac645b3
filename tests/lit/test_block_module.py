import torch
from torch import nn

from nowag_pl.lit.block_module import BlockModule


def test_what_has_no_gradient_does_not_decay():
    block = nn.Linear(3, 3)
    module = BlockModule(block, lambda block, hidden, _: hidden + 0 * block(hidden), lambda *_: {}, 1.0, 0.1, 0)
    before = [parameter.clone() for parameter in block.parameters()]
    optimizer = module.configure_optimizers()["optimizer"]
    module(torch.ones(2, 4, 3)).sum().backward()
    optimizer.step()
    for parameter, old in zip(block.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, torch.zeros_like(old))
        assert torch.equal(parameter, old)
