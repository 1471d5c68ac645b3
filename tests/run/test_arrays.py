"""Arrays over sequences: whole or absent, whatever the number of ranks."""

import pytest
import torch
from rank_threads import on_ranks

from nowag_pl.run.arrays import ArrayFolder
from nowag_pl.run.ranks import Ranks

VALUES = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(0))


def write(folder, ranks, values=VALUES, name="hidden", batch_size=2):
    arrays = ArrayFolder(folder, ranks)
    share = values[ranks.rank :: ranks.world_size]
    batches = ((part,) for part in (share.split(batch_size) if len(share) else ()))
    arrays.write({name: (tuple(values.shape[1:]), values.dtype)}, len(values), batches)
    return arrays


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("writers", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_any_rank_reads_what_others_wrote(writers, dtype, in_memory, tmp_path):
    values = (VALUES * 100).to(dtype)
    on_ranks(writers, lambda ranks: write(tmp_path, ranks, values))
    array = ArrayFolder(tmp_path, Ranks(), in_memory).read("hidden", dtype)
    assert len(array) == 7
    assert torch.equal(array.take([6, 0, 3, 3]), values[[6, 0, 3, 3]])
    assert torch.equal(array[5], values[5])


def test_array_is_there_when_all_of_its_files_are(tmp_path):
    on_ranks(3, lambda ranks: write(tmp_path, ranks))
    arrays = ArrayFolder(tmp_path, Ranks())
    assert "hidden" in arrays
    assert "hid" not in arrays
    (tmp_path / "hidden.1_of_3.npy").unlink()
    assert "hidden" not in arrays
    assert on_ranks(2, lambda ranks: "hidden" in ArrayFolder(tmp_path, ranks)) == [False, False]


def test_writing_replaces_the_shares_of_other_ranks(tmp_path):
    on_ranks(3, lambda ranks: write(tmp_path, ranks))
    on_ranks(2, lambda ranks: write(tmp_path, ranks, VALUES + 1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hidden.0_of_2.npy", "hidden.1_of_2.npy"]
    assert torch.equal(ArrayFolder(tmp_path, Ranks()).read("hidden", torch.float32).take(range(7)), VALUES + 1)


def test_half_written_array_is_absent(tmp_path):
    def failing():
        yield (VALUES[:2],)
        raise RuntimeError("the process dies")

    arrays = ArrayFolder(tmp_path, Ranks())
    with pytest.raises(RuntimeError, match="dies"):
        arrays.write({"hidden": ((3, 2), torch.float32)}, 7, failing())
    assert "hidden" not in arrays
    assert not list(tmp_path.iterdir())


def test_removed_and_cleared_arrays_are_gone(tmp_path):
    arrays = write(tmp_path / "folder", Ranks())
    write(tmp_path / "folder", Ranks(), name="targets")
    arrays.remove("hidden")
    arrays.remove("hidden")
    assert "hidden" not in arrays
    assert "targets" in arrays
    arrays.clear()
    assert not (tmp_path / "folder").exists()


def test_damaged_array_is_refused_by_name(tmp_path):
    arrays = write(tmp_path, Ranks())
    file = tmp_path / "hidden.0_of_1.npy"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"hidden\.0_of_1\.npy to be a whole array.*run the same command again"):
        arrays.read("hidden", torch.float32)


def test_mapped_array_is_not_changed_through_what_was_read(tmp_path):
    arrays = write(tmp_path, Ranks())
    arrays.read("hidden", torch.float32)[2].zero_()
    assert torch.equal(arrays.read("hidden", torch.float32)[2], VALUES[2])
