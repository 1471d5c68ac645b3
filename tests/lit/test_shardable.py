"""What FSDP2 cannot shard is refused before anything is computed."""

import pytest
from torch import nn

from nowag_pl.lit.sharding import check_shardable
from nowag_pl.modules.experts import ExpertSizes, RoutedExperts


def test_experts_are_refused():
    check_shardable(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    block = nn.ModuleDict({"mlp": RoutedExperts(2, ExpertSizes(2, 2), lambda gate, up: up, {})})
    with pytest.raises(ValueError, match=r"without experts for trainer\.strategy=fsdp2, but got one with experts"):
        check_shardable(nn.Linear(2, 2), block)
