"""What a family of Gaussian posteriors pays for a given precision, and its best common axes.

Where the posterior of an image is N(., Lambda^-1), a family pays

    min over its S of KL(N(0, S) || N(0, Lambda^-1)) = 1/2 (tr Lambda S - d - log det Lambda S).
                                                                  (12.4), notebooks/12

One rotation Q of the latent space for all images, which any decoder may choose, turns every Lambda
into Q^T Lambda Q. What the diagonal family then pays is the criterion by which Pham (2001)
diagonalises jointly; over orthogonal Q it is that of Flury's (1984) common principal components.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.nn.functional import softplus

from ..posteriors import POSTERIORS, LowRank

RANK = LowRank.rank
Member = Callable[[Tensor, Tensor], Tensor]


def log_det(precision: Tensor) -> Tensor:
    """log det of positive definite matrices (..., d, d), by Cholesky."""
    return 2 * torch.linalg.cholesky(precision).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def kl_to_precision(covariance: Tensor, precision: Tensor) -> Tensor:
    """KL(N(0, S) || N(0, Lambda^-1)) = 1/2 (tr Lambda S - d - log det S - log det Lambda), nats."""
    trace = (precision * covariance).sum((-2, -1))
    return 0.5 * (trace - precision.shape[-1] - log_det(covariance) - log_det(precision))


def isotropic_price(precision: Tensor) -> Tensor:
    """1/2 (d log(tr Lambda / d) - log det Lambda): the best S is I d / tr Lambda. Nats, (...,)."""
    latent = precision.shape[-1]
    trace = precision.diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (latent * (trace / latent).log() - log_det(precision))


def diagonal_price(precision: Tensor) -> Tensor:
    """1/2 (sum_j log Lambda_jj - log det Lambda): the best S_jj is 1 / Lambda_jj. Nats, (...,).

    (11.5), notebooks/11; (12.5), notebooks/12
    """
    return 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - log_det(precision))


def ar1_price(precision: Tensor, points: int = 160, steps: int = 3) -> Tensor:
    """The price of s R(rho), the best s = d / tr(Lambda R) inserted, at its best rho:

        1/2 min over rho of  d log(tr(Lambda R(rho)) / d) - (d - 1) log(1 - rho^2) - log det Lambda

    The best rho is looked for on a grid of Fisher z, and then by Newton steps. It is held fixed for
    the gradient with respect to Lambda, where to first order it does not matter.

    Args:
        precision: (n, d, d).
        points: of the grid, over |rho| < 0.9999.
        steps: of Newton; one that does not lower the price is not taken.
    Returns:
        Nats, (n,).
    """
    latent = precision.shape[-1]
    # tr(Lambda R) is a polynomial of rho, with the sums along the diagonals for coefficients.
    sums = torch.stack([precision.diagonal(k, -2, -1).sum(-1) for k in range(latent)], -1)
    lag = torch.cat([sums[:, :1], 2 * sums[:, 1:]], -1)

    def trace_of(fisher_z: Tensor, lag: Tensor) -> Tensor:
        rho, trace = fisher_z.tanh(), lag[..., -1]
        for k in range(latent - 2, -1, -1):  # Horner: powers have no second derivative at 0
            trace = lag[..., k] + rho * trace
        return trace

    def price(fisher_z: Tensor, trace: Tensor) -> Tensor:
        log_one_minus = _log_one_minus_rho_squared(fisher_z)
        return 0.5 * (latent * (trace / latent).log() - (latent - 1) * log_one_minus)

    def of_one(fisher_z: Tensor, lag: Tensor) -> Tensor:
        return price(fisher_z, trace_of(fisher_z, lag))

    with torch.no_grad():
        fixed = lag.detach()
        grid = torch.linspace(-5, 5, points, dtype=lag.dtype, device=lag.device)
        found = grid[price(grid, trace_of(grid, fixed.unsqueeze(1))).argmin(-1)]
        value, slope = vmap(of_one), vmap(grad(of_one))
        curvature = vmap(grad(grad(of_one)))
        for _ in range(steps):
            bend = curvature(found, fixed).abs().clamp_min(1e-12)
            better = found - slope(found, fixed) / bend
            lower = value(better, fixed) < value(found, fixed)
            found = torch.where(lower, better, found)
    return price(found, trace_of(found, lag)) - 0.5 * log_det(precision)


def _log_one_minus_rho_squared(fisher_z: Tensor) -> Tensor:
    """-2 log cosh, without |fisher_z|, whose second derivative at 0 autograd takes for 0."""
    doubled = softplus(2 * fisher_z, threshold=100)
    return 2 * (math.log(2) + fisher_z - doubled)


def family_prices(
    precision: Tensor, starts: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each family pays for each Lambda, nats.

    In closed form for `isotropic`, `diagonal` and `full` (which pays nothing), by a search in one
    number for `ar1`; for the others by Newton's method from several starts, the best of which
    counts (they are not convex).

    Args:
        precision: Lambda, (n, d, d), float64.
        starts: the second result for matrices close to these, to start from it alone.
    Returns:
        The names in POSTERIORS -> (n,); and the numbers at which the searches ended, for `starts`.
    """
    ends: dict[str, Tensor] = {}
    values = {}
    for name, (member, first, _) in SEARCHED.items():
        begin = [starts[name]] if starts else first(precision, ends)
        ends[name], value = _best_members(precision, member, begin)
        values[name] = value - 0.5 * (precision.shape[-1] + log_det(precision))
    none = torch.zeros(len(precision), dtype=precision.dtype, device=precision.device)
    values |= {
        "isotropic": isotropic_price(precision),
        "diagonal": diagonal_price(precision),
        "ar1": ar1_price(precision),
        "full": none,
    }
    return {name: values[name] for name in POSTERIORS}, ends


