"""What a report says of the gradient that the optimizer used."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep, read_run
from safestep.report.verdict import write_verdict


@pytest.fixture
def trained(tmp_path):
    """Return a function that trains with a change of the gradient, and reads the run."""

    def train(change, steps=30, audit_interval=1):
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options = {"estimator": "jvp", "run_dir": tmp_path, "audit_interval": audit_interval}
        with SafeStep(optimizer, model, **options) as guard:
            for step in range(steps):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(torch.randn(8, 6)), torch.randint(5, (8,)))
                loss.backward()
                change(model, step)
                guard.log(loss=loss.detach())
                optimizer.step()
        return write_verdict(read_run(tmp_path))

    return train


def test_a_gradient_that_matched_everywhere_is_told_in_the_story(trained):
    verdict = trained(lambda *_: None)

    assert (
        "The gradient was checked against the loss at 30 steps, and matched." in verdict.sentences
    )


def test_a_clipped_gradient_is_told_with_its_share_and_factor(trained):
    def clip(model, step):
        if step >= 15:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    verdict = trained(clip)

    (told,) = [text for text in verdict.sentences if "clipped at" in text]
    assert told.startswith("The gradient was clipped at 50 % of 30 audited steps, to 0.0")


def test_a_wrong_gradient_is_in_the_headline_and_its_end_in_the_story(trained):
    def change(model, step):
        if 12 <= step < 20:
            model[0].weight.grad *= 2

    with pytest.warns(UserWarning, match="gradient does not match"):
        verdict = trained(change)

    assert verdict.tone == "warn"
    assert "The gradient does not match the loss: ratio" in verdict.headline
    assert "since step 12 (0.weight differs most" in verdict.headline
    assert any("matches the loss again" in text for text in verdict.sentences)
    assert not any("does not match" in text for text in verdict.sentences)


def test_a_run_that_is_not_audited_says_why(trained):
    def noise(model, step):
        for param in model.parameters():
            param.grad += 0.1 * torch.randn_like(param)

    verdict = trained(noise, audit_interval=None)

    (told,) = [text for text in verdict.sentences if "gradient" in text]
    assert told.startswith("The gradient is not audited: ")
