"""Which tensors are found to be the logits, in plain loops and in recorded training steps."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep.capture import LogitFinder, LogitsNotFoundError, find_logits
from safestep.capture.gradient import GradientEvidence
from safestep.capture.outputs import named_tensors
from safestep.capture.temperature import binary_temperature, label_temperature

GENERATOR = torch.Generator().manual_seed(3)
INPUTS = torch.randn(16, 4, generator=GENERATOR)
LABELS = torch.randint(0, 5, (16,), generator=GENERATOR)
MANY = functional.one_hot(LABELS, 5).float()
MODEL = nn.Linear(4, 5)
nn.init.normal_(MODEL.weight, generator=GENERATOR)
nn.init.normal_(MODEL.bias, generator=GENERATOR)


def loop_call(model, loss, *inputs):
    """Return what a recorder knows of a forward call after `loss` of its output went backward."""
    call = SimpleNamespace(
        run=run_within(lambda: model(*inputs)),
        gradients={}, empty=[], obstacle=None, is_resting=False, modes=([], []),
        unused_generators=(), keeper=None, examples=None,
    )  # fmt: skip
    output = model(*inputs)
    tensors = [(name, t) for name, t in named_tensors(output) if t.requires_grad]
    gradients = torch.autograd.grad(loss(output), [t for _, t in tensors], allow_unused=True)
    for (name, _), gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            call.gradients[name] = GradientEvidence.of(gradient)
    return call


def step_call(step):
    """Return what a recorder knows of a training step that it was told of."""
    return SimpleNamespace(
        run=run_within(step),
        gradients={},
        empty=[],
        obstacle=None,
        is_resting=False,
        modes=([], []),
        unused_generators=(),
        examples=None,
        keeper=None,
    )


def run_within(function):
    def run(*around):
        with ExitStack() as stack:
            for context in around:
                stack.enter_context(context)
            return function()

    return run


def found_in(call, logits=None):
    finder = LogitFinder(logits)
    with torch.no_grad():
        return finder.find(call), finder


OUTPUT_FORMS = {
    "logits": (nn.Identity(), lambda z: functional.cross_entropy(z, LABELS)),
    "smoothed": (
        nn.Identity(),
        lambda z: functional.cross_entropy(z, LABELS, label_smoothing=0.1),
    ),
    "log-probabilities": (nn.LogSoftmax(-1), lambda z: functional.nll_loss(z, LABELS)),
    "probabilities": (nn.Softmax(-1), lambda p: functional.nll_loss(p.log(), LABELS)),
}


@pytest.mark.parametrize("form", OUTPUT_FORMS)
def test_output_of_any_form_gives_the_softmax_of_the_loss(form):
    last, loss = OUTPUT_FORMS[form]

    (found,), finder = found_in(loop_call(nn.Sequential(MODEL, last), loss, INPUTS))

    torch.testing.assert_close(found.values.softmax(-1), MODEL(INPUTS).softmax(-1).detach())
    assert found.mask is not None
    assert found.mask.all()
    assert finder.warning is None


@pytest.mark.parametrize("last", [nn.Identity(), nn.Sigmoid()], ids=["logits", "probabilities"])
def test_output_that_enters_sigmoids_gives_rows_of_two_classes(last):
    def loss(output):
        probability = output if isinstance(last, nn.Sigmoid) else output.sigmoid()
        return functional.binary_cross_entropy(probability, MANY)

    (found,), _ = found_in(loop_call(nn.Sequential(MODEL, last), loss, INPUTS))

    assert found.values.shape == (16, 5, 2)
    torch.testing.assert_close(found.values.softmax(-1)[..., 1], MODEL(INPUTS).sigmoid().detach())


@pytest.mark.parametrize(
    ("temperature", "smoothing"), [(0.25, 0.0), (2.0, 0.0), (7.0, 0.0), (2.0, 0.1), (7.0, 0.1)]
)
def test_temperature_outside_the_model_is_found_and_told(temperature, smoothing):
    def loss(z):
        return functional.cross_entropy(z / temperature, LABELS, label_smoothing=smoothing)

    model = nn.Linear(4, 8)
    nn.init.normal_(model.weight, generator=GENERATOR)
    (found,), finder = found_in(loop_call(model, loss, INPUTS))

    torch.testing.assert_close(
        found.values, model(INPUTS).detach() / temperature, rtol=1e-3, atol=0.01
    )
    assert finder.description == f"logits: output / {temperature:g}, [16, 8]"


def test_rows_that_are_pushed_away_from_their_label_are_told():
    weight = torch.tensor([1.0, -1.0]).repeat(8)

    def loss(z):
        return (weight * functional.cross_entropy(z, LABELS, reduction="none")).mean()

    _, finder = found_in(loop_call(MODEL, loss, INPUTS))
    _, usual = found_in(loop_call(MODEL, lambda z: functional.cross_entropy(z, LABELS), INPUTS))

    assert "pushed away from their label" in str(finder.warning)
    assert usual.warning is None


def test_temperature_of_each_rows_own_is_refused():
    temperatures = torch.linspace(0.5, 4, 16).unsqueeze(-1)
    call = loop_call(MODEL, lambda z: functional.cross_entropy(z / temperatures, LABELS), INPUTS)

    with pytest.raises(LogitsNotFoundError, match="a temperature of its own in each row"):
        find_logits(call)


def test_temperature_that_cannot_be_checked_is_said_so():
    teacher = torch.randn(16, 5, generator=GENERATOR).softmax(-1)

    (found,), finder = found_in(
        loop_call(MODEL, lambda z: functional.cross_entropy(z / 3, teacher), INPUTS)
    )

    torch.testing.assert_close(found.values, MODEL(INPUTS).detach())
    assert "does not show whether a temperature comes between" in str(finder.warning)


NO_SOFTMAX = {
    "squared error": lambda z: functional.mse_loss(z, MANY),
    "margin": lambda z: functional.multi_margin_loss(z, LABELS),
    "pairs": lambda z: functional.softplus(z[:, 1] - z[:, 0]).mean(),
    "features before a LayerNorm": lambda z: functional.cross_entropy(
        functional.layer_norm(z, (5,)) @ torch.arange(15.0).cos().view(5, 3), LABELS % 3
    ),
    "features of a contrastive loss": lambda z: functional.cross_entropy(
        functional.normalize(z) @ functional.normalize(z).roll(1, 0).T, torch.arange(16)
    ),
}


@pytest.mark.parametrize("name", NO_SOFTMAX)
def test_output_that_is_no_logits_is_refused(name):
    with pytest.raises(LogitsNotFoundError, match="logits=lambda output"):
        find_logits(loop_call(MODEL, NO_SOFTMAX[name], INPUTS))


def test_features_before_a_layernorm_are_refused_though_one_row_hardly_varies():
    inputs = torch.cat([0.01 * INPUTS[:1], INPUTS[1:]])  # its variance is next to LayerNorm's eps
    model = nn.Linear(4, 5, bias=False)
    model.weight = MODEL.weight

    with pytest.raises(LogitsNotFoundError, match="logits=lambda output"):
        find_logits(loop_call(model, NO_SOFTMAX["features before a LayerNorm"], inputs))


def test_ignored_rows_do_not_count_and_are_told():
    labels = LABELS.index_fill(0, torch.arange(4), -100)

    (found,), finder = found_in(
        loop_call(MODEL, lambda z: functional.cross_entropy(z, labels), INPUTS)
    )

    assert torch.equal(found.mask, labels >= 0)
    assert finder.description == "logits: output, [16, 5], 25 % of rows ignored"


def test_segmentation_maps_have_their_classes_second():
    maps, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 6, (2, 3, 5))
    model = nn.Conv2d(4, 6, 1)

    (found,), _ = found_in(loop_call(model, lambda z: functional.cross_entropy(z, labels), maps))

    torch.testing.assert_close(found.values, model(maps).detach().movedim(1, -1))


class Language(nn.Module):
    """Attention, a head, and the loss inside: what a causal language model returns."""

    def __init__(self):
        super().__init__()
        self.embed, self.query, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, inputs, labels):
        hidden = self.embed(inputs)
        attention = (self.query(hidden) @ hidden.T).softmax(-1)
        logits = self.head(hidden + attention @ hidden)
        loss = functional.cross_entropy(logits / 2, labels)
        return {"loss": loss, "logits": logits, "attentions": (attention,), "hidden": hidden}


def test_loss_inside_the_model_decides_with_its_temperature():
    model = Language()
    call = loop_call(model, lambda output: output["loss"], INPUTS, LABELS)

    (found,), _ = found_in(call)

    assert found.name == "input of cross_entropy"
    torch.testing.assert_close(found.values, model(INPUTS, LABELS)["logits"].detach() / 2)


def test_loss_inside_the_model_that_is_not_trained_on_does_not_count():
    model = Language()
    call = loop_call(
        model, lambda output: functional.cross_entropy(output["logits"], LABELS), INPUTS, LABELS
    )

    (found,), _ = found_in(call)

    assert found.name == "output.logits"
    torch.testing.assert_close(found.values, model(INPUTS, LABELS)["logits"].detach())


def test_outputs_between_the_softmax_and_the_loss_inside_the_model_are_part_of_the_loss():
    torch.manual_seed(0)
    model, labels = nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6], div_value=1.5), torch.arange(16) % 9
    call = loop_call(model, lambda output: output.loss, INPUTS, labels)

    found, finder = found_in(call)

    assert {each.name.partition(" (")[0] for each in found} == {"input of log_softmax"}
    assert sorted(each.values.shape[-1] for each in found) == [3, 3, 5]
    assert finder.warning is None


def test_attention_is_never_taken_for_logits():
    model = Language()

    def step():
        return model(INPUTS, LABELS)["logits"].square().mean()

    with pytest.raises(LogitsNotFoundError, match="no softmax, sigmoid or log-sum-exp"):
        find_logits(step_call(step))


class Heads(nn.Module):
    """Two classifiers and a regression on the same input."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse, self.value = nn.Linear(4, 5), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, inputs):
        return {"fine": self.fine(inputs), "coarse": self.coarse(inputs), "v": self.value(inputs)}


