"""Radii inside a model, beside dense Jacobians in float64 and numbers worked out by hand."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep, read_run
from safestep.measure.inner_radii import attention_scores
from safestep.radius.inner import attention_radius, kink_radius

ALL = ("output", "attention", "ffn")


class Block(nn.Module):
    """Two heads of causal attention and a ReLU, by torch's kernel or step by step."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel
        self.project = nn.Linear(6, 18)
        self.up = nn.Linear(6, 10)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Linear(10, 6)

    def heads(self, x):
        return self.project(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4).unbind()

    def scores(self, x):
        query, key, _ = self.heads(x)
        return torch.einsum("bhqe,bhke->bhqk", query, key) / math.sqrt(3)

    def mixed(self, x):
        query, key, value = self.heads(x)
        if self.kernel:
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mask = torch.full((x.shape[1], x.shape[1]), -1e9, dtype=x.dtype).triu(1)
            weights = functional.dropout(torch.softmax(self.scores(x) + mask, dim=-1), 0.0)
            mixed = weights.contiguous() @ value
        return x + mixed.transpose(1, 2).flatten(-2)

    def forward(self, x):
        x = self.mixed(x)
        return x + self.down(self.act(self.up(x)))


class Tiny(nn.Module):
    """A Transformer of two blocks in float64, which shows what enters softmax and ReLU."""

    def __init__(self, kernel=True):
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.blocks = nn.ModuleList(Block(kernel) for _ in range(2))
        self.head = nn.Linear(6, 5)
        self.double()

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def inside(self, tokens):
        """Return scores and pre-activations of every block."""
        x, seen = self.embed(tokens), []
        for block in self.blocks:
            seen.append((block.scores(x), block.up(block.mixed(x))))
            x = block(x)
        return seen


def make_tiny(kernel=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny(kernel)


def make_batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, (3, 5), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def train(model, guard_options, steps=1, lr=0.1):
    """Return the guard and the change of each parameter in the last step."""
    inputs, targets = make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with SafeStep(optimizer, model, **guard_options) as guard:
        for _ in range(steps):
            start = copy.deepcopy(model)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs).transpose(1, 2), targets).backward()
            optimizer.step()
    pairs = zip(start.parameters(), model.parameters(), strict=True)
    return guard, start, [after.detach() - before.detach() for before, after in pairs]


def dense_tangent(values, params, change):
    """Return J @ change, one reverse pass for every number."""
    rows = [
        torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True)
        for value in values.flatten()
    ]
    step = torch.cat([part.flatten() for part in change])
    dense = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return (dense @ step).reshape(values.shape)


def test_attention_radius_is_pi_over_the_largest_spread_of_a_query():
    tangent = torch.tensor([[[0.0, 1.0], [2.0, -2.0]], [[0.5, 0.5], [0.0, 0.0]]])

    assert float(attention_radius(tangent)) == pytest.approx(math.pi / 4)


def test_attention_radius_leaves_masked_keys_out():
    tangent = torch.tensor([[0.0, 1.0, math.nan], [3.0, 100.0, -100.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])

    assert float(attention_radius(tangent, mask=mask)) == pytest.approx(math.pi)


def test_attention_radius_is_nan_where_a_tangent_is():
    assert attention_radius(torch.tensor([[0.0, 1.0], [math.nan, 1.0]])).isnan()


def test_kink_radius_is_the_lower_quantile_of_distances():
    generator = torch.Generator().manual_seed(0)
    h, dh = torch.randn(2, 30, 40, generator=generator, dtype=torch.float64)

    distances = np.abs(h.numpy() / dh.numpy())
    expected = np.quantile(distances, 0.01, method="lower")
    assert float(kink_radius(h, dh)) == pytest.approx(expected, rel=1e-14)


def test_kink_radius_counts_units_that_stand_still_as_far_away():
    h, dh = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 0.0, 2.0])

    assert float(kink_radius(h, dh)) == 2.0
    assert float(kink_radius(h, dh, 0.9)) == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kink_radius_of_half_precision_is_wide(dtype):
    radius = kink_radius(torch.tensor([3.0], dtype=dtype), torch.tensor([1.0], dtype=dtype))

    assert radius.dtype == torch.float32
    assert float(radius) == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_kink_radius_is_nan_where_a_number_is_not_finite(bad):
    assert kink_radius(torch.tensor([1.0, bad]), torch.ones(2)).isnan()
    assert kink_radius(torch.ones(2), torch.tensor([1.0, bad])).isnan()


