"""Messages of the run directory."""

import pytest
import torch

from nowag_pl.run.manifest import Claim
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


def written(folder):
    store = ArtefactStore(folder, Ranks())
    store.claim("s", {"a": 1})
    for index in range(3):
        store.write("moments", index, {"x": torch.full((4,), float(index))}, {"seconds": 1.0})
    return store


def test_damaged_artefact_is_missing_and_kept_by_name(tmp_path, caplog):
    store = written(tmp_path)
    path = store.path("moments", 1)
    content = bytearray(path.read_bytes())
    content[-2] ^= 8
    path.write_bytes(content)
    assert store.missing("moments", 3) == [1]
    assert path.with_name(f"{path.name}.damaged").read_bytes() == content
    assert len([record for record in caplog.records if "block_001.safetensors is damaged" in record.getMessage()]) == 1
    store.write("moments", 1, {"x": torch.ones(4)}, {"seconds": 1.0})
    assert store.missing("moments", 3) == []


def test_check_writes_nothing_and_names_the_first_section_that_differs(tmp_path):
    store = written(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    store.check([Claim("s", {"a": 1}), Claim("new", {"b": 2}, "compressed")])
    with pytest.raises(ValueError, match=r"s\.a = 1, not 2"):
        store.check([Claim("new", {"b": 2}), Claim("s", {"a": 2})])
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert not (tmp_path / "nothing").exists()
    ArtefactStore(tmp_path / "nothing", Ranks()).check([Claim("s", {"a": 1})])
    assert not (tmp_path / "nothing").exists()


def test_epochs_may_rise_and_not_fall(tmp_path):
    store = written(tmp_path)
    for epochs in (2, 2, 5):
        store.claim("training", {"max_epochs": epochs, "rate": 1}, "moments", ("max_epochs",))
    with pytest.raises(ValueError, match=r"training\.max_epochs = 5, not 3"):
        store.claim("training", {"max_epochs": 3, "rate": 1}, "moments", ("max_epochs",))
    with pytest.raises(ValueError, match=r"training\.rate = 1, not 2\. Runs"):
        store.claim("training", {"max_epochs": 6, "rate": 2}, "moments", ("max_epochs",))
