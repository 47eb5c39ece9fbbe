"""The same promises on a GPU: what is measured, what is clipped, and that nothing else changes."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep, certified_radius, logits_jvp

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
VARIANTS = {
    "auto": {"estimator": "auto"},
    "jvp": {"estimator": "jvp"},
    "auto, no copy": {"estimator": "auto", "copy": False},
    "jvp, no copy": {"estimator": "jvp", "copy": False},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Let float32 be float32: a convolution in TF32 is off by 1e-3 itself."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def said():
    """Fail where the package warns, whatever another version of torch has to say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    assert not [str(each.message) for each in caught if "safestep" in str(each.message).lower()]


@pytest.fixture
def deterministic(monkeypatch):
    """Choose kernels that give the same bits every time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_host(*models):
    return [copy.deepcopy(model).cpu() for model in models]


def on_device(batch):
    return [tensor.to(DEVICE) for tensor in batch]


def adamw(model, lr=1e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def one_step(model, optimizer, batch, scaler=None, dtype=None):
    optimizer.zero_grad()
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        loss = cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


# In bfloat16 logits and their tangents have 8 bits.
PRECISIONS = {"float32": (None, 1e-3), "bfloat16": (torch.bfloat16, 0.05)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["multilayer", "residual", "attention"])
def test_r_is_that_of_a_float64_product_on_the_host(
    name, precision, make_model, make_batch, dense_normalized_step, record_property
):
    dtype, rel = PRECISIONS[precision]
    model, batch = make_model(name).to(DEVICE), make_batch(name)
    optimizer = adamw(model, 1e-2)
    guard = SafeStep(optimizer, model, estimator="jvp", action="monitor")
    errors = []

    for _ in range(3):
        before = copy.deepcopy(model)
        one_step(model, optimizer, on_device(batch), dtype=dtype)
        expected = dense_normalized_step(*on_host(before, model), batch[0])
        errors.append(abs(guard.last.normalized_step / expected - 1))

    record_property("figure", f"r {guard.last.normalized_step:.5g}, error {max(errors):.1e}")
    assert guard.last.estimator == "jvp"
    assert max(errors) < rel


@pytest.mark.filterwarnings("default")
def test_a_recurrent_model_is_measured(
    make_model, make_batch, dense_normalized_step, record_property, said
):
    """The vendor's kernels for it have no forward mode, and the guard says so."""
    model, batch = make_model("recurrent").to(DEVICE), make_batch("recurrent")
    optimizer = adamw(model, 1e-2)
    guard = SafeStep(optimizer, model, estimator="jvp", action="monitor")
    before = copy.deepcopy(model)

    one_step(model, optimizer, on_device(batch))

    expected = dense_normalized_step(*on_host(before, model), batch[0])
    error = abs(guard.last.normalized_step / expected - 1)
    record_property("figure", f"estimator {guard.last.estimator}, error {error:.1e}")
    assert error < (1e-3 if guard.last.estimator == "jvp" else 0.15)
    assert any("has no forward-mode derivative" in str(each.message) for each in said)
    said.clear()


@variants
@pytest.mark.parametrize("radius", ["bound", "certified"])
def test_a_spike_of_the_learning_rate_is_clipped(
    radius, options, make_model, make_batch, dense_normalized_step, record_property
):
    model, batch = make_model("attention").to(DEVICE), make_batch("attention")
    optimizer = adamw(model)
    guard = SafeStep(optimizer, model, radius=radius, **options)
    for _ in range(24):
        one_step(model, optimizer, on_device(batch))
    assert guard.last.status == "ok"

    optimizer.param_groups[0]["lr"] *= 1000
    before = copy.deepcopy(model)
    one_step(model, optimizer, on_device(batch))

    proposed, applied = guard.last.normalized_step, guard.last.normalized_step * guard.last.scale
    independent = dense_normalized_step(*on_host(before, model), batch[0])
    record_property("figure", f"r {proposed:.4g}, applied {applied:.6f}, from pi {independent:.4f}")
    assert guard.last.status == "clipped"
    assert proposed > 2
    assert applied == pytest.approx(1, rel=1e-3)
    assert all(param.isfinite().all() for param in model.parameters())
    if radius == "bound":
        assert independent == pytest.approx(1, rel=1e-3)
    else:
        assert independent > 1 - 1e-3  # the certified radius is never the shorter one


