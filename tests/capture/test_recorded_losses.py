"""Losses written by hand that are recorded as a whole step: r against central differences."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep

N, CLASSES = 8, 4
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(N, 5, generator=GENERATOR)
LABELS = torch.randint(CLASSES, (N,), generator=GENERATOR)
TAGS = (torch.rand(N, CLASSES, generator=GENERATOR) > 0.5).float()
PROXIES = functional.normalize(torch.randn(CLASSES, CLASSES, generator=GENERATOR), dim=-1)
SELF = torch.eye(N, dtype=torch.bool)
PARTNER = torch.arange(N) ^ 1


def asymmetric(z):
    positive, negative = z.sigmoid(), (1.05 - z.sigmoid()).clamp(max=1)
    with torch.no_grad():
        weight = (1 - positive * TAGS - negative * (1 - TAGS)) ** (TAGS + 4 * (1 - TAGS))
    log = TAGS * positive.clamp(min=1e-8).log() + (1 - TAGS) * negative.clamp(min=1e-8).log()
    return -(log * weight).sum()


def focal(z):
    p = z.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(z, TAGS, reduction="none")
    return (entropy * (1 - p * TAGS - (1 - p) * (1 - TAGS)) ** 2).mean()


def dice(z):
    p = z.sigmoid()
    return 1 - (2 * (p * TAGS).sum() + 1) / (p.sum() + TAGS.sum() + 1)


def similarity(z):
    unit = functional.normalize(z, dim=-1)
    return unit @ unit.T / 0.5


def nt_xent(z):
    return functional.cross_entropy(similarity(z).masked_fill(SELF, -math.inf), PARTNER)


def sup_con(z):
    scores = similarity(z)
    log_share = scores - scores.masked_fill(SELF, -math.inf).logsumexp(1, keepdim=True)
    positive = (LABELS[:, None] == LABELS) & ~SELF
    return -((log_share * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


def cosines(z):
    return 8 * functional.normalize(z, dim=-1) @ PROXIES.to(z).T


def cos_face(z):
    return functional.cross_entropy(cosines(z) - 1.6 * functional.one_hot(LABELS, CLASSES), LABELS)


def proxy_distance(z):
    return -3 * (functional.normalize(z, dim=-1)[:, None] - PROXIES.to(z)).square().sum(-1)


def proxy_nca(z):
    return functional.cross_entropy(proxy_distance(z), LABELS)


def distance(z):
    return -(z[:, None] - z).square().sum(-1)


def nca(z):
    share = distance(z).masked_fill(SELF, -math.inf).softmax(1)
    positive = (LABELS[:, None] == LABELS) & ~SELF
    return -(share * positive).sum(1).clamp(min=1e-6).log().mean()


def products(z):
    return z @ z.T


def n_pairs(z):
    return functional.cross_entropy(products(z).masked_fill(SELF, -math.inf), PARTNER)


def picked(z):
    return z.gather(1, LABELS[:, None]).squeeze(1) - z.logsumexp(-1)


def grpo(z):
    advantage, ratio = torch.linspace(-1, 1, N), (picked(z) - picked(z).detach()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def dpo(z):
    log = z.log_softmax(-1).gather(1, LABELS[:, None]).squeeze(1)
    return -functional.logsigmoid(0.5 * (log[::2] - log[1::2])).mean()


def binary(z):
    return torch.stack((torch.zeros_like(z), z), -1)


def same(z):
    return z


LOSSES = {  # the loss, and what enters its softmax
    "asymmetric": (asymmetric, binary),
    "focal": (focal, binary),
    "Dice": (dice, binary),
    "NT-Xent": (nt_xent, similarity),
    "SupCon": (sup_con, similarity),
    "CosFace": (cos_face, cosines),
    "ProxyNCA": (proxy_nca, proxy_distance),
    "NCA": (nca, distance),
    "N-pairs": (n_pairs, products),
    "GRPO": (grpo, same),
    "DPO": (dpo, same),
}


@pytest.mark.filterwarnings("ignore:SafeStep. the loss holds a quotient")
@pytest.mark.parametrize(("loss", "rows"), LOSSES.values(), ids=list(LOSSES))
def test_r_of_a_recorded_loss_is_that_of_the_numbers_that_enter_its_softmax(loss, rows):
    torch.manual_seed(1)
    model = nn.Linear(5, CLASSES)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (model, twin)]
    guard = SafeStep(optimizers[0], model, max_normalized_step=1e9)

    for _ in range(3):
        start = copy.deepcopy(model).double()
        guard.record(lambda: loss(model(INPUTS)))
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss(each(INPUTS)).backward()
            optimizer.step()
        step = {
            n: p.detach().double() - start.get_parameter(n) for n, p in model.named_parameters()
        }

        def moved(eps, start=start, step=step):
            weight, bias = (start.get_parameter(n) + eps * step[n] for n in ("weight", "bias"))
            return rows(INPUTS.double() @ weight.T + bias).detach()

        tangent = (moved(1e-4) - moved(-1e-4)) / 2e-4
        inf = torch.tensor(math.inf, dtype=tangent.dtype)
        hidden = (
            SELF if tangent.shape == SELF.shape else torch.zeros_like(tangent, dtype=torch.bool)
        )
        lowest = torch.where(hidden, inf, tangent).amin(-1)
        highest = torch.where(hidden, -inf, tangent).amax(-1)
        expected = float((highest - lowest).max()) / math.pi
        assert guard.last.status == "ok"
        assert guard.last.normalized_step == pytest.approx(expected, rel=1e-3)
    assert torch.equal(model.weight, twin.weight)
