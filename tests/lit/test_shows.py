"""Which loggers get which pages: fakes of the libraries behind Lightning's loggers note what they are given."""

from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from nowag_pl.lit.shows import show_of
from nowag_pl.reports.board import Board
from nowag_pl.stages.damage import Damage

PIXELS = np.zeros((2, 3, 3), dtype=np.uint8)
ROWS = [
    {
        "name": f"model.layers.{block}.q_proj",
        "shape": [2, 2],
        "loss": 0.25 + block,
        "sparsity": 0.5,
        "bits_per_weight": 9,
    }
    for block in (0, 1)
]


class _Noting:
    """Notes every call of every method, in place of a library's object."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *positional, **named: self.calls.append((name, positional, named))


def fake(kind: type, **attributes: Any) -> Any:
    """Return a logger of this class whose library is not installed."""
    members = {name: staticmethod(value) if callable(value) else value for name, value in attributes.items()}
    return type(f"Fake{kind.__name__}", (kind,), {"__init__": lambda self: None, **members})()


def test_weights_and_biases_gets_images_by_its_own_method():
    noting = _Noting()
    logger = fake(WandbLogger, log_image=noting.log_image, log_metrics=noting.log_metrics)
    show = show_of(logger)
    show.image("model/linears", PIXELS, 3)
    show.scalars({"loss": 0.5}, 4)
    (image, (tag, images), named), (metrics, (values,), step) = noting.calls
    assert (image, tag, named) == ("log_image", "model/linears", {"step": 3})
    assert images == [PIXELS]
    assert (metrics, values, step) == ("log_metrics", {"loss": 0.5}, {"step": 4})


@pytest.mark.parametrize(
    ("kind", "positional", "named"),
    [
        (MLFlowLogger, ("the run", PIXELS), {"key": "weights/q", "step": 1}),
        (CometLogger, (PIXELS,), {"name": "weights/q", "step": 1}),
    ],
)
def test_other_services_get_images_through_their_experiment(kind, positional, named):
    noting = _Noting()
    show_of(fake(kind, experiment=noting, run_id="the run")).image("weights/q", PIXELS, 1)
    assert noting.calls == [("log_image", positional, named)]


def test_a_logger_without_images_shows_nothing(tmp_path):
    assert show_of(CSVLogger(tmp_path)) is None
    assert show_of(TensorBoardLogger(tmp_path)) is not None


def test_every_page_reaches_every_logger():
    noting = [_Noting(), _Noting()]
    board = Board(
        [show_of(fake(WandbLogger, log_image=each.log_image, log_metrics=each.log_metrics)) for each in noting]
    )
    board.heat_maps(ROWS)
    board.damage("one_shot", Damage([0.1, 0.2], [0.1, 0.3], [0.01, 0.02]))
    board.finetuning([{"before": 0.2, "after": 0.1, "curve": [0.1]}] * 2)
    board.summary("one_shot", "title", ROWS, {"text": {"perplexity": 3.0}}, 8)
    board.hyperparameters("one_shot", {"seed": 0}, ROWS, {"text": {"perplexity": 3.0}})
    first, second = ([(name, positional[0]) for name, positional, _ in each.calls] for each in noting)
    assert first == second
    assert [tag for name, tag in first if name == "log_image"] == ["model/linears", "model/finetuning"]
    assert ("log_metrics", {"within_linears/mean_loss": 0.75, "within_linears/mean_bits_per_weight": 9.0,
                            "perplexity/text/one_shot": 3.0}) in first  # fmt: skip
