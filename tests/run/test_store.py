"""Messages of the run directory."""

import pytest

from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"compressor": "B", "rounds": 4}, "holds a run with s.compressor = 'A', not 'B'. Runs"),
        (
            {"compressor": "A", "damping": 0.1, "rounds": 4},
            "holds a run with s.rounds = None, not 4; s.sparsity = 0.5, not None. Runs",
        ),
    ],
)
def test_another_setting_is_refused_by_name(tmp_path, settings, found):
    """Settings that only one method has are told where nothing else differs."""
    store = ArtefactStore(tmp_path, Ranks())
    store.claim("s", {"compressor": "A", "damping": 0.1, "sparsity": 0.5})
    with pytest.raises(ValueError, match=found):
        store.claim("s", {"damping": 0.1} | settings)