def heads_loss(output):
    fine, coarse = output["fine"], functional.cross_entropy(output["coarse"], LABELS % 3)
    return functional.cross_entropy(fine, LABELS) + coarse + output["v"].square().mean()


def test_every_head_is_found_and_what_is_no_softmax_is_named():
    found, finder = found_in(loop_call(Heads(), heads_loss, INPUTS))

    assert [each.name for each in found] == ["output.fine", "output.coarse"]
    assert finder.description == "logits: output.fine, [16, 5]; output.coarse, [16, 3]"
    assert "output.v: not measured" in str(finder.warning)


def test_every_head_of_a_recorded_step_is_found():
    model = Heads()

    found, _ = found_in(step_call(lambda: heads_loss(model(INPUTS))))

    assert {tuple(each.values.shape) for each in found} == {(16, 5), (16, 3)}
    assert found[0].name != found[1].name


def test_recorded_loss_that_is_only_logged_does_not_count():
    def step():
        output = MODEL(INPUTS)
        functional.cross_entropy(100 * output, LABELS)
        return functional.cross_entropy(output, LABELS)

    (found,), _ = found_in(step_call(step))

    torch.testing.assert_close(found.values, MODEL(INPUTS).detach())


@pytest.mark.parametrize("is_reverse", [False, True], ids=["forward", "reverse"])
def test_teacher_of_a_distillation_does_not_count(is_reverse):
    teacher = nn.Linear(4, 5)

    def step():
        student = MODEL(INPUTS).log_softmax(-1)
        with torch.no_grad():
            taught = (teacher(INPUTS) / 2).log_softmax(-1)
        pair = (taught, student) if is_reverse else (student, taught)
        return functional.kl_div(*pair, reduction="batchmean", log_target=True)

    (found,), _ = found_in(step_call(step))

    torch.testing.assert_close(found.values.softmax(-1), MODEL(INPUTS).softmax(-1).detach())


