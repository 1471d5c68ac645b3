"""What all tests share."""

import gc
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the sizes of the attacks in tests/attack."""
    parser.addoption("--kills", type=int, default=40, help="SIGKILLs at random places of tiny runs")
    parser.addoption("--signals", type=int, default=20, help="SIGTERMs and SIGINTs at random places of tiny runs")
    parser.addoption("--corruptions", type=int, default=200, help="damaged files of a tiny run")


def pytest_collection_finish() -> None:
    """Leave what libraries hold out of later garbage collections, of which each would take a third of a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let libraries end as they do elsewhere; compiled ones name what is left of them."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_test_keeps_signals() -> Iterator[None]:
    """Check that SIGTERM and Ctrl-C end pytest, not the test that happens to run."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