def test_kink_radius_refuses_other_shapes_and_quantiles():
    with pytest.raises(ValueError, match="shape of `pre_activation`"):
        kink_radius(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="not empty"):
        kink_radius(torch.ones(0), torch.ones(0))
    with pytest.raises(ValueError, match=r"`quantile` in \[0, 1\]"):
        kink_radius(torch.ones(2), torch.ones(2), 1.5)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(1)},
    "bias": {"attn_mask": torch.linspace(-3, 3, 35, dtype=torch.float64).view(5, 7)},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_scores_are_those_of_the_kernel(options):
    generator = torch.Generator().manual_seed(0)
    heads = 2 if "enable_gqa" in options else 4
    query = torch.randn(3, 4, 5, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 3, heads, 7, 8, generator=generator, dtype=torch.float64)

    weights = attention_scores(query, key, value, **options).softmax(-1)

    value_of_head = value.repeat_interleave(4 // heads, 1)
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(weights @ value_of_head, expected)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "by hand"])
def test_inner_radii_are_those_of_dense_jacobians(kernel):
    guard, start, change = train(make_tiny(kernel), {"radii": ALL})

    radii, step_norm = guard.last_radii["radii"], guard.last.step_norm
    params = list(start.parameters())
    for index, (scores, h) in enumerate(start.inside(make_batch()[0])):
        d_scores, dh = (dense_tangent(values, params, change) for values in (scores, h))
        past = torch.ones(4, 4, dtype=torch.bool).tril()
        spread = d_scores.where(past, -math.inf).amax(-1) - d_scores.where(past, math.inf).amin(-1)
        kinks = np.quantile((h / dh).detach().abs().numpy(), 0.01, method="lower")
        attention = math.pi / float(spread.max()) * step_norm
        assert radii["attention"][f"blocks.{index}"] == pytest.approx(attention, rel=1e-9)
        assert radii["ffn"][f"blocks.{index}.act"] == pytest.approx(kinks * step_norm, rel=1e-9)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_attention_is_seen_inside_multi_head_attention(need_weights):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 6)
            self.attend = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)

        def forward(self, tokens):
            x = self.embed(tokens)
            hidden = tokens == 0
            return self.attend(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attending().double()
        guard, start, change = train(model, {"radii": ("output", "attention")})
    tokens = make_batch()[0]
    assert (tokens == 0).any()
    query, key, _ = (
        functional.linear(
            start.embed(tokens), start.attend.in_proj_weight, start.attend.in_proj_bias
        )
        .unflatten(-1, (3, 2, 3))
        .unbind(2)
    )
    scores = torch.einsum("bqhe,bkhe->bhqk", query, key) / math.sqrt(3)
    tangent = dense_tangent(scores, list(start.parameters()), change)
    seen = (tokens != 0)[:, None, None, :]
    spread = tangent.where(seen, -math.inf).amax(-1) - tangent.where(seen, math.inf).amin(-1)

    expected = math.pi / float(spread.max()) * guard.last.step_norm
    assert guard.last_radii["radii"]["attention"]["attend"] == pytest.approx(expected, rel=1e-9)
    assert guard.last_radii["radii"].keys() == {"output", "attention"}


def test_the_output_radius_beside_them_is_the_bound():
    guard, start, change = train(make_tiny(), {"radii": ALL, "radius": "certified"})

    inputs, _ = make_batch()
    tangent = dense_tangent(start(inputs), list(start.parameters()), change)
    bound = math.pi / float((tangent.amax(-1) - tangent.amin(-1)).max()) * guard.last.step_norm
    assert guard.last_radii["radii"]["output"] == pytest.approx(bound, rel=1e-9)


def test_the_run_log_holds_the_radii_and_the_smallest_binds(tmp_path):
    guard, _, _ = train(make_tiny(), {"radii": ALL, "run_dir": tmp_path}, steps=3)

    columns = read_run(tmp_path).steps
    assert columns["radii"][-1] == guard.last_radii["radii"]
    for radii, binding in zip(columns["radii"], columns["binding"], strict=True):
        least = {"output": radii["output"]}
        least |= {kind: min(radii[kind].values()) for kind in ("attention", "ffn")}
        assert binding == min(least, key=least.get)


def test_the_decision_rests_on_the_output_alone():
    plain, watched = make_tiny(), make_tiny()

    train(plain, {}, steps=5, lr=30.0)
    guard, _, _ = train(watched, {"radii": ALL}, steps=5, lr=30.0)

    assert guard.last.status == "clipped"
    assert all(map(torch.equal, plain.parameters(), watched.parameters()))


def test_nothing_is_watched_where_only_the_output_is_asked_for(tmp_path):
    guard, _, _ = train(make_tiny(), {"run_dir": tmp_path, "radii": ("output",)})

    assert guard.last_radii == {}
    assert not {"radii", "binding", "radii_reason"} & read_run(tmp_path).steps.keys()


def test_radii_of_other_estimators_are_said_to_be_missing():
    with pytest.warns(UserWarning, match="the ffn radius is not measured: only the estimator"):
        guard, _, _ = train(make_tiny(), {"radii": ("ffn",), "estimator": "difference"})

    assert guard.last_radii["radii"].keys() == {"output"}
    assert guard.last_radii["binding"] == "output"
    assert guard.last_radii["radii_reason"] == {"ffn": "only the estimator 'jvp' sees it"}


def test_no_step_is_predicted_whose_radii_were_asked_for():
    guard, _, _ = train(make_tiny(), {"radii": ALL, "estimator": "auto"}, steps=30, lr=1e-3)

    assert guard.last.estimator == "jvp"
    assert guard.last_radii["radii"].keys() == set(ALL)


def test_a_softmax_that_weighs_no_matrix_is_no_attention():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 5)

        def forward(self, tokens):
            x = self.embed(tokens)
            return x * x.softmax(-1)

    with pytest.warns(UserWarning, match="no softmax that weighs a matrix"):
        guard, _, _ = train(Gated(), {"radii": ("attention",)})

    assert guard.last_radii["radii"].keys() == {"output"}


