"""The dense model as a teacher: losses from its recorded predictions."""

import pytest
import torch
from rank_threads import on_ranks
from stage_runs import plan_of
from tiny_models import load_whole, random_tokens

from nowag_pl.functional.predictions.distillation import distillation_loss, top_distillation_loss, top_log_probabilities
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.teacher import TeacherSettings

pytest_plugins = ["tiny_fixtures"]

WINDOWS = random_tokens(5, 12, seed=3)


def loss(teacher, indices, logits):
    """Return the loss of whole windows, the positions of each in two parts."""
    of = teacher.loss_of(indices)
    return torch.cat([of(logits[:, part], part) for part in (slice(0, 5), slice(5, logits.shape[1] - 1))], dim=1)


def student_logits(num_windows: int) -> torch.Tensor:
    return torch.randn(num_windows, 12, 2048, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher(model_folder, tmp_path):
    def make(distillation, ranks=None):
        return CompressionRun(Checkpoint(str(model_folder())), tmp_path / "run", plan_of(), ranks=ranks).teacher(
            WINDOWS, distillation
        )

    return make


@pytest.fixture
def dense_logits(model_folder):
    with torch.no_grad():
        return load_whole(model_folder())(WINDOWS).logits


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_is_the_divergence_from_the_dense_model(temperature, teacher, dense_logits):
    indices = torch.tensor([4, 1])
    student = student_logits(2)
    losses = loss(teacher(TeacherSettings(temperature=temperature, batch_size=2)), indices, student)
    for row, index in enumerate(indices):
        expected = distillation_loss(dense_logits[index, :-1], student[row, :-1], temperature)
        torch.testing.assert_close(losses[row], expected, rtol=1e-4, atol=1e-5)


def test_loss_of_the_likeliest_tokens(teacher, dense_logits):
    indices, student = torch.tensor([0, 3]), student_logits(2)
    losses = loss(teacher(TeacherSettings(temperature=2.0, top_k=7, batch_size=3)), indices, student)
    for row, index in enumerate(indices):
        top = top_log_probabilities(dense_logits[index, :-1], 7, 2.0)
        expected = top_distillation_loss(*top, student[row, :-1], 2.0)
        torch.testing.assert_close(losses[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 7])
def test_ranks_share_the_work_and_read_the_whole(top_k, teacher):
    distillation, indices, student = TeacherSettings(top_k=top_k, batch_size=2), torch.arange(5), student_logits(5)
    for each in on_ranks(3, lambda ranks: loss(teacher(distillation, ranks), indices, student)):
        torch.testing.assert_close(each, loss(teacher(distillation), indices, student))


@pytest.mark.parametrize("top_k", [None, 7])
def test_what_is_recorded_is_not_computed_again(top_k, teacher, monkeypatch):
    teacher(TeacherSettings(top_k=top_k))

    def never(self, index):
        raise AssertionError("a block was read")

    monkeypatch.setattr(StreamedModel, "load_block", never)
    teacher(TeacherSettings(top_k=top_k))


def test_more_tokens_than_the_vocabulary_are_refused(teacher):
    with pytest.raises(ValueError, match=r"model\.objective\.top_k of at most 2048.*got 2049"):
        teacher(TeacherSettings(top_k=2049))


@pytest.mark.parametrize(
    ("settings", "name"), [({"temperature": 0.0}, "temperature"), ({"top_k": 0}, "top_k"), ({"batch_size": 0}, "batch")]
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=rf"model\.objective\.{name}"):
        TeacherSettings(**settings)
