"""Checkpoints are whole or absent, are never believed when damaged, and run no code."""

import pickle
import resource
import zipfile

import pytest
import torch

from nowag_pl.lit.checkpoint_io import (
    WholeCheckpoints,
    digests_of,
    newest_whole,
    read_checkpoint,
    seal_folder,
    whole_checkpoint,
)
from nowag_pl.lit.trainer import check_checkpoint

CONTENT = {"state_dict": {"w": torch.arange(5000.0)}, "loops": {}, "epoch": 3}


def save(path, **more):
    WholeCheckpoints().save_checkpoint(CONTENT | more, path)
    return path


def test_checkpoint_comes_back_here_and_in_torch(tmp_path):
    path = save(tmp_path / "new" / "last.ckpt")
    for content in (
        WholeCheckpoints().load_checkpoint(path),
        torch.load(path, weights_only=True),
        torch.load(path, weights_only=True, mmap=True),
    ):
        assert content["epoch"] == 3
        assert torch.equal(content["state_dict"]["w"], CONTENT["state_dict"]["w"])
    assert zipfile.is_zipfile(path)
    check_checkpoint(str(path))


@pytest.mark.parametrize("place", [3, 40, 0.2, 0.5, 0.9, -90, -70, -3])
def test_flipped_bit_is_found(place, tmp_path):
    path = save(tmp_path / "last.ckpt")
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 4
    path.write_bytes(content)
    assert not whole_checkpoint(path)
    assert not path.exists()
    assert (tmp_path / "last.ckpt.damaged").read_bytes() == content


@pytest.mark.parametrize("left", [0, 10, 1000, -1])
def test_cut_checkpoint_is_refused_in_one_line(left, tmp_path):
    path = save(tmp_path / "last.ckpt")
    path.write_bytes(path.read_bytes()[:left])
    if left != -1:
        with pytest.raises(ValueError, match=r"^Expected .*last\.ckpt to be a.* checkpoint[^\n]*$"):
            read_checkpoint(path)
    assert not whole_checkpoint(path)


def test_failed_write_leaves_the_one_before_and_no_litter(tmp_path, monkeypatch):
    path = save(tmp_path / "last.ckpt")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))

    def full(content, file):
        file.write_bytes(b"half of a checkpoint")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"Could not write .*last\.ckpt .*file write failed"):
        save(path, epoch=4)
    monkeypatch.undo()
    assert read_checkpoint(path)["epoch"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_file_that_cannot_grow_is_told_by_name_and_reason(tmp_path):
    path = save(tmp_path / "last.ckpt")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Could not write .*last\.ckpt \(File too large\)"):
            save(path, epoch=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_pickle_runs_no_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"state_dict": {}, "x": Harm()}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Harm()))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(ValueError, match="Expected"):
            WholeCheckpoints().load_checkpoint(tmp_path / name, weights_only=False)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("address", ["http://localhost/a.ckpt", "s3://bucket/a.ckpt", "simplecache::http://x/a"])
def test_addresses_are_refused(address, tmp_path):
    for function in (read_checkpoint, check_checkpoint, WholeCheckpoints().load_checkpoint):
        with pytest.raises(ValueError, match="on this machine, but got the address"):
            function(address)


def test_folder_is_refused_unless_it_is_of_a_sharded_model(tmp_path):
    with pytest.raises(ValueError, match="folder of other files"):
        check_checkpoint(str(tmp_path))
    for name in (".metadata", "meta.pt"):
        (tmp_path / name).touch()
    check_checkpoint(str(tmp_path))


def test_training_goes_on_from_the_one_before_a_damaged_one(tmp_path, caplog):
    assert newest_whole(tmp_path, "last.ckpt") is None
    earlier = save(tmp_path / "epoch=0.ckpt")
    weights = tmp_path / "weights.ckpt"
    WholeCheckpoints().save_checkpoint({"state_dict": {}}, weights)
    last = save(tmp_path / "last.ckpt")
    assert newest_whole(tmp_path, "last.ckpt") == last
    last.write_bytes(last.read_bytes()[:-1000])
    assert newest_whole(tmp_path, "last.ckpt") == earlier
    assert len([record for record in caplog.records if "is damaged" in record.getMessage()]) == 1
    earlier.unlink()
    assert newest_whole(tmp_path, "last.ckpt") is None


def sharded(folder):
    folder.mkdir()
    for name in (".metadata", "meta.pt", "__0_0.distcp"):
        (folder / name).write_bytes(name.encode() * 50)
    seal_folder(folder, digests_of(folder, [path.name for path in folder.iterdir()]))
    return folder


def test_sharded_checkpoint_is_whole_with_its_digests_alone(tmp_path):
    assert whole_checkpoint(sharded(tmp_path / "whole"))
    changes = {
        "flipped": lambda folder: (folder / "__0_0.distcp").write_bytes(b"x" * 600),
        "cut": lambda folder: (folder / "meta.pt").write_bytes(b""),
        "lacks": lambda folder: (folder / "__0_0.distcp").unlink(),
        "more": lambda folder: (folder / "__1_0.distcp").touch(),
        "unsealed": lambda folder: (folder / "digests.json").unlink(),
        "other digests": lambda folder: (folder / "digests.json").write_text("{}"),
    }
    for name, change in changes.items():
        change(sharded(tmp_path / name))
        assert not whole_checkpoint(tmp_path / name), name
        assert (tmp_path / f"{name}.damaged").is_dir()
