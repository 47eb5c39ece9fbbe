"""Losses that sum over combinations of classes: what is measured, and what is said about it."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep

_random = torch.Generator().manual_seed(3)
INPUTS = torch.randn(8, 4, generator=_random)
SEQUENCES = torch.randn(2, 5, 4, generator=_random)
TAGS = torch.randint(0, 3, (2, 5), generator=_random)
LABELS = torch.randint(0, 5, (8,), generator=_random)
TARGETS = torch.randn(8, generator=_random)
COMBINES = r"sums over combinations of classes.*r may be larger"


class Tagger(nn.Module):
    """Emissions and transitions of a conditional random field."""

    def __init__(self):
        super().__init__()
        self.emit = nn.Linear(4, 3)
        self.move = nn.Parameter(2 * torch.randn(3, 3))

    def loss(self):
        emission = self.emit(SEQUENCES.to(self.move))
        total = emission[:, 0]
        for step in range(1, 5):
            total = torch.logsumexp(
                total[:, :, None] + self.move + emission[:, step, None, :], dim=1
            )
        score = emission.gather(-1, TAGS[..., None]).sum((1, 2))
        score = score + self.move[TAGS[:, :-1], TAGS[:, 1:]].sum(1)
        return (total.logsumexp(-1) - score).mean()

    def paths(self):
        """Return the score of every sequence of tags, [2, 243]."""
        emission = self.emit(SEQUENCES.to(self.move))
        tags = torch.tensor(list(itertools.product(range(3), repeat=5)))
        scores = emission[:, torch.arange(5), tags].sum(-1)
        return scores + self.move[tags[:, :-1], tags[:, 1:]].sum(-1)


class Mixture(nn.Module):
    """A gate and what it weighs: Gaussians with a mean and a width, or softmaxes."""

    def __init__(self, width):
        super().__init__()
        self.gate, self.parts = nn.Linear(4, 3), nn.Linear(4, 3 * width)
        self.width = width

    def terms(self):
        inputs = INPUTS.to(self.gate.weight)
        return self.gate(inputs), self.parts(inputs).view(8, 3, self.width)

    def log_densities(self):
        gate, parts = self.terms()
        targets = TARGETS.to(gate).unsqueeze(-1)
        means, widths = parts.unbind(-1)
        return gate, -0.5 * ((targets - means) / widths.exp()) ** 2 - widths

    def density_loss(self):
        gate, log_density = self.log_densities()
        return -(gate.log_softmax(-1) + log_density).logsumexp(-1).mean()

    def distribution_loss(self):
        gate, parts = self.terms()
        means, widths = parts.unbind(-1)
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=gate),
            torch.distributions.Normal(means, widths.exp()),
        )
        return -mixture.log_prob(TARGETS).mean()

    def softmax_loss(self):
        gate, logits = self.terms()
        mixed = gate.log_softmax(-1).unsqueeze(-1) + logits.log_softmax(-1)
        return functional.nll_loss(mixed.logsumexp(1), LABELS)


class Aligned(nn.Linear):
    """Labels of 7 times, for CTC: the last two times of the second example do not count."""

    def loss(self):
        times = torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(0))
        times[5:, 1] *= 30
        logits = self(times.to(self.weight))
        targets = torch.tensor([[1, 2, 1], [3, 2, 3]])
        lengths = torch.tensor([7, 5]), torch.tensor([3, 3])
        return functional.ctc_loss(logits.log_softmax(-1), targets, *lengths)

    def rows(self):
        times = torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(0)).to(self.weight)
        return torch.cat((self(times[:, 0]), self(times[:5, 1])))


def recorded_step(model, loss, lr=0.05):
    """Return the report and the model before the step, in float64, and after it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    guard = SafeStep(optimizer, model, action="monitor")
    before = copy.deepcopy(model).double()
    guard.record(loss)
    loss().backward()
    optimizer.step()
    return guard.last, before, copy.deepcopy(model).double()


def normalized_step(values, before, after):
    """Return r of logits that ``values(model)`` computes, by a central difference in float64."""
    moved = {
        name: param.detach() - start.detach()
        for (name, param), start in zip(after.named_parameters(), before.parameters(), strict=True)
    }

    def at(t):
        displaced = copy.deepcopy(before)
        with torch.no_grad():
            for name, param in displaced.named_parameters():
                param.add_(moved[name], alpha=t)
            return values(displaced)

    tangent = (at(1e-5) - at(-1e-5)) / 2e-5
    return float((tangent.amax(-1) - tangent.amin(-1)).max()) / math.pi


@pytest.mark.parametrize("name", ["density_loss", "distribution_loss"])
def test_a_mixture_of_densities_is_measured_at_its_gate_and_at_its_sum(name):
    torch.manual_seed(0)
    model = Mixture(2)

    report, before, after = recorded_step(model, getattr(model, name))  # a warning is an error

    def gate(model):
        return model.terms()[0]

    def total(model):
        return sum(model.log_densities())

    expected = max(normalized_step(values, before, after) for values in (gate, total))
    assert report.normalized_step == pytest.approx(expected, rel=1e-5)


def test_a_mixture_of_softmaxes_is_said_to_combine_them():
    torch.manual_seed(0)
    model = Mixture(5)

    with pytest.warns(UserWarning, match=COMBINES):
        report, before, after = recorded_step(model, model.softmax_loss)

    parts = [normalized_step(lambda m, i=i: m.terms()[i], before, after) for i in (0, 1)]
    assert report.normalized_step >= max(parts) * (1 - 1e-5)


def test_a_conditional_random_field_is_said_to_sum_over_sequences():
    torch.manual_seed(0)
    model = Tagger()

    with pytest.warns(UserWarning, match=COMBINES):
        report, before, after = recorded_step(model, model.loss, lr=0.3)

    assert report.status == "ok"
    assert report.normalized_step < normalized_step(Tagger.paths, before, after)


def test_the_sum_over_all_sequences_is_the_loss_that_the_tagger_is_trained_on():
    """So that the test above compares with the right thing."""
    torch.manual_seed(0)
    model = Tagger().double()
    of_tags = int(np.ravel_multi_index(TAGS[0].numpy(), [3] * 5))
    of_others = int(np.ravel_multi_index(TAGS[1].numpy(), [3] * 5))

    by_paths = functional.cross_entropy(model.paths(), torch.tensor([of_tags, of_others]))

    torch.testing.assert_close(model.loss(), by_paths)


def test_ctc_is_measured_row_by_row_and_said_to_sum_over_alignments():
    torch.manual_seed(0)
    model = Aligned(4, 4)

    with pytest.warns(UserWarning, match=rf"ctc_loss: {COMBINES}"):
        report, before, after = recorded_step(model, model.loss)

    expected = normalized_step(Aligned.rows, before, after)
    assert report.estimator == "jvp (r may be larger)"
    assert report.normalized_step == pytest.approx(expected, rel=1e-5)