def test_recorded_step_may_return_a_mapping_with_the_loss():
    def step():
        output = MODEL(INPUTS)
        return {"loss": functional.cross_entropy(output, LABELS), "probability": output.softmax(-1)}

    found, _ = found_in(step_call(step))

    assert [each.name for each in found] == ["input of cross_entropy"]


def test_recorded_step_without_a_loss_is_refused():
    with pytest.raises(LogitsNotFoundError, match="returned no loss with a gradient"):
        find_logits(step_call(lambda: None))


def test_finder_runs_a_known_call_once():
    runs = []

    def step():
        runs.append(torch.is_grad_enabled())
        return functional.cross_entropy(MODEL(INPUTS), LABELS)

    finder = LogitFinder()
    with torch.no_grad():
        for _ in range(3):
            finder.find(step_call(step))

    assert runs == [False, True, False, False]


def test_users_word_comes_first():
    call = loop_call(MODEL, lambda z: functional.cross_entropy(z / 3, LABELS), INPUTS)

    (found,), finder = found_in(call, lambda output: output / 3)

    torch.testing.assert_close(found.values, MODEL(INPUTS).detach() / 3)
    assert torch.equal(found.mask, torch.ones(16, dtype=torch.bool))
    assert finder.description == "logits: logits(output), [16, 5]"


