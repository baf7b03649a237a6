"""Deconvolution with missing samples, learned: a linear decoder, an encoder, all in closed form.

                                                                               notebooks/11, 11.1
A white signal z ~ N(0, I) is blurred by a filter of two taps and measured with noise, and each
measurement misses some samples, x = m (W z + e). The model is linear and Gaussian, so the evidence,
the best posterior of a family, and the bound for any Gaussian posterior are known without draws.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal, kl_divergence
from torch.nn.functional import pad

from ..distribution import AR1Normal
from ..objectives import standard_normal_like
from ..posteriors import POSTERIORS
from .data import require_known
from .prices import diagonal_price

LENGTH = 32
TAPS = (0.6, 0.4)
NOISE = 0.01
DECODERS = ("fixed", "convolution", "dense", "dense from a copy")
FAMILIES = ("diagonal", "ar1-stepped", "full")
MISSING = (0.0, 0.1, 0.4, 0.7)


def blur(taps: Tensor, length: int = LENGTH) -> Tensor:
    """The lower-triangular band matrix H of a causal filter, (length, length)."""
    return sum(
        torch.diag(tap.expand(length - lag), -lag) for lag, tap in enumerate(torch.as_tensor(taps))
    )


class Measurements(NamedTuple):
    """values: (n, length), zero where missing; mask: (n, length), one where measured."""

    values: Tensor
    mask: Tensor


def measure(n: int, missing: float, generator: torch.Generator, **kind) -> Measurements:
    """Fresh measurements of fresh signals, each sample missing with the same probability.

    Args:
        n: how many.
        missing: probability of a missing sample, in [0, 1).
        generator: where the randomness comes from.
        kind: dtype of the result.
    """
    signal, noise = torch.randn(2, n, LENGTH, generator=generator, **kind)
    mask = (torch.rand(n, LENGTH, generator=generator) >= missing).to(signal)
    weight = blur(torch.tensor(TAPS, **kind))
    return Measurements(mask * (signal @ weight.T + math.sqrt(NOISE) * noise), mask)


def posterior_precision(weight: Tensor, mask: Tensor) -> Tensor:
    """I + W^T diag(m) W / s2, (..., latent, latent).                      (11.2), notebooks/11"""
    identity = torch.eye(weight.shape[-1], dtype=weight.dtype)
    return identity + (weight.mT * mask.unsqueeze(-2)) @ weight / NOISE


def exact_posterior(weight: Tensor, data: Measurements) -> MultivariateNormal:
    """p(z | x), batch (n,)."""
    factor = torch.linalg.cholesky(posterior_precision(weight, data.mask))
    loc = torch.cholesky_solve((data.values @ weight / NOISE).unsqueeze(-1), factor).squeeze(-1)
    covariance = torch.cholesky_inverse(factor)
    return MultivariateNormal(loc, covariance, validate_args=False)


def negative_log_evidence(weight: Tensor, data: Measurements) -> Tensor:
    """-log p(x) of the measured samples, nats per measurement, (n,).      (11.3), notebooks/11

    1/2 (log det L + n log 2 pi s2 + |x|^2 / s2 - b^T L^-1 b),  b = W^T x / s2, n samples measured
    """
    factor = torch.linalg.cholesky(posterior_precision(weight, data.mask))
    shift = (data.values @ weight / NOISE).unsqueeze(-1)
    explained = torch.linalg.solve_triangular(factor, shift, upper=False).square().sum((-2, -1))
    return 0.5 * (
        _log_det(factor)
        + data.mask.sum(-1) * math.log(2 * math.pi * NOISE)
        + data.values.square().sum(-1) / NOISE
        - explained
    )


def negative_elbo(q: Distribution, weight: Tensor, data: Measurements) -> Tensor:
    """-ELBO without a draw, nats per measurement, (n,).                   (11.4), notebooks/11

    1/2 (|m (x - W mu)|^2 + sum_t m_t (W S W^T)_tt) / s2 + n/2 log 2 pi s2 + KL(q || N(0, I))
    """
    residual = data.values - data.mask * (q.mean @ weight.T)
    if isinstance(q, (AR1Normal, MultivariateNormal)):
        spread = (weight @ q.scale_tril).square().sum(-1)
    else:
        spread = q.variance @ weight.square().T
    fit = (residual.square() + data.mask * spread).sum(-1) / NOISE
    constant = data.mask.sum(-1) * math.log(2 * math.pi * NOISE)
    return 0.5 * (fit + constant) + kl_divergence(q, standard_normal_like(q.mean))


def expected_excess(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What a decoder costs on average over measurements, in two parts.    (11.6), notebooks/11

    Args:
        weight: decoder W, (length, latent).
        mask: (n, length), over which the mean is taken.
    Returns:
        KL(true p(x) || p(x) of the decoder), and the diagonal family's price at this decoder;
        nats per measurement, scalars.
    """
    truth = blur(torch.tensor(TAPS, dtype=weight.dtype))
    return _expected_nll(weight, mask) - _expected_nll(truth, mask), diagonal_price(
        posterior_precision(weight, mask)
    ).mean()


