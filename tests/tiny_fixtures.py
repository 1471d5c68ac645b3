"""Fixtures over tiny models, for the test files that name this module in `pytest_plugins`."""

import logging
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Outcome, call, fit_arguments, save_tiny_model, write_text


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a tiny model, which tests only read."""
    made: dict[tuple, Path] = {}

    def get(family: str = "llama", **settings) -> Path:
        key = (family, *sorted(settings.items(), key=str))
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp(family) / "model", family, **settings)
        return made[key]

    return get


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with texts to calibrate and evaluate on, and the token cache."""
    folder = tmp_path_factory.mktemp("workplace")
    write_text(folder / "calibration.txt", 2000, seed=0)
    write_text(folder / "eval.txt", 500, seed=1)
    return folder


@pytest.fixture
def own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back the handlers of SIGTERM and Ctrl-C, and what they know."""
    from nowag_pl.lit.preemption import _Request

    for name, value in {"received": 0, "trainers": [], "launcher": None}.items():
        monkeypatch.setattr(_Request, name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_signals: None, tmp_path: Path
) -> Iterator[Callable[..., Outcome]]:
    """Run `python main.py` in this process, in an empty folder, and put back what it changes globally."""
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # so that what seed_everything sets is undone
    names = ["", "nowag_pl", "lightning.pytorch", "lightning.fabric"]
    before = {name: (list(logging.getLogger(name).handlers), logging.getLogger(name).level) for name in names}
    for name in names[1:]:
        logging.getLogger(name).handlers[:] = []  # they write to a stderr that pytest has closed since
    rank = getattr(rank_zero_only, "rank", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a user does not see deprecations of libraries
        yield lambda arguments: call(arguments, capfd, monkeypatch)
    for name, (handlers, level) in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).setLevel(level)
    rank_zero_only.rank = rank


class FinishedFit:
    """A `fit` that several tests look at, and none changes."""

    def __init__(self, outcome: Outcome, run_dir: Path) -> None:
        self.outcome, self.run_dir = outcome, run_dir

    def copy(self, folder: Path) -> Path:
        """Put a copy that a test may change into a folder."""
        return Path(shutil.copytree(self.run_dir, folder))


@pytest.fixture(scope="session")
def finished_fits() -> dict[tuple, FinishedFit]:
    """Return what `finished_fit` has run so far."""
    return {}


@pytest.fixture
def finished_fit(
    command_line: Callable[..., Outcome],
    model_folder: Callable[..., Path],
    workplace: Path,
    tmp_path_factory: pytest.TempPathFactory,
    finished_fits: dict[tuple, FinishedFit],
) -> Callable[..., FinishedFit]:
    """Return a function that runs a `fit` of a tiny model once for all tests."""

    def get(*more: str, family: str = "llama", **settings: Any) -> FinishedFit:
        key = (more, family, *sorted(settings.items(), key=str))
        if key not in finished_fits:
            run_dir = tmp_path_factory.mktemp("fit") / "run"
            outcome = command_line(fit_arguments(workplace, model_folder(family, **settings), run_dir, *more))
            assert outcome.code == 0, outcome.message
            finished_fits[key] = FinishedFit(outcome, run_dir)
        return finished_fits[key]

    return get
