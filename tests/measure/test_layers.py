"""Layers: r through each equals that of a dense Jacobian in float64, by the estimator it allows."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from safestep import SafeStep

ROWS, WIDTH, CLASSES = 6, 8, 3


class Between(nn.Module):
    """A layer between a linear one and the classes."""

    def __init__(self, layer, *, view=(), width=WIDTH):
        super().__init__()
        self.first, self.layer = nn.Linear(5, WIDTH), layer
        self.head, self.view = nn.Linear(width, CLASSES), view

    def forward(self, inputs):
        hidden = self.layer(self.first(inputs).view(ROWS, *(self.view or (WIDTH,))))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden.reshape(ROWS, -1))


class Packed(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs):
        lengths = [5, 5, 4, 3, 2, 1]
        packed = pack_padded_sequence(inputs.unsqueeze(-1), lengths, batch_first=True)
        padded, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(padded.sum(1))


class Lookup(nn.Module):
    """Tokens, and what makes features of them."""

    def __init__(self, table):
        super().__init__()
        self.table, self.head = table, nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs):
        tokens = inputs.mul(7).long().abs() % 11
        hidden = self.table(tokens)
        return self.head(hidden if hidden.ndim == 2 else hidden.tanh().mean(1))


class Twice(nn.Module):
    """Uses one parametrized weight in two places."""

    def __init__(self):
        super().__init__()
        self.square = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(self.square, "weight", nn.Softplus())

    def forward(self, hidden):
        return functional.linear(self.square(hidden).tanh(), self.square.weight)


class Recomputed(nn.Module):
    """Is computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, hidden):
        return checkpoint(self.inner, hidden, use_reentrant=False)


ACTIVATIONS = [
    nn.ReLU(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.CELU(), nn.SELU(), nn.GELU(),
    nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Softsign(), nn.Tanh(), nn.Sigmoid(),
    nn.Hardtanh(), nn.Hardswish(), nn.LogSigmoid(), nn.Softmax(-1),
]  # fmt: skip
IMAGE = {"view": (2, 2, 2)}
EXACT = {
    **{str(activation): lambda a=activation: Between(a) for activation in ACTIVATIONS},
    "BatchNorm": lambda: Between(nn.BatchNorm1d(WIDTH)),
    "BatchNorm, eval": lambda: Between(nn.BatchNorm1d(WIDTH).eval()),
    "LayerNorm": lambda: Between(nn.LayerNorm(WIDTH)),
    "RMSNorm": lambda: Between(nn.RMSNorm(WIDTH)),
    "GroupNorm": lambda: Between(nn.GroupNorm(2, WIDTH)),
    "InstanceNorm": lambda: Between(nn.InstanceNorm2d(2, affine=True), **IMAGE),
    "LocalResponseNorm": lambda: Between(nn.LocalResponseNorm(2), **IMAGE),
    "Conv2d": lambda: Between(nn.Conv2d(2, 2, 3, padding=1), **IMAGE),
    "ConvTranspose2d": lambda: Between(nn.ConvTranspose2d(2, 1, 2), width=9, **IMAGE),
    "MaxPool2d": lambda: Between(nn.MaxPool2d(2), width=2, **IMAGE),
    "AvgPool2d": lambda: Between(nn.AvgPool2d(2), width=2, **IMAGE),
    "AdaptiveAvgPool2d": lambda: Between(nn.AdaptiveAvgPool2d(1), width=2, **IMAGE),
    "Upsample, nearest": lambda: Between(nn.Upsample(scale_factor=2), width=32, **IMAGE),
    "Upsample, bilinear": lambda: Between(
        nn.Upsample(scale_factor=2, mode="bilinear"), width=32, **IMAGE
    ),
    "Embedding": lambda: Lookup(nn.Embedding(11, WIDTH)),
    "RNN": lambda: Between(nn.RNN(4, 4, batch_first=True), view=(2, 4)),
    "GRU": lambda: Between(nn.GRU(4, 4, batch_first=True), view=(2, 4)),
    "LSTM": lambda: Between(nn.LSTM(4, 4, batch_first=True), view=(2, 4)),
    "packed LSTM": lambda: Packed(nn.LSTM(1, WIDTH, batch_first=True)),
    "MultiheadAttention": lambda: Between(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), view=(2, 4)
    ),
    "parametrized and used twice": lambda: Between(Twice()),
    "spectral_norm, eval": lambda: Between(
        parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)).eval()
    ),
    "checkpoint": lambda: Between(Recomputed()),
}
BY_DIFFERENCE = {
    "spectral_norm": lambda: Between(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
    "EmbeddingBag": lambda: Lookup(nn.EmbeddingBag(11, WIDTH, mode="sum")),
    "weight_norm": lambda: Between(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
}


def guarded_steps(make, lr=0.01):
    """Return the report of the second step, the models before and after it, and the inputs."""
    torch.manual_seed(0)
    model = make()
    inputs, labels = torch.randn(ROWS, 5), torch.arange(ROWS) % CLASSES
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    guard = SafeStep(optimizer, model, action="monitor")
    before = model
    for _ in range(2):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return guard.last, before, model, inputs


@pytest.mark.parametrize("name", EXACT)
def test_forward_mode_measures_exactly_through_a_layer(name, dense_normalized_step):
    report, *step = guarded_steps(EXACT[name])

    assert report.estimator == "jvp"
    assert report.normalized_step == pytest.approx(
        dense_normalized_step(*step), rel=2e-5
    )  # float32


@pytest.mark.filterwarnings("ignore:SafeStep.*no forward-mode derivative")
@pytest.mark.parametrize("name", BY_DIFFERENCE)
def test_a_finite_difference_measures_through_a_layer(name, dense_normalized_step):
    report, *step = guarded_steps(BY_DIFFERENCE[name])

    assert report.estimator == "difference"
    assert report.normalized_step == pytest.approx(dense_normalized_step(*step), rel=5e-3)
