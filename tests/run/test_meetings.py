"""Ranks that do not come to a meeting are named, and files of other machines may be seen late."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from nowag_pl.files import await_file, new_array
from nowag_pl.run import ranks
from nowag_pl.run.arrays import ArrayFolder
from nowag_pl.run.ranks import Ranks


@pytest.fixture
def store(monkeypatch):
    """Make this process rank 1 of three, whose others are there if the store says so."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks, "_meetings", iter(range(100)))
    return store


def test_who_does_not_come_is_named(store, monkeypatch):
    monkeypatch.setenv(ranks.TIMEOUT, "0.2")
    store.set("nowag_pl/0/0", "")
    with pytest.raises(TimeoutError, match=r"all 4 ranks within 0\.2 s, but rank 2 and rank 3 did not come"):
        Ranks(1, 4).meet()


def test_a_meeting_ends_when_all_are_there(store):
    for number in range(2):
        for rank in (0, 2):
            store.set(f"nowag_pl/{number}/{rank}", "")
        Ranks(1, 3).meet()
    assert store.check(["nowag_pl/0/0"])  # only rank zero tidies


def test_rank_zero_deletes_the_meeting_before(store):
    for number in range(2):
        store.set(f"nowag_pl/{number}/1", "")
        Ranks(0, 2).meet()
    assert not store.check(["nowag_pl/0/1"])


def test_what_is_wrong_on_a_rank_is_raised(monkeypatch):
    monkeypatch.setattr(Ranks, "gather", lambda _, value: [value, ("it is damaged", None)])
    with pytest.raises(ValueError, match="it is damaged"):
        Ranks(0, 2).gather_work(lambda: 3)
    monkeypatch.setattr(Ranks, "gather", lambda _, value: [value])
    assert Ranks().gather_work(lambda: 3) == [3]


def test_a_file_that_comes_late_is_awaited(tmp_path):
    path = tmp_path / "late"
    threading.Timer(0.1, path.touch).start()
    await_file(path, 10)
    assert path.is_file()
    began = time.monotonic()
    await_file(tmp_path / "never", 0.1)
    assert time.monotonic() - began < 5


def test_an_array_that_comes_late_is_awaited(tmp_path):
    def write():
        with new_array(tmp_path / "states.0_of_1.npy", (2, 3), torch.float32) as array:
            array.fill_(1)

    threading.Timer(0.1, write).start()
    assert len(ArrayFolder(tmp_path, Ranks(1, 2)).read("states", torch.float32)) == 2
