import torch
import torch.nn.functional as F

from nowag_pl.functional.predictions.divergence import kl_divergence
from nowag_pl.functional.predictions.sensitivity import drawn_labels, label_gradient, predicted_divergence


def test_divergence_is_half_the_sum_of_products_of_squares():
    generator = torch.Generator().manual_seed(0)
    change, gradient = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    expected = 0.0
    for window in range(2):
        for token in range(3):
            for output in range(5):
                expected += float(change[window, token, output]) ** 2 * float(gradient[window, token, output]) ** 2 / 2
    assert abs(float(predicted_divergence(change, gradient)) - expected) < 1e-5
    assert predicted_divergence(change.bfloat16(), gradient.bfloat16()).dtype == torch.float64


def test_labels_are_as_frequent_as_predicted():
    logits = torch.tensor([0.1, 2.0, -torch.inf, 1.0])
    uniform = (torch.arange(4000) + 0.5) / 4000
    labels = drawn_labels(logits.expand(4000, -1), uniform)
    shares = labels.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, F.softmax(logits, dim=0), atol=3e-4, rtol=0)


def test_label_is_a_token_also_where_the_random_number_is_almost_one():
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
    labels = drawn_labels(logits, torch.full((64,), 1 - 2**-24))
    assert int(labels.max()) < 5000


def test_label_gradient_is_autograds():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(7)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(label_gradient(logits.detach(), labels), logits.grad)


def test_predicts_the_divergence_of_one_changed_logit():
    """With a change of one output, the diagonal of the Fisher information is all of it."""
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    change = torch.zeros(1, 6)
    change[0, 2] = 0.02
    uniform = (torch.arange(20000) + 0.5) / 20000
    labels = drawn_labels(logits.expand(20000, -1), uniform)
    gradient = label_gradient(logits.expand(20000, -1), labels)
    predicted = float(predicted_divergence(change.expand(20000, -1), gradient)) / 20000
    measured = float(kl_divergence(logits, logits + change)[0])
    assert abs(predicted / measured - 1) < 0.05
