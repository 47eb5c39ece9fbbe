"""Tangents by hand equal those of torch's own forward mode, in float64."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from safestep.measure.jvp_rules import TangentRules


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(*args, **kwargs)


QUERY, KEY, VALUE = (numbers(2, 3, length, width, seed=length)
                     for length, width in ((5, 4), (7, 4), (7, 6)))  # fmt: skip
LONG = [numbers(1, 3, 300, 4, seed=seed) for seed in range(3)]
MASK = torch.arange(35).view(5, 7) % 3 != 0
CASES = {
    "linear": (functional.linear, [numbers(2, 5, 3), numbers(4, 3), numbers(4)], {}),
    "linear without bias": (functional.linear, [numbers(5, 3), numbers(4, 3)], {}),
    "linear of a transposed input": (functional.linear, [numbers(3, 5).T, numbers(4, 3)], {}),
    "linear of one row": (functional.linear, [numbers(3), numbers(4, 3)], {}),
    "layer_norm": (
        lambda x, w, b: functional.layer_norm(x, (3, 4), w, b, eps=1e-3),
        [numbers(5, 3, 4), numbers(3, 4), numbers(3, 4)], {},
    ),
    "layer_norm alone": (lambda x: functional.layer_norm(x, (4,)), [numbers(5, 3, 4)], {}),
    "batch_norm": (
        lambda x, w, b: functional.batch_norm(
            x, torch.zeros(3).double(), torch.ones(3).double(), w, b, training=True),
        [numbers(4, 3, 5, 5), numbers(3), numbers(3)], {},
    ),
    "batch_norm of columns": (
        lambda x: functional.batch_norm(x, None, None, training=True), [numbers(6, 3)], {}
    ),
    "batch_norm in eval mode": (
        lambda x, w: functional.batch_norm(x, torch.ones(3).double(), torch.ones(3).double(), w),
        [numbers(4, 3, 5), numbers(3)], {},
    ),
    "attention": (attention, [QUERY, KEY, VALUE], {}),
    "attention, causal": (attention, [QUERY, KEY[:, :, :5], VALUE[:, :, :5]], {"is_causal": True}),
    "attention, boolean mask": (attention, [QUERY, KEY, VALUE], {"attn_mask": MASK}),
    "attention, added mask": (attention, [QUERY, KEY, VALUE], {"attn_mask": numbers(2, 1, 5, 7)}),
    "attention, one query sees nothing": (
        attention, [QUERY, KEY, VALUE], {"attn_mask": MASK & (torch.arange(5) != 2)[:, None]}
    ),
    "attention, long": (attention, LONG, {}),
    "attention, long and causal": (attention, LONG, {"is_causal": True}),
    "attention, causal with fewer keys": (
        attention, [LONG[0], KEY[:1], VALUE[:1]], {"is_causal": True}
    ),
    "attention, causal with more keys": (
        attention, [QUERY[:1], LONG[1], LONG[2]], {"is_causal": True}
    ),
    "attention, long with a mask for all queries": (
        attention, LONG, {"attn_mask": torch.arange(300) % 7 < 3}
    ),
    "attention, long with a mask for each head": (
        attention, LONG, {"attn_mask": numbers(3, 300, 300) > 0}
    ),
    "attention, no query": (attention, [QUERY[:, :, :0], KEY, VALUE], {}),
    "attention, scaled": (attention, [QUERY, KEY, VALUE], {"scale": 0.3}),
    "attention, grouped queries": (
        attention, [numbers(2, 6, 5, 4), KEY, VALUE], {"enable_gqa": True}
    ),
}  # fmt: skip


def values_of(function, operands, options, carriers, *, by_hand):
    """Return output and tangent, where the operands in `carriers` carry a tangent."""
    with torch.no_grad(), forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(each, numbers(*each.shape, seed=9 + index))
            if index in carriers else each
            for index, each in enumerate(operands)
        ]  # fmt: skip
        if not by_hand:
            output = function(*duals, **options)
        else:
            with TangentRules():
                output = function(*duals, **options)
        return tuple(forward_ad.unpack_dual(output))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch scripts its own code
@pytest.mark.parametrize("case", CASES)
def test_rule_gives_the_output_and_tangent_of_torch(case):
    function, operands, options = CASES[case]
    everyone = range(len(operands))
    for carriers in (everyone, *([index] for index in everyone)):
        expected = values_of(function, operands, options, carriers, by_hand=False)
        found = values_of(function, operands, options, carriers, by_hand=True)

        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rule_updates_running_statistics_as_torch_does():
    inputs, direction = numbers(2, 4, 3, 5)
    statistics = [[torch.zeros(3).double(), torch.ones(3).double()] for _ in range(2)]
    for running, context in zip(statistics, (torch.no_grad(), TangentRules()), strict=True):
        with torch.no_grad(), forward_ad.dual_level(), context:
            dual = forward_ad.make_dual(inputs, direction)
            functional.batch_norm(dual, *running, training=True)

    torch.testing.assert_close(statistics[1], statistics[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_autocast_regions_keep_torch_rules():
    inputs, weight = numbers(5, 3, dtype=torch.float32), numbers(4, 3, dtype=torch.float32)
    found = []
    for context in (torch.no_grad(), TangentRules()):
        with torch.no_grad(), forward_ad.dual_level(), context, torch.autocast("cpu"):
            dual = forward_ad.make_dual(weight, weight.sin())
            found.append(tuple(forward_ad.unpack_dual(functional.linear(inputs, dual))))

    assert found[1][0].dtype == torch.bfloat16
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("is_packed", [False, True])
def test_attention_is_laid_out_as_by_the_fused_kernel(is_packed, width):
    query = numbers(2, 5, 3, 3, 4)[:, :, 0].transpose(1, 2) if is_packed else numbers(2, 3, 5, 4)
    value = numbers(2, 3, 5, width)
    with torch.no_grad(), forward_ad.dual_level(), TangentRules():
        dual = forward_ad.make_dual(query, query.cos())
        found = functional.scaled_dot_product_attention(dual, query, value)
        expected = functional.scaled_dot_product_attention(query, query, value)

        assert found.stride() == expected.stride()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fused_attention_has_a_tangent():
    """Torch itself has none for its fused kernels: the rule is what answers here."""
    with torch.no_grad(), forward_ad.dual_level(), TangentRules():
        dual = forward_ad.make_dual(QUERY, QUERY.cos())
        output = functional.scaled_dot_product_attention(dual, KEY, VALUE)

        assert forward_ad.unpack_dual(output).tangent is not None


def test_attention_with_dropout_on_a_device_is_refused_since_its_mask_would_be_another():
    query = torch.empty(1, 1, 4, 2, device="meta")
    with torch.no_grad(), forward_ad.dual_level(), TangentRules():
        dual = forward_ad.make_dual(query, torch.empty_like(query))
        with pytest.raises(NotImplementedError, match="draws another mask"):
            torch.nn.functional.scaled_dot_product_attention(dual, query, query, dropout_p=0.1)
