"""What a re-run sees of the functions that a loss is made of."""

import copy
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional

from safestep import SafeStep
from safestep.capture import LogitFinder
from safestep.capture.call import Call
from safestep.capture.fused_logits import LinearTile
from safestep.capture.loss_watch import LossWatch
from safestep.capture.losses import LOSS_FUNCTIONS
from safestep.capture.random_state import CallConditions
from safestep.measure.estimators import jvp
from safestep.radius.batch import smallest_row
from safestep.radius.bounds import certified_radius, radius_bound

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
IGNORING = torch.tensor([0, -100, 2, 3, -100, 1])
WEIGHT = torch.tensor([0.0, 1.0, 2.0, 3.0])
SOFT = torch.eye(4)[LABELS].index_fill(0, torch.tensor(2), 0.0)

SEEN = {
    "cross_entropy": (lambda z: functional.cross_entropy(z, LABELS), torch.ones(6)),
    "module": (lambda z: nn.CrossEntropyLoss()(z, LABELS), torch.ones(6)),
    "keywords": (lambda z: functional.cross_entropy(target=LABELS, input=z), torch.ones(6)),
    "ignored": (lambda z: functional.cross_entropy(z, IGNORING), IGNORING >= 0),
    "weight 0": (lambda z: functional.cross_entropy(z, LABELS, weight=WEIGHT), LABELS > 0),
    "weight 0, smoothed": (
        lambda z: functional.cross_entropy(z, LABELS, weight=WEIGHT, label_smoothing=0.1),
        torch.ones(6),
    ),
    "soft, one row 0": (lambda z: functional.cross_entropy(z, SOFT), SOFT.any(-1)),
    "nll_loss": (lambda z: functional.nll_loss(z, IGNORING), IGNORING >= 0),
    "kl_div": (lambda z: functional.kl_div(z, SOFT, reduction="sum"), SOFT.any(-1)),
    "softmax": (lambda z: z.softmax(-1), None),
    "log_softmax": (lambda z: functional.log_softmax(z, dim=1), None),
    "logsumexp": (lambda z: torch.logsumexp(z, (1,)), None),
    "special": (lambda z: torch.special.log_softmax(z, dim=-1), None),
}
BINARY = {
    "with logits": lambda z: functional.binary_cross_entropy_with_logits(z, SOFT),
    "probabilities": lambda z: functional.binary_cross_entropy(z.sigmoid(), SOFT),
    "sigmoid": torch.sigmoid,
    "logsigmoid": functional.logsigmoid,
    "softplus": functional.softplus,
}


@pytest.mark.filterwarnings("ignore:SafeStep. ctc_loss. sums over combinations")
@pytest.mark.parametrize("entry", LOSS_FUNCTIONS.values(), ids=lambda entry: entry.name)
def test_every_loss_function_is_measured_by_the_rows_that_have_a_gradient(entry):
    """The reference knows neither readers nor masks: it is autograd's, in float64."""
    if entry.example is None:
        pytest.skip("a function of another package; see test_autograd_functions.py")
    if entry.is_fused and not hasattr(functional, entry.name):
        pytest.skip(f"this torch has no {entry.name}")
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(6, 3, generator=generator)
    model = nn.Linear(3, 4)
    plain, start = copy.deepcopy(model), copy.deepcopy(model).double()
    guard = SafeStep(torch.optim.SGD(model.parameters(), lr=0.1), model)

    guard.record(lambda: entry.example(model(inputs), LABELS))
    entry.example(model(inputs), LABELS).backward()
    guard.optimizer.step()
    entry.example(plain(inputs), LABELS).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()

    logits = start(inputs.double()).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(entry.example(logits, LABELS), logits)
    with torch.no_grad():
        tangent = copy.deepcopy(model).double()(inputs.double()) - logits  # the model is linear
    if entry.kind == "sigmoid" or "binary" in entry.name:
        spread = tangent[gradient.ne(0)].abs().max()
    else:
        rows = tangent[gradient.ne(0).any(-1)]
        spread = (rows.amax(-1) - rows.amin(-1)).max()
    assert guard.last.status == "ok"
    # The tangent is exact in float32; the reference subtracts parameters rounded to float32.
    assert guard.last.normalized_step == pytest.approx(float(spread) / math.pi, rel=1e-4)
    assert torch.equal(model.weight, plain.weight)