def _chain_covariance(numbers: Tensor, latent: int) -> Tensor:
    log_scale, fisher_z = numbers[:latent], numbers[latent:]
    scale, rho = log_scale.exp(), fisher_z.tanh().expand(latent - 1)
    # As ar1.correlation, whose scan has no second derivatives.
    units = torch.eye(latent, dtype=rho.dtype, device=rho.device)
    rows = [units[0]]
    for step, unit in enumerate(units[1:]):
        rows.append(rho[step] * rows[-1] + unit)
    lower = torch.stack(rows)
    return scale.outer(scale) * (lower + lower.tril(-1).mT)


def _chain(numbers: Tensor, precision: Tensor) -> Tensor:
    """1/2 (tr Lambda S - log det S) for the log-scales and Fisher z of a chain."""
    latent = len(precision)
    trace = (precision * _chain_covariance(numbers, latent)).sum()
    log_one_minus = _log_one_minus_rho_squared(numbers[latent:]).expand(latent - 1)
    return 0.5 * (trace - 2 * numbers[:latent].sum() - log_one_minus.sum())


def _low_rank_covariance(numbers: Tensor, latent: int) -> Tensor:
    factor = numbers[latent:].reshape(latent, RANK)
    return torch.diag(numbers[:latent].exp()) + factor @ factor.mT


def _low_rank(numbers: Tensor, precision: Tensor) -> Tensor:
    """The same for diag(s) + F F^T: log-variances, then F."""
    latent = len(precision)
    variance, factor = numbers[:latent].exp(), numbers[latent:].reshape(latent, RANK)
    trace = (precision.diagonal() * variance).sum() + (factor * (precision @ factor)).sum()
    one, two = (factor / variance.sqrt().unsqueeze(-1)).unbind(-1)
    # det(I + G^T G) of rank 2 by Lagrange's identity: without a subtraction between large terms,
    # as a variance may go to zero (Heywood's case).
    minors = one.outer(two) - two.outer(one)
    determinant = 1 + one.square().sum() + two.square().sum() + 0.5 * minors.square().sum()
    log_determinant = numbers[:latent].sum() + determinant.log()
    return 0.5 * (trace - log_determinant)


