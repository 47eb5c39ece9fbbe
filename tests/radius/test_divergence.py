"""The divergence of predictions along an update, against float64 and by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safestep import linearized_divergence, logit_spread


def reference(logits, tangent):
    """KL between two softmaxes, in float64 from torch's own function."""
    before, after = (x.double().log_softmax(-1) for x in (logits, logits.double() + tangent))
    return torch.nn.functional.kl_div(after, before, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("size", [1e-3, 0.05, 0.3, 1.0, 5.0, 40.0], ids=str)
@pytest.mark.parametrize("classes", [2, 7, 3000], ids=str)
def test_divergence_is_the_kl_of_the_two_softmaxes(size, classes):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20, classes, generator=generator)
    tangent = size * torch.randn(20, classes, generator=generator)

    found = linearized_divergence(logits, tangent)

    torch.testing.assert_close(found.double(), reference(logits, tangent), rtol=1e-4, atol=1e-10)


def test_tiny_tangents_keep_their_relative_accuracy_in_float32():
    """At 1e-4 the second-order term is exact to 1e-4, and the float64 difference loses digits."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 10, generator=generator)
    tangent = 1e-4 * torch.randn(50, 10, generator=generator)
    share, a = logits.double().softmax(-1), tangent.double()
    moment = [(share * (a - (share * a).sum(-1, keepdim=True)) ** k).sum(-1) for k in (2, 3)]

    found = linearized_divergence(logits, tangent)

    torch.testing.assert_close(found.double(), moment[0] / 2 + moment[1] / 6, rtol=2e-6, atol=0)


@settings(deadline=None)
@given(st.integers(2, 12), st.floats(1e-3, 30), st.integers(0, 10**6))
def test_divergence_is_between_zero_and_hoeffdings_bound(classes, size, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, classes, generator=generator, dtype=torch.float64)
    tangent = size * torch.randn(4, classes, generator=generator, dtype=torch.float64)

    found = linearized_divergence(logits, tangent)

    assert (found >= 0).all()
    assert (found <= logit_spread(tangent).square() / 8 * (1 + 1e-9)).all()


def test_it_is_the_curved_part_of_the_linearised_loss_whatever_the_labels():
    generator = torch.Generator().manual_seed(2)
    logits, tangent = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    labels = labels / labels.sum(-1, keepdim=True)

    def loss(z):
        return torch.nn.functional.cross_entropy(z, labels, reduction="none")

    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    slope = (gradient * tangent).sum(-1)

    found = linearized_divergence(logits, tangent)

    torch.testing.assert_close(found, loss(logits + tangent) - loss(logits) - slope)


def test_shifts_and_permutations_change_nothing():
    generator = torch.Generator().manual_seed(3)
    logits, tangent = torch.randn(2, 5, 4, generator=generator)
    order = torch.tensor([2, 0, 3, 1])

    expected = linearized_divergence(logits, tangent)

    torch.testing.assert_close(linearized_divergence(logits + 7, tangent - 3), expected)
    torch.testing.assert_close(linearized_divergence(logits[:, order], tangent[:, order]), expected)


def test_classes_and_rows_that_do_not_exist_do_not_count():
    logits = torch.tensor([[1.0, 2.0, 0.5], [1.0, 2.0, -math.inf], [0.0, 1.0, 2.0]])
    tangent = torch.tensor([[0.3, -0.2, math.nan], [0.3, -0.2, math.inf], [math.nan, 0.0, 0.0]])
    classes = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])

    found = linearized_divergence(logits, tangent, mask=classes)

    expected = linearized_divergence(torch.tensor([1.0, 2.0]), torch.tensor([0.3, -0.2]))
    torch.testing.assert_close(found, torch.stack([expected, expected, torch.tensor(0.0)]))
    rows = torch.tensor([False, True, False])
    masked = linearized_divergence(logits, tangent, mask=rows)
    torch.testing.assert_close(masked, torch.tensor([0.0, float(expected), 0.0]))


@pytest.mark.parametrize(
    ("logit", "slope"), [(math.nan, 0.0), (math.inf, 0.0), (0.0, math.nan), (0.0, math.inf)]
)
def test_what_is_not_a_number_gives_nan_in_its_row_alone(logit, slope):
    logits, tangent = torch.zeros(2, 3), torch.ones(2, 3)
    logits[0, 1], tangent[0, 1] = logit, slope

    assert linearized_divergence(logits, tangent).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    logits, tangent = torch.zeros(1, 2, dtype=dtype), torch.tensor([[1.0, -1.0]], dtype=dtype)

    found = linearized_divergence(logits, tangent)

    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(math.log(math.cosh(1.0)), rel=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="linearized_divergence: expected `logits`"):
        linearized_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