def test_an_expert_without_tokens_is_left_out():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 5)
            self.used, self.idle = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, tokens):
            nobody = self.embed(tokens)[:0]
            nothing = functional.silu(self.idle(nobody)).softmax(-1).sum()
            nothing = nothing + functional.scaled_dot_product_attention(*[nobody] * 3).sum()
            return functional.relu(self.used(self.embed(tokens))) + nothing

    with pytest.warns(UserWarning, match="the attention radius is not measured"):
        guard, _, _ = train(Routed(), {"radii": ALL})

    assert guard.last.status == "ok"
    assert math.isfinite(guard.last_radii["radii"]["ffn"]["Routed"])


def test_a_part_of_the_model_that_stands_still_has_an_infinite_radius():
    model = make_tiny()
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)

    guard, _, _ = train(model, {"radii": ALL})

    radii = guard.last_radii["radii"]
    assert radii["attention"]["blocks.0"] == radii["ffn"]["blocks.0.act"] == math.inf
    assert math.isfinite(radii["attention"]["blocks.1"])


@pytest.mark.parametrize("radii", [("outputs",), "attention"], ids=str)
def test_unknown_radii_are_refused(radii):
    with pytest.raises(ValueError, match="expected `radii` to hold some of 'output'"):
        train(make_tiny(), {"radii": radii})


@pytest.mark.slow
def test_units_bind_early_and_the_output_late_in_a_tiny_transformer():
    """As in Table 2 of Ghosts of Softmax: counts 94/6/0, 48/52/0, 8/97/0 (ffn/output/attention)."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images[360:616], dtype=torch.float32) / 16
    targets = torch.tensor(digits.target[360:616])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lift, head = nn.Linear(8, 16), nn.Linear(16, 10)
        block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(lift, block, nn.AvgPool2d((8, 1)), nn.Flatten(), head)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    binding = []

    with SafeStep(optimizer, model, radii=ALL, action="monitor") as guard:
        for step in range(450):
            guard.enabled = step % 15 == 0
            optimizer.zero_grad()
            functional.cross_entropy(model(images), targets).backward()
            optimizer.step()
            if guard.enabled:
                binding.append(guard.last_radii["binding"])

    counts = [Counter(binding[start : start + 10]) for start in (0, 10, 20)]
    assert counts[0]["ffn"] == 10
    assert counts[2]["output"] > 5
    assert counts[0]["output"] <= counts[1]["output"] <= counts[2]["output"]
