"""How far data-parallel workers disagree before their gradients are averaged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Share of calls that may name an outlier although the workers are alike (independent, Gaussian).
_FALSE_OUTLIERS = 0.01
# Workers that agree to 1 % count as alike, whatever the statistics of so few numbers say.
_AGREEMENT = 0.01
# Columns of a stacked gradient converted to float64 at once: 8 MiB per worker.
CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True)
class WorkerDispersion:
    """How far the losses and gradients of N workers disagree. Tensors are float64.

    Attributes:
        loss_std: Standard deviation of the losses over the workers (divided by N). Shape ``[]``.
        loss_range: Largest loss minus smallest. Shape ``[]``.
        grad_norm_std: Standard deviation of the gradients' 2-norms (divided by N). Shape ``[]``.
        grad_norm_cv: ``grad_norm_std`` over the mean norm; NaN if every gradient is zero.
        pairwise_cosine: Mean cosine between two different workers' gradients, in [-1, 1]; not the
            mean of ``cosine_to_mean``. NaN with one worker or if it was not measured.
        cosine_to_mean: Cosine of each worker's gradient with the mean gradient. Shape ``[N]``.
        noise_scale: Gradient noise scale tr(S) / |G|^2 in examples: the batch size at which noise
            and gradient are equally large. Infinite if the noise of N workers hides the gradient,
            NaN with one worker.
        outlier: Rank of the worker that stands out at this step by itself, else None.
    """

    loss_std: Tensor
    loss_range: Tensor
    grad_norm_std: Tensor
    grad_norm_cv: Tensor
    pairwise_cosine: Tensor
    cosine_to_mean: Tensor
    noise_scale: Tensor
    outlier: int | None


@dataclass(frozen=True, slots=True)
class WorkerSums:
    """The sums that determine every gradient metric; g_i is worker i's gradient, g their mean.

    The first three add up over parts of the gradient. Tensors are float64.

    Attributes:
        squared_norms: ||g_i||^2. Shape ``[N]``.
        mean_products: <g_i, g>. Shape ``[N]``.
        mean_squared_norm: ||g||^2. Shape ``[]``.
        unit_squared_norm: ||sum_i g_i / ||g_i|| ||^2, NaN if not measured. Shape ``[]``.
    """

    squared_norms: Tensor
    mean_products: Tensor
    mean_squared_norm: Tensor
    unit_squared_norm: Tensor


def worker_dispersion(
    losses: Tensor | Sequence[float],
    gradients: Tensor | Sequence[Mapping[str, Tensor]],
    *,
    num_examples: int = 1,
) -> WorkerDispersion:
    """Return how far the losses and gradients of N workers disagree, and which worker stands out.

    A NaN or infinite value makes every metric that uses it NaN or infinite; nothing is left out.

    Args:
        losses: Each worker's own mean loss. Shape ``[N]``.
        gradients: Each worker's gradient of that loss, unscaled, unclipped and not yet averaged:
            shape ``[N, P]``, or N dicts with the same parameter names.
        num_examples: Number of examples that a worker's gradient averages over. It only sets the
            unit of the noise scale; 1 gives it in workers' batches.

    Returns:
        The metrics, on the gradients' device.

    Raises:
        ValueError: If shapes, names or the number of workers do not fit.

    Reference:
        "Silent Inconsistency in Data-Parallel Full Fine-Tuning", arXiv:2602.14462; noise scale:
        McCandlish et al., arXiv:1812.06162, App. A.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> result = worker_dispersion(torch.tensor([1.0, 2.0]), gradients)
        >>> result.loss_std.item(), result.grad_norm_std.item(), result.pairwise_cosine.item()
        (0.5, 0.5, 0.0)
        >>> result.cosine_to_mean
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    gram = _gram(gradients)
    losses = torch.as_tensor(losses).detach().to(gram)
    if losses.shape != gram.shape[:1]:
        raise ValueError(
            f"worker_dispersion: expected `losses` of shape ({len(gram)},), one per row of "
            f"`gradients`, got shape {tuple(losses.shape)}. Pass each worker's own mean loss."
        )
    return dispersion_from_sums(losses, sums_of_gram(gram), num_examples=num_examples)