@pytest.mark.parametrize("name", SEEN)
def test_watch_sees_the_logits_and_the_rows_that_count(name):
    function, counted = SEEN[name]

    with LossWatch() as watch:
        function(LOGITS)

    ((logits, mask),) = watch.seen[0].parts
    assert torch.equal(logits, LOGITS)
    assert counted is None if mask is None else torch.equal(mask, counted.bool())


@pytest.mark.parametrize("name", BINARY)
def test_watch_sees_a_sigmoid_as_a_softmax_of_two_classes(name):
    with LossWatch() as watch:
        BINARY[name](LOGITS)

    rows, _ = watch.seen[max(watch.seen)].parts[0]
    torch.testing.assert_close(rows.softmax(-1)[..., 1], LOGITS.sigmoid())


def test_watch_leaves_out_elements_of_a_binary_loss_that_weigh_nothing():
    labels, weight = SOFT, torch.ones(6, 1).index_fill(0, torch.tensor(5), 0.0)

    with LossWatch() as watch:
        functional.binary_cross_entropy_with_logits(LOGITS, labels, weight, pos_weight=WEIGHT)

    _, mask = watch.seen[0].parts[0]
    expected = weight.bool() & ~((WEIGHT == 0) & (labels == 1))
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    "function",
    [lambda z: functional.cross_entropy(z, LABELS[0]), lambda z: functional.logsigmoid(z[0])],
    ids=["one example", "one number"],
)
def test_watch_gives_a_single_row_an_axis_of_its_own(function):
    with LossWatch() as watch:
        function(LOGITS[0])

    ((logits, mask),) = watch.seen[0].parts
    assert logits.ndim == 2
    assert mask is None or mask.shape == (1,)


def test_watch_puts_the_classes_of_a_segmentation_last():
    maps = torch.randn(2, 3, 4, 5)
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0, 1] = 255

    with LossWatch() as watch:
        functional.cross_entropy(maps, labels, ignore_index=255)

    logits, mask = watch.seen[0].parts[0]
    assert logits.shape == (2, 4, 5, 3)
    assert torch.equal(logits, maps.permute(0, 2, 3, 1))
    assert torch.equal(mask, labels != 255)


def test_watch_holds_only_the_calls_it_is_told_to_keep():
    with LossWatch(frozenset({1})) as watch:
        LOGITS.softmax(-1)
        functional.cross_entropy(LOGITS, LABELS)

    assert watch.names == ["softmax", "cross_entropy"]
    assert list(watch.seen) == [1]