def _scaled_starts(precision: Tensor, ends: dict) -> list[Tensor]:
    scale = -0.5 * precision.diagonal(dim1=-2, dim2=-1).log()
    return [torch.cat([scale, torch.full_like(scale[:, :1], z)], -1) for z in (-0.5, 0.5)]


def _stepped_starts(precision: Tensor, ends: dict) -> list[Tensor]:
    """Pair by pair, which is exact for two variables, and the best chain of one correlation."""
    size, neighbours = precision.diagonal(dim1=-2, dim2=-1), precision.diagonal(1, -2, -1)
    partial = neighbours / (size[:, 1:] * size[:, :-1]).sqrt()
    log_scale = -0.5 * (size.log() + torch.log1p(-partial.square().amax(-1, keepdim=True)))
    pairs = torch.cat([log_scale, -partial.atanh()], -1)
    latent, one = size.shape[-1], ends["ar1-scaled"]
    return [pairs, torch.cat([one[:, :latent], one[:, latent:].expand(-1, latent - 1)], -1)]


def _low_rank_starts(precision: Tensor, ends: dict) -> list[Tensor]:
    """The two directions in which the diagonal member is most too narrow, and two at random."""
    variance = 1 / precision.diagonal(dim1=-2, dim2=-1)
    scale = variance.sqrt()
    whitened = scale.unsqueeze(-1) * precision * scale.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(whitened)
    reach = (1 / values[:, :RANK] - 1).clamp_min(0.01).sqrt()
    factors = [scale.unsqueeze(-1) * vectors[..., :RANK] * reach.unsqueeze(-2)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        noise = torch.randn(factors[0].shape, generator=generator, dtype=scale.dtype)
        factors.append(0.3 * scale.unsqueeze(-1) * noise)
    return [torch.cat([variance.log(), factor.flatten(1)], -1) for factor in factors]


SEARCHED = {
    "ar1-scaled": (_chain, _scaled_starts, _chain_covariance),
    "ar1-stepped": (_chain, _stepped_starts, _chain_covariance),
    "low-rank": (_low_rank, _low_rank_starts, _low_rank_covariance),
}


def predicted_members(precision: Tensor, ends: dict[str, Tensor]) -> dict[str, Tensor]:
    """The covariances at which `family_prices` ended, for the families with more than one scale."""
    latent = precision.shape[-1]
    members = {"diagonal": (1 / precision.diagonal(dim1=-2, dim2=-1)).diag_embed()}
    for name, (*_, covariance) in SEARCHED.items():
        members[name] = torch.stack([covariance(numbers, latent) for numbers in ends[name]])
    return members


def _best_members(precision: Tensor, member: Member, starts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The best end of the searches for each row: its numbers, and the value there."""
    ends = [minimised(member, start, precision) for start in starts]
    values = torch.stack([vmap(member)(end, precision) for end in ends])
    value, which = values.min(0)
    return torch.stack(ends)[which, torch.arange(len(precision))], value


def minimised(
    objective: Member, start: Tensor, data: Tensor, *, steps: int = 200, tolerance: float = 1e-7
) -> Tensor:
    """A local minimum of objective(x_i, data_i) for every i by damped Newton steps.

    (H + damping I) step = -gradient: the damping of a row falls after a step that lowers its value,
    and grows after any other, or where the matrix is not positive definite; such a step is undone.

    Args:
        objective: (k,), (...) -> scalar.
        start: (n, k).
        data: (n, ...).
        steps: at most.
        tolerance: on the largest entry of the gradient.
    Returns:
        (n, k).
    """
    x, damping = start.clone(), torch.full_like(start[:, 0], 1e-2)
    value = vmap(objective)(x, data)
    slope = vmap(grad(objective))
    curvature = vmap(jacrev(grad(objective)), chunk_size=100)
    identity = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    gradient, matrix = slope(x, data), curvature(x, data)
    active = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        g, h, ridge = gradient[active], matrix[active], damping[active]
        factor, failed = torch.linalg.cholesky_ex(h + ridge[:, None, None] * identity)
        factor = torch.where((failed == 0)[:, None, None], factor, identity)
        step = torch.cholesky_solve(g.unsqueeze(-1), factor).squeeze(-1)
        tried = x[active] - step
        new = vmap(objective)(tried, data[active])
        better = (failed == 0) & (new < value[active])
        damping[active] = torch.where(better, ridge / 5, 4 * ridge)
        moved = active[better]
        if len(moved):
            x[moved], value[moved] = tried[better], new[better]
            gradient[moved] = slope(x[moved], data[moved])
            matrix[moved] = curvature(x[moved], data[moved])
        # Where rounding hides what is left to gain, the damping grows without end.
        unfinished = (gradient.abs().amax(-1) > tolerance) & (damping < 1e8)
        active = unfinished.nonzero().squeeze(-1)
        if not len(active):
            break
    return x


def turned(precision: Tensor, rotation: Tensor) -> Tensor:
    """Q^T Lambda Q for all Lambda (n, d, d) and one Q (d, d)."""
    return rotation.mT @ precision @ rotation


def random_rotation(latent: int, generator: torch.Generator) -> Tensor:
    """A rotation from the uniform law on the orthogonal group, float64, (latent, latent)."""
    noise = torch.randn(latent, latent, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal().sign()


def best_rotation(
    precision: Tensor,
    price: Callable[[Tensor], Tensor] = diagonal_price,
    *,
    starts: int = 4,
    rounds: int = 4,
    seed: int = 0,
) -> tuple[Tensor, float, list[float]]:
    """min over rotations Q of the mean of price(Q^T Lambda Q): for all images one Q.    (12.6)

    For `diagonal_price` this is Pham's (2001) criterion over orthogonal matrices. L-BFGS over
    Q exp(A - A^T), from the identity, from the eigenvectors of the mean of Lambda, and from random
    rotations; each round begins anew at the Q found so far.

    Args:
        precision: (n, d, d), float64.
        price: of each matrix, (n, d, d) -> (n,), with a gradient.
        starts: searches in all.
        rounds: of each search.
        seed: of the random starts.
    Returns:
        The best Q, its price in nats, and the prices that the searches ended at.
    """
    latent, generator = precision.shape[-1], torch.Generator().manual_seed(seed)
    first = [torch.eye(latent, dtype=precision.dtype), torch.linalg.eigh(precision.mean(0))[1]]
    first += [random_rotation(latent, generator) for _ in range(starts - 2)]
    ends = []
    for rotation in first[:starts]:
        value = price(turned(precision, rotation)).mean().item()
        for _ in range(rounds):
            tried = _rotation_search(precision, price, rotation)
            reached = price(turned(precision, tried)).mean().item()
            if not reached < value:  # a line search across the kinks of a price may lose its way
                break
            rotation, value = tried, reached
        ends.append((value, rotation))
    best, rotation = min(ends, key=lambda end: end[0])
    return rotation, best, [value for value, _ in ends]


def _rotation_search(precision: Tensor, price: Callable, rotation: Tensor) -> Tensor:
    skew = torch.zeros_like(rotation).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [skew], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        value = price(turned(precision, rotation @ torch.matrix_exp(skew - skew.T))).mean()
        (skew.grad,) = torch.autograd.grad(value, [skew])
        return value

    optimizer.step(closure)
    with torch.no_grad():
        # Against rounding; with the signs of the axes as they are, which a chain sees.
        q, r = torch.linalg.qr(rotation @ torch.matrix_exp(skew - skew.T))
        return q * r.diagonal().sign()


def stationarity(precision: Tensor, rotation: Tensor) -> Tensor:
    """Flury's (1984) equations at Q: zero off the diagonal where the diagonal price is stationary.

    q_j^T [mean_n (1 / l_nj - 1 / l_nk) Lambda_n] q_k,    l_nj = q_j^T Lambda_n q_j

    Returns:
        (d, d), skew-symmetric.
    """
    inside = turned(precision, rotation)
    inverse = 1 / inside.diagonal(dim1=-2, dim2=-1)
    return ((inverse.unsqueeze(-1) - inverse.unsqueeze(-2)) * inside).mean(0)