def worker_sums(gradients: Tensor | Sequence[Mapping[str, Tensor]]) -> WorkerSums:
    """Return the sums of gradients that are all on this process.

    Args:
        gradients: As for `worker_dispersion`.

    Returns:
        The sums over all parameters, on the gradients' device.
    """
    return sums_of_gram(_gram(gradients))


def dispersion_from_sums(
    losses: Tensor, sums: WorkerSums, *, num_examples: int = 1
) -> WorkerDispersion:
    """Return the metrics of `worker_dispersion` from sums, a few floats per worker.

    Args:
        losses: Each worker's own mean loss, float64. Shape ``[N]``.
        sums: The sums over all parameters.
        num_examples: As in `worker_dispersion`.

    Returns:
        The metrics, on the device of ``losses``.
    """
    norms = sums.squared_norms.sqrt()
    norm_std = norms.std(correction=0)
    cosine_to_mean = (sums.mean_products / norms / sums.mean_squared_norm.sqrt()).clamp(-1, 1)
    return WorkerDispersion(
        loss_std=losses.std(correction=0),
        loss_range=losses.max() - losses.min(),
        grad_norm_std=norm_std,
        grad_norm_cv=norm_std / norms.mean(),
        pairwise_cosine=_pairwise_cosine(sums),
        cosine_to_mean=cosine_to_mean,
        noise_scale=_noise_scale(sums, num_examples),
        outlier=_outlier(losses, norms, cosine_to_mean),
    )


def add_to_gram(gram: Tensor | None, parts: Tensor, factor: float = 1.0) -> Tensor:
    """Return the inner products of gradients, extended by one more part of the gradients.

    Args:
        gram: The sum so far, None at the beginning. Shape ``[N, N]``.
        parts: The same part of each worker's gradient. Shape ``[N, p]``.
        factor: Factor of the products.

    Returns:
        The sum, float64. Shape ``[N, N]``.
    """
    for chunk in parts.split(CHUNK_ELEMENTS, dim=1):
        wide = chunk.double()
        product = factor * (wide @ wide.mT)
        gram = product if gram is None else gram + product
    return parts.new_zeros(len(parts), len(parts), dtype=torch.float64) if gram is None else gram


def sums_of_gram(gram: Tensor) -> WorkerSums:
    """Return the sums from the inner products of all pairs of gradients.

    Args:
        gram: The products, float64. Shape ``[N, N]``.

    Returns:
        The sums, on the device of `gram`.
    """
    norms = gram.diagonal().sqrt()
    return WorkerSums(
        squared_norms=gram.diagonal(),
        mean_products=gram.mean(1),
        mean_squared_norm=gram.mean(),
        unit_squared_norm=(gram / norms / norms[:, None]).sum(),
    )


def unit_squared_norm_of_two(squared_norms: Tensor, mean_products: Tensor) -> Tensor:
    """Return ||g_1 / ||g_1|| + g_2 / ||g_2|| ||^2 where g is exactly the mean of the two.

    <g_1, g_2> = 2 <g_1, g> - ||g_1||^2, so two workers need not exchange their gradients.

    Args:
        squared_norms: ||g_i||^2. Shape ``[2]``.
        mean_products: <g_i, g>. Shape ``[2]``.

    Returns:
        The ``unit_squared_norm`` of `WorkerSums`. Shape ``[]``.
    """
    products = 2 * mean_products - squared_norms
    return 2 + 2 * products.mean() / squared_norms.prod().sqrt()