def test_watch_returns_what_the_functions_return():
    with LossWatch():
        watched = functional.cross_entropy(LOGITS, LABELS)

    assert torch.equal(watched, functional.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("options", [None, "chunks"], ids=str)
@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
def test_watch_computes_the_logits_of_a_linear_cross_entropy_when_asked(options, positions):
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    if options and positions:
        pytest.skip("torch has no chunks for several positions")
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 3, generator=generator)
    weight = torch.randn(4, *positions, 3, generator=generator)
    bias = torch.randn(4, *positions, generator=generator)
    labels = LABELS.view(6, *(1 for _ in positions)).expand(6, *positions)
    chunks = nn.LinearCrossEntropyOptions() if options else None

    with LossWatch() as watch:
        functional.linear_cross_entropy(
            hidden, weight, labels, linear_bias=bias, ignore_index=2, options=chunks
        )

    ((tile, mask),) = watch.seen[0].parts
    expected = torch.einsum("nf,c...f->n...c", hidden, weight) + bias.movedim(0, -1)
    assert isinstance(tile, LinearTile)
    assert tile.shape == expected.shape
    flat, some = expected.flatten(0, -2), torch.tensor([4, 0, 2])
    torch.testing.assert_close(tile(), flat)
    torch.testing.assert_close(tile(some), flat[some])
    torch.testing.assert_close(tile(None, slice(1, 3)), flat[:, 1:3])
    torch.testing.assert_close(tile(some, slice(3, 9)), flat[some, 3:])
    assert torch.equal(mask, labels != 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch scripts its own code
def test_tiles_of_a_linear_cross_entropy_cover_all_rows_with_their_tangent(monkeypatch):
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    monkeypatch.setattr("safestep.capture.fused_logits.TILE_ELEMENTS", 8)
    hidden, weight, d_hidden, d_weight = torch.randn(4, 6, 6, dtype=torch.float64)

    with torch.no_grad(), forward_ad.dual_level(), LossWatch() as watch:
        dual = forward_ad.make_dual(hidden, d_hidden), forward_ad.make_dual(weight, d_weight)
        options = nn.LinearCrossEntropyOptions()  # has no forward-mode derivative of its own
        functional.linear_cross_entropy(*dual, LABELS, options=options)
        parts = watch.seen[0].parts
        values, tangents = zip(*((tile(), tile.tangent()) for tile, _ in parts), strict=True)

    assert len(parts) == 6
    torch.testing.assert_close(torch.cat(values), hidden @ weight.T)
    torch.testing.assert_close(torch.cat(tangents), d_hidden @ weight.T + hidden @ d_weight.T)


def test_tile_keeps_the_weights_of_the_time_it_was_seen():
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    hidden, weight = torch.randn(6, 3), torch.randn(4, 3)
    before = hidden @ weight.T

    with LossWatch() as watch:
        functional.linear_cross_entropy(hidden, weight, LABELS)
    weight.zero_()

    torch.testing.assert_close(watch.seen[0].parts[0][0](), before)


class Head(nn.Module):
    """A last layer over 2,500 classes, a few of which a bias of -inf takes out."""

    def __init__(self, dtype, masked):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        hidden, weight, bias = (
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in ((11, 5), (2500, 5), (2500,))
        )
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.exists = torch.ones(2500, dtype=torch.bool)
        if masked:
            self.exists[[0, 1, 650, 651, 2499]] = False
            self.exists[700:1500] = False  # a block in which no class is left
            bias.data[~self.exists] = -torch.inf

    def forward(self, target, fused):
        if fused:
            return functional.linear_cross_entropy(
                self.hidden, self.weight, target, linear_bias=self.bias
            )
        return functional.cross_entropy(
            functional.linear(self.hidden, self.weight, self.bias), target
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch scripts its own code
@pytest.mark.parametrize("rung", ["bound", "certified"])
@pytest.mark.parametrize("masked", [False, True], ids=["all classes", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_radius_of_a_fused_head_is_that_of_the_plain_one(dtype, masked, rung, monkeypatch):
    """In three tiles of five rows at most, with four blocks of classes each."""
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    monkeypatch.setattr("safestep.capture.fused_logits.TILE_ELEMENTS", 5 * 2500)
    monkeypatch.setattr("safestep.capture.fused_logits.BLOCK_ELEMENTS", 5 * 700)
    monkeypatch.setattr("safestep.radius.histogram.BLOCK_ELEMENTS", 5 * 700)
    head = Head(dtype, masked)
    generator = torch.Generator().manual_seed(3)
    update = [torch.randn(p.shape, generator=generator).to(dtype) for p in head.parameters()]
    if dtype == torch.float64:
        update[2] += 300.0  # all classes move alike
    update[2][~head.exists] = 100.0  # what a class that does not exist does is of no matter
    target = torch.arange(11) + 2

    def measured(fused):
        call = Call.of(lambda: head(target, fused), (), {}, CallConditions(head))
        rows = jvp([call], head, list(head.parameters()), update, LogitFinder())
        return smallest_row(rows, rung=rung, limit=1e-3)

    fused, plain = measured(True), measured(False)

    params, update = ([x.detach().double() for x in xs] for xs in (head.parameters(), update))
    (hidden, weight, bias), (d_hidden, d_weight, d_bias) = params, update
    logits = (hidden @ weight.T + bias)[:, head.exists]
    tangent = (d_hidden @ weight.T + hidden @ d_weight.T + d_bias)[:, head.exists]
    radius = radius_bound(tangent) if rung == "bound" else certified_radius(logits, tangent)
    # The rounding of the products; half precision has three digits.
    rtol = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(fused, plain, rtol=rtol, atol=0)
    torch.testing.assert_close(fused[0], radius.min(), rtol=10 * rtol, atol=0)


@pytest.mark.slow
def test_logits_of_a_large_vocabulary_are_never_held():
    """256 x 128,000 logits take 125 MiB; the radii of all of them are found in tiles of 6."""
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    script = Path(__file__).parents[1] / "benchmarks" / "bench_vocabulary.py"

    least = [math.inf] * 3
    # Holes in the heap, each as large as the weights, differ from process to process: what is held
    # does not. With 16 features the weights take 8 MiB.
    for _ in range(3):
        output = subprocess.run(
            [sys.executable, script, "--rows", "256", "--features", "16", "--repeats", "1"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        extra = [float(found) for found in re.findall(r"([\d.]+) MiB extra", output)]
        least = [min(pair) for pair in zip(least, extra, strict=True)]
        if max(least) < 96:
            break

    assert max(least) < 96, output