@variants
@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "float16, scaled"])
@pytest.mark.usefixtures("deterministic")
def test_training_is_bitwise_the_same(
    options, scaled, make_model, make_batch, record_property, said
):
    """Attention draws its dropout mask in a kernel without a derivative, and the guard says so."""

    def train(guard_options):
        torch.manual_seed(7)
        torch.cuda.manual_seed_all(7)
        model = make_model("attention-dropout").to(DEVICE)
        optimizer = adamw(model)
        guard = None
        if guard_options is not None:
            guard = SafeStep(optimizer, model, max_normalized_step=1e9, **guard_options)
        # So large a first scale overflows: the first steps are left out by the scaler.
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24) if scaled else None
        reports = []
        for seed in range(30):
            batch = on_device(make_batch("attention-dropout", seed=seed))
            one_step(model, optimizer, batch, scaler, torch.float16 if scaled else None)
            reports.append(guard and guard.last)
        state = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
        return [model.state_dict(), optimizer.state_dict()["state"], state], reports

    expected, _ = train(None)
    actual, reports = train(options)

    taken = [report for report in reports if report is not None and report.status == "ok"]
    statuses = {report.status for report in reports if report is not None}
    r = max(report.normalized_step for report in taken)
    estimators = ", ".join(sorted({report.estimator for report in taken}))
    record_property("figure", f"{len(taken)} of 30 steps taken, largest r {r:.3g}, {estimators}")
    # A fused optimizer leaves a step out by itself, and the guard says so.
    assert statuses <= ({"ok", "skipped"} if scaled else {"ok"})
    assert len(taken) > 15
    assert 0 < r < math.inf
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    said[:] = [each for each in said if "has no forward-mode derivative" not in str(each.message)]


@variants
def test_a_spike_in_float16_under_a_scaler_is_clipped(
    options, make_model, make_batch, dense_normalized_step, record_property
):
    model, batch = make_model("multilayer").to(DEVICE), make_batch("multilayer")
    optimizer = adamw(model)
    guard = SafeStep(optimizer, model, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    for _ in range(24):
        one_step(model, optimizer, on_device(batch), scaler, torch.float16)

    optimizer.param_groups[0]["lr"] *= 1000
    before = copy.deepcopy(model)
    one_step(model, optimizer, on_device(batch), scaler, torch.float16)

    independent = dense_normalized_step(*on_host(before, model), batch[0])
    record_property("figure", f"r {guard.last.normalized_step:.4g}, applied {independent:.4f}")
    assert guard.last.status == "clipped"
    assert independent == pytest.approx(1, rel=0.02)  # float16 has 11 bits


@pytest.mark.parametrize("action", ["not finite", "infinite rate"])
@variants
def test_a_step_that_is_not_finite_is_undone(options, action, make_model, make_batch):
    model, batch = make_model("multilayer").to(DEVICE), make_batch("multilayer")
    optimizer = adamw(model)
    guard = SafeStep(optimizer, model, **options)
    one_step(model, optimizer, on_device(batch))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])

    inputs, targets = on_device(batch)
    if action == "not finite":
        inputs = inputs * math.nan
    else:
        optimizer.param_groups[0]["lr"] = math.inf
    one_step(model, optimizer, (inputs, targets))

    assert guard.last.status == "skipped"
    after = [model.state_dict(), optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_certified_radius_is_that_of_float64_on_the_host(
    make_model, make_batch, record_property
):
    model, (inputs, _) = make_model("multilayer"), make_batch("multilayer", size=64)
    update = {name: -0.1 * torch.randn_like(param) for name, param in model.named_parameters()}
    wide = {name: value.double() for name, value in update.items()}
    expected = certified_radius(*logits_jvp(copy.deepcopy(model).double(), wide, inputs.double()))

    model = model.to(DEVICE)
    narrow = {name: value.to(DEVICE) for name, value in update.items()}
    actual = certified_radius(*logits_jvp(model, narrow, inputs.to(DEVICE)))

    error = (actual.cpu() / expected - 1).abs().max().item()
    record_property("figure", f"error {error:.1e}, smallest {expected.min().item():.4g}")
    assert error < 1e-3


class WithLoss(nn.Module):
    """Returns its own loss beside the logits, as models of transformers do."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, inputs, targets):
        logits = self.body(inputs)
        return cross_entropy(logits.flatten(0, -2), targets.flatten()), logits


@pytest.mark.parametrize("is_inside", [False, True], ids=["loss outside", "loss inside"])
def test_a_compiled_model_has_the_r_of_the_eager_one(
    is_inside, make_model, make_batch, dense_normalized_step, record_property
):
    torch.compiler.reset()
    body, batch = make_model("attention").to(DEVICE), make_batch("attention")
    inputs, targets = on_device(batch)
    model = WithLoss(body) if is_inside else body
    called = torch.compile(model)
    optimizer = adamw(model, 1e-2)
    guard = SafeStep(
        optimizer, called, estimator="jvp", action="monitor",
        logits=(lambda output: output[1]) if is_inside else None,
    )  # fmt: skip
    errors = []

    for _ in range(3):
        before = copy.deepcopy(body)
        optimizer.zero_grad()
        if is_inside:
            loss, _ = called(inputs, targets)
        else:
            loss = cross_entropy(called(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        optimizer.step()
        expected = dense_normalized_step(*on_host(before, body), batch[0])
        errors.append(abs(guard.last.normalized_step / expected - 1))

    record_property("figure", f"r {guard.last.normalized_step:.5g}, error {max(errors):.1e}")
    assert guard.last.estimator == "jvp"
    assert max(errors) < 5e-3  # fused kernels round otherwise, a temperature is read to 3 figures