def _gram(gradients: Tensor | Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return the inner products of all pairs of gradients, float64, shape ``[N, N]``.

    Raises:
        ValueError: If there is nothing to multiply.
    """
    gram = None
    for chunk in _chunks(gradients):
        gram = add_to_gram(gram, chunk.detach())
    if gram is None:
        raise ValueError(
            "worker_dispersion: expected `gradients` of at least one worker and one parameter, "
            "got none. Pass a tensor [N, P] or a list of N dicts."
        )
    return gram


def _chunks(gradients: Tensor | Sequence[Mapping[str, Tensor]]) -> Iterator[Tensor]:
    """Yield parts ``[N, p]`` that together make up the gradients.

    Raises:
        ValueError: If the workers' gradients are not alike in shape or names.
    """
    if isinstance(gradients, Tensor):
        if gradients.ndim != 2 or gradients.numel() == 0:
            raise ValueError(
                "worker_dispersion: expected `gradients` of shape [N, P] with N and P at least 1, "
                f"got shape {tuple(gradients.shape)}. Flatten each worker's gradient to one row."
            )
        yield gradients
        return
    for name in gradients[0] if gradients else ():
        if any(gradient.keys() != gradients[0].keys() for gradient in gradients):
            raise ValueError(
                "worker_dispersion: expected `gradients` with the same names for every worker, got "
                f"{[sorted(gradient) for gradient in gradients]}. Give a parameter without a "
                "gradient zeros."
            )
        yield torch.stack([gradient[name].flatten() for gradient in gradients])


def _pairwise_cosine(sums: WorkerSums) -> Tensor:
    """Return (||sum_i g_i/||g_i|| ||^2 - N) / (N (N - 1))."""
    num_workers = len(sums.squared_norms)
    if num_workers == 1:  # no pair; 0 / 0 would depend on the rounding of the numerator
        return torch.full_like(sums.unit_squared_norm, torch.nan)
    pairs = num_workers * (num_workers - 1.0)
    return ((sums.unit_squared_norm - num_workers) / pairs).clamp(-1, 1)


def _noise_scale(sums: WorkerSums, num_examples: int) -> Tensor:
    """Return tr(S) / |G|^2, both by their unbiased estimates (arXiv:1812.06162, App. A)."""
    num_workers = len(sums.squared_norms)
    if num_workers == 1:
        return torch.full_like(sums.mean_squared_norm, torch.nan)
    mean_of_squares = sums.squared_norms.mean()
    gradient = (num_workers * sums.mean_squared_norm - mean_of_squares) / (num_workers - 1)
    spread = (mean_of_squares - sums.mean_squared_norm) * num_workers / (num_workers - 1)
    scale = num_examples * spread.clamp_min(0) / gradient
    return torch.where(gradient <= 0, torch.inf, scale)


def _outlier(losses: Tensor, norms: Tensor, cosine_to_mean: Tensor) -> int | None:
    """Return the first non-finite worker, else the one too far from all others, else None."""
    finite = losses.isfinite() & norms.isfinite()
    if not finite.all():
        # If no worker is finite, none stands out.
        return int(finite.int().argmin()) if finite.any() else None
    if len(losses) < 3:
        return None  # of two that differ, either may be the outlier
    log_norms = norms.clamp_min(1e-12 * norms.max()).clamp_min(1e-150).log()
    deviations = torch.stack(
        [
            _leave_one_out_z(losses, _AGREEMENT * losses.abs().median()),
            _leave_one_out_z(log_norms, torch.full_like(norms[0], _AGREEMENT)),
            _leave_one_out_z(cosine_to_mean.nan_to_num(0.0), torch.full_like(norms[0], _AGREEMENT)),
        ]
    )
    likeliest, worker = deviations.amax(0).max(0)
    chance = torch.full_like(likeliest, _FALSE_OUTLIERS / deviations.numel() / 2)
    return int(worker) if likeliest > -torch.special.ndtri(chance) else None


def _leave_one_out_z(values: Tensor, agreement: Tensor) -> Tensor:
    """Return each worker's deviation from the others, as an equivalent normal deviate.

    The distance to the others' mean over their standard deviation, suitably scaled, follows
    Student's t with N - 2 degrees of freedom; Wallace (1959) converts it to a normal deviate.
    """
    count = len(values)
    others = values.expand(count, count)[~torch.eye(count, dtype=torch.bool, device=values.device)]
    spread, center = torch.std_mean(others.reshape(count, count - 1), dim=1)
    freedom = count - 2
    t = (values - center) / torch.maximum(spread, agreement) / (count / (count - 1)) ** 0.5
    t = t.nan_to_num(0.0)  # 0 / 0: all are equal
    return (8 * freedom + 1) / (8 * freedom + 3) * (freedom * (t**2 / freedom).log1p()).sqrt()
