"""Model, data and run directory are apart, also behind symbolic links."""

import pytest

from nowag_pl.run.places import check_apart


@pytest.mark.parametrize(
    ("run_dir", "source", "is_refused"),
    [
        ("run", "model", False),
        ("run", "run2", False),
        ("model", "model", True),
        ("model/run", "model", True),
        ("run", "run/export", True),
        ("run", "run/text.txt", True),
        ("link/run", "model", True),
        ("run", "link", False),
        ("run", "run/../model", False),
        ("run/../model", "link", True),
    ],
)
def test_overlaps_in_both_directions(run_dir, source, is_refused, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    places = (tmp_path / run_dir, [("model.path", tmp_path / source)])
    if is_refused:
        with pytest.raises(ValueError, match=r"run_dir and model\.path to be apart"):
            check_apart(*places)
    else:
        check_apart(*places)


def test_commands_that_only_read_may_write_beside_an_export(tmp_path):
    check_apart(tmp_path, [("model.path", tmp_path / "export")], may_hold=True)
    with pytest.raises(ValueError, match="apart"):
        check_apart(tmp_path / "export", [("model.path", tmp_path / "export")], may_hold=True)