def test_user_may_give_masks_and_several_heads():
    mask = LABELS > 2
    call = loop_call(MODEL, lambda z: functional.cross_entropy(z, LABELS), INPUTS)

    found, _ = found_in(call, lambda output: [(output[:, :3], mask), output[:, 3:]])

    assert [each.name for each in found] == ["logits(output)[0]", "logits(output)[1]"]
    assert torch.equal(found[0].mask, mask)


@pytest.mark.parametrize("given", [None, 3.0, {"a": 1}, torch.tensor(1.0)], ids=str)
def test_user_is_told_what_logits_must_return(given):
    call = loop_call(MODEL, lambda z: functional.cross_entropy(z, LABELS), INPUTS)

    with pytest.raises(TypeError, match="expected `logits` to return a tensor with the classes"):
        find_logits(call, lambda output: given)


LABELLED = {
    "cross-entropy": lambda z, y: functional.cross_entropy(z, y),
    "weighted": lambda z, y: functional.cross_entropy(
        z, y, torch.arange(1.0, 1 + z.shape[1]).to(z)
    ),
    "focal": lambda z, y: (
        (1 - z.softmax(-1).gather(1, y[:, None])) ** 2 * -z.log_softmax(-1).gather(1, y[:, None])
    ).mean(),
    "generalised": lambda z, y: -z.softmax(-1).gather(1, y[:, None]).pow(0.7).mean(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", [3, 10, 1000])
@pytest.mark.parametrize("temperature", [1.0, 3.0], ids=str)
@pytest.mark.parametrize("name", LABELLED)
def test_label_temperature_of_any_loss_of_the_labels_probability(
    name, temperature, num_classes, dtype
):
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(32, num_classes, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, num_classes, (32,), generator=generator)
    (gradient,) = torch.autograd.grad(LABELLED[name](logits / temperature, labels), logits)

    found = label_temperature(logits, gradient)

    assert found == pytest.approx(temperature, rel=0.02 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("temperature", [1.0, 3.0], ids=str)
def test_binary_temperature_with_weights_for_labels_and_columns(temperature):
    logits = (2 * torch.randn(64, 5, generator=GENERATOR)).requires_grad_()
    labels = torch.rand(64, 5, generator=GENERATOR).round()
    loss = functional.binary_cross_entropy_with_logits(
        logits / temperature, labels, pos_weight=torch.arange(1.0, 6)
    )

    found = binary_temperature(logits, *torch.autograd.grad(loss, logits))

    assert found == pytest.approx(temperature, rel=1e-3)


def test_gradient_over_a_batch_axis_is_no_evidence_of_classes():
    features = torch.randn(16, 4, requires_grad=True)
    loss = functional.batch_norm(features, None, None, training=True).pow(3).sum()

    assert GradientEvidence.of(*torch.autograd.grad(loss, features)).class_axis is None