def _expected_nll(weight: Tensor, mask: Tensor) -> Tensor:
    """Mean over masks of -E log p(x), x from the true model."""
    truth = blur(torch.tensor(TAPS, dtype=weight.dtype))
    covariance = truth @ truth.T + NOISE * torch.eye(LENGTH, dtype=weight.dtype)
    factor = torch.linalg.cholesky(posterior_precision(weight, mask))
    right = weight.mT * mask.unsqueeze(-2) / NOISE
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    explained = ((half @ covariance) * half).sum((-2, -1))
    energy = mask @ covariance.diagonal() / NOISE
    constant = mask.sum(-1) * math.log(2 * math.pi * NOISE)
    return 0.5 * (_log_det(factor) + constant + energy - explained).mean()


def _log_det(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


STARTS = ("truth", "no blur", "principal axes", "random 1", "random 2")


def decoder_price(decoder: str, missing: float, start: str = "truth", masks: int = 200) -> dict:
    """What the diagonal family costs once the decoder is trained with it, found without samples.

    min over W of KL(true p(x) || p_W(x)) + mean over masks of the price    (11.6), notebooks/11

    by L-BFGS in float64 over some masks, judged on others. A dense decoder has several minima, so
    it matters where the search starts.

    Args:
        decoder: "fixed", "turned" (the true one behind any rotation), "convolution" or "dense".
        missing: probability of a missing sample.
        start: a name in STARTS, for the dense decoder and the turned one.
        masks: how many to optimise over; ten times as many judge.
    Returns:
        Nats per measurement: likelihood, what the decoder gave up; price, what the family still
        costs there; total; held, the price at the true decoder; and the learned taps.
    """
    require_known("decoder", decoder, ("fixed", "turned", "convolution", "dense"))
    require_known("start", start, STARTS)
    generator = torch.Generator().manual_seed(2026)
    count = masks if missing else 1
    single = {"generator": generator, "dtype": torch.float32}  # whatever the default is
    mask = (torch.rand(11 * count, LENGTH, **single) >= missing).double()
    truth = blur(torch.tensor(TAPS, dtype=torch.float64))
    left, singular, right = torch.linalg.svd(truth)
    random = {name: torch.randn(LENGTH, LENGTH, **single) for name in STARTS[3:]}
    places = {
        "truth": truth,
        "no blur": 0.7 * torch.eye(LENGTH, dtype=torch.float64),
        "principal axes": left * singular,
        **{name: 0.7 * weight.double() / math.sqrt(LENGTH) for name, weight in random.items()},
    }
    place = torch.tensor(TAPS, dtype=torch.float64) if decoder == "convolution" else places[start]
    free = place.clone(memory_format=torch.contiguous_format).requires_grad_(decoder != "fixed")

    if decoder == "turned":
        turns = {name: torch.linalg.qr(w.double()).Q for name, w in random.items()}
        turns |= {"truth": torch.eye(LENGTH, dtype=torch.float64), "principal axes": right.mT}
        base, free = truth @ turns[start], 0.03 * random["random 1"].double()
        free.requires_grad_()

    def weight():
        if decoder == "turned":
            return base @ torch.matrix_exp(free - free.T)
        return blur(free) if decoder == "convolution" else free

    if decoder != "fixed":
        _minimise(lambda: sum(expected_excess(weight(), mask[:count])), free)
    with torch.no_grad():
        likelihood, price = (part.item() for part in expected_excess(weight(), mask[count:]))
        held = diagonal_price(posterior_precision(truth, mask[count:])).mean().item()
    result = {"total": likelihood + price, "likelihood": likelihood, "price": price, "held": held}
    return result | ({"taps": free.tolist()} if decoder == "convolution" else {})


def _minimise(loss, free: Tensor, steps: int = 150) -> None:
    optimizer = torch.optim.LBFGS(
        [free], max_iter=steps, history_size=30, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


class Encoder(nn.Module):
    """Measurement and mask -> features: one small network for every window of the signal.

    Window t holds the samples t - reach .. t + reach, their mask, and where the signal ends. As the
    exact posterior mean is linear in the samples, with coefficients that depend on the mask, a
    network of the mask gates linear filters of the samples; the network's own outputs are features
    as well. All windows share their weights; a head reads all of them together, so any axes can be
    reached.
    """

    def __init__(self, reach: int = 6, hidden: int = 64, units: int = 48, width: int = 8):
        super().__init__()
        self.reach = reach
        window = 2 * reach + 1
        self.mask = nn.Sequential(
            nn.Linear(2 * window, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.gates = nn.Linear(hidden, units)
        self.filters = nn.Linear(window, units, bias=False)
        self.shift = nn.Linear(units, width)
        self.shape = nn.Linear(hidden, width)
        self.features = 2 * LENGTH * width

    def forward(self, data: Measurements) -> Tensor:
        ends = self._windows(torch.ones_like(data.mask))
        hidden = self.mask(torch.cat([self._windows(data.mask), ends], -1))
        filtered = self.gates(hidden) * self.filters(self._windows(data.values))
        return torch.cat([self.shift(filtered), self.shape(hidden)], -1).flatten(-2)

    def _windows(self, x: Tensor) -> Tensor:
        return pad(x, (self.reach, self.reach)).unfold(-1, 2 * self.reach + 1, 1)


class Decoder(nn.Module):
    """W of a linear decoder: the true blur, a filter of two learned taps, or any matrix.

    The filter starts near one that copies, (0.5, 0); the dense decoder from random weights, as
    usual, or "from a copy", near 0.5 I, so that its axes begin in the order of the samples.
    """

    def __init__(self, kind: str):
        require_known("decoder", kind, DECODERS)
        super().__init__()
        self.kind = kind
        if kind == "convolution":
            self.taps = nn.Parameter(torch.tensor([0.5, 0.0]) + 0.1 * torch.randn(2))
        elif kind == "dense":
            self.weight = nn.Parameter(0.7 * torch.randn(LENGTH, LENGTH) / math.sqrt(LENGTH))
        elif kind == "dense from a copy":
            noise = torch.randn(LENGTH, LENGTH) / math.sqrt(LENGTH)
            self.weight = nn.Parameter(0.5 * torch.eye(LENGTH) + 0.1 * noise)

    def forward(self) -> Tensor:
        if self.kind == "fixed":
            return blur(torch.tensor(TAPS))
        return blur(self.taps) if self.kind == "convolution" else self.weight


def train(
    decoder: str,
    missing: float,
    posterior: str,
    seed: int,
    steps: int = 1000,
    batch: int = 64,
    learning_rate: float = 3e-3,
    decoder_rate: float = 1e-2,
) -> dict:
    """Train encoder and decoder on fresh measurements; judge them on 2,000 others, by the bound
    without draws and the evidence without approximation.

    Returns:
        Nats per measurement, means over the test set: negative_elbo; nll, the evidence of the
        learned decoder; true_nll, that of the true one; diagonal_price, of the best diagonal
        normal at the learned decoder; curve, the bound on the first 500 at five times
        in training (on all at the last); the learned taps.
    """
    torch.manual_seed(seed)
    encoder, weight = Encoder(), Decoder(decoder)
    head = POSTERIORS[posterior](encoder.features, LENGTH)
    groups = [{"params": [*encoder.parameters(), *head.parameters()], "lr": learning_rate}]
    if decoder != "fixed":
        groups.append({"params": weight.parameters(), "lr": decoder_rate})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    fresh = torch.Generator().manual_seed(1000 + seed)
    test = measure(2000, missing, torch.Generator().manual_seed(99))
    curve = []
    for step in range(1, steps + 1):
        data = measure(batch, missing, fresh)
        loss = negative_elbo(head(encoder(data)), weight(), data).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(groups[0]["params"], 100.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 5) == 0:
            shown = test if step == steps else Measurements(*(part[:500] for part in test))
            with torch.no_grad():
                bound = negative_elbo(head(encoder(shown)), weight(), shown).mean()
            curve.append(bound.item())
    with torch.no_grad():
        exact = Measurements(*(part.double() for part in test))
        learned, truth = weight().double(), blur(torch.tensor(TAPS, dtype=torch.float64))
        precision = posterior_precision(learned, exact.mask)
        result = {
            "negative_elbo": curve[-1],
            "nll": negative_log_evidence(learned, exact).mean().item(),
            "true_nll": negative_log_evidence(truth, exact).mean().item(),
            "diagonal_price": diagonal_price(precision).mean().item(),
            "curve": curve,
        }
    if decoder == "convolution":
        result["taps"] = weight.taps.tolist()
    return result
