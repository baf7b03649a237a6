"""For latent variables that are time series: a prior with a time constant, and a posterior for it.

A model of T steps with C latent channels has latent variables of shape (batch, C, T). Each channel
is a chain of its own, so their distributions have batch shape (*batch, C) and events of T steps,
and a KL divergence has one number per channel, shape (*batch, C): sum over the last dimension.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from . import ar1
from .distribution import AR1Normal


class AR1Prior(nn.Module):
    """A stationary AR(1) process per channel (Ornstein-Uhlenbeck where times are irregular).

    Cov(z(s), z(t)) = scale^2 exp(-|s - t| / time_constant), mean 0. Over an interval dt the
    correlation is exp(-h) with h = dt / time_constant, and Fisher's z of it

        atanh(exp(-h)) = (log1p(exp(-h)) - log(1 - exp(-h))) / 2                (10.7), notebooks/10

    keeps its digits for any time constant. What is learned is its logarithm; give it a learning
    rate of its own, ten times that of the networks, as it has far to go. A linear decoder absorbs
    the scale, so this is fixed where nothing else is said. Where the time constant is much longer
    than the series, only scale^2 / time_constant can be learned from it. Channels come in no
    order: sort them by time constant before comparing runs.

    Args:
        channels: number of latent time series C.
        time_constant: initial value > 0, in the unit of the times (in steps where those are
            given): a number for all, one per channel, or a pair (shortest, longest) between which
            the channels are spread evenly in the logarithm. For series of T steps of dt,
            (2 * dt, T * dt / 4) is a good pair.
        scale: marginal standard deviation > 0, a number or one per channel.
        learn_time_constant, learn_scale: whether they are parameters, or buffers that stay.
    Raises:
        ValueError: values that are not positive numbers, or not as many as channels.

    Example::

        >>> import torch
        >>> from rhovae import AR1Prior
        >>> prior = AR1Prior(channels=3, time_constant=(2.0, 50.0))
        >>> [round(tau, 3) for tau in prior.time_constant.tolist()]
        [2.0, 10.0, 50.0]
        >>> p = prior(200)
        >>> p.batch_shape, p.event_shape
        (torch.Size([3]), torch.Size([200]))
    """

    # What forward returns; Pyro's has its own.
    distribution: type[AR1Normal] = AR1Normal

    log_time_constant: Tensor
    log_scale: Tensor

    def __init__(
        self,
        channels: int,
        time_constant: float | Sequence[float] | Tensor,
        scale: float | Sequence[float] | Tensor = 1.0,
        learn_time_constant: bool = True,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(channels, int | Integral) or channels < 1:
            raise ValueError(f"AR1Prior: channels is {channels!r}; it must be an integer >= 1.")
        self.channels = channels
        start = _per_channel("time_constant", time_constant, channels, spread=True).log()
        self._add("log_time_constant", start, learn_time_constant)
        self._add("log_scale", _per_channel("scale", scale, channels).log(), learn_scale)

    def _add(self, name: str, start: Tensor, learned: bool) -> None:
        # A parameter without a gradient would do, but Pyro warns of each.
        if learned:
            self.register_parameter(name, nn.Parameter(start))
        else:
            self.register_buffer(name, start)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"

    @property
    def time_constant(self) -> Tensor:
        """One per channel, shape (channels,), in the unit of the times."""
        return self.log_time_constant.exp()

    @property
    def scale(self) -> Tensor:
        """Marginal standard deviations, shape (channels,)."""
        return self.log_scale.exp()

    def forward(self, steps: int | None = None, *, times: Tensor | None = None) -> AR1Normal:
        """The process at some times.

        Args:
            steps: number of equidistant times, 1 apart; or
            times: (T,) or (*batch, T), increasing, in any unit.
        Returns:
            Batch shape (channels,) or (*batch, channels), event shape (T,).
        Raises:
            ValueError: both or neither are given, or times that do not increase.
        """
        elapsed, count = self._elapsed(steps, times)
        p = self.distribution(
            self.log_scale.new_zeros(count),
            self.scale.unsqueeze(-1),
            fisher_z=self._fisher_z(elapsed),
            validate_args=False,  # these are right by construction; what comes later may not be
        )
        p._validate_args = AR1Normal._validate_args and not torch.compiler.is_compiling()
        return p

    def extend(
        self, q: AR1Normal, steps: int | None = None, *, times: Tensor | None = None
    ) -> AR1Normal:
        """Forecast: q, and after it the steps to come by the dynamics of this process.

        As a prior on the longer grid, conditioned with precision 0 after the end; but q may be any
        chain.

        Args:
            q: batch shape (*batch, channels).
            steps: how many to append, 1 apart; or
            times: of those to append, counted from the last one of q: (more,) or (*batch, more),
                positive and increasing.
        Returns:
            Of the class of q, with event shape (T + more,); `.window(-more, None)` is the forecast.
        Raises:
            ValueError: both or neither are given, times that do not increase from 0, or q without
                this number of channels.
        """
        if q.batch_shape[-1:] != (self.channels,):
            raise ValueError(
                f"AR1Prior: q has batch shape {tuple(q.batch_shape)}; its last dimension must be "
                f"the {self.channels} channels of the prior."
            )
        # The last step of q is at 0.
        counted = pad(times, (1, 0)) if isinstance(times, Tensor) and times.dim() else times
        elapsed, count = self._elapsed(steps, counted, "positive and increasing")
        elapsed = elapsed.expand(count) if times is None else elapsed
        scale, last = self.scale.unsqueeze(-1), q.stddev[..., -1:]
        total = elapsed.cumsum(-1) / self.time_constant.unsqueeze(-1)
        mean = q.loc[..., -1:] * (-total).exp()
        # From the variance of q to that of the process, as a sum of positive terms.
        variance = last.square() * (-2 * total).exp() - scale.square() * (-2 * total).expm1()
        stddev = torch.cat((last.expand(*variance.shape[:-1], 1), variance.sqrt()), -1)
        rho, innovation, _ = ar1.from_fisher_z(self._fisher_z(elapsed))
        fisher_z = torch.asinh(rho / innovation * stddev[..., :-1] / scale)
        inside = q.fisher_z.expand(*q.batch_shape, q.event_shape[0] - 1)
        return q._remade(
            torch.broadcast_shapes(q.batch_shape, fisher_z.shape[:-1]),
            loc=_join(q.loc, mean),
            scale=_join(q.stddev, stddev[..., 1:]),
            fisher_z=_join(inside, fisher_z),
        )

    def _fisher_z(self, elapsed: Tensor) -> Tensor:
        """Of the correlations over these intervals, (*batch, C, intervals). (10.7), notebooks/10"""
        x = elapsed / self.time_constant.unsqueeze(-1)
        return (torch.log1p(torch.exp(-x)) - torch.log(-torch.expm1(-x))) / 2

    def _elapsed(
        self, steps: int | None, times: Tensor | None, order: str = "increasing"
    ) -> tuple[Tensor, int]:
        """Intervals between the times, and how many times there are.

        Intervals are (1,), or (*batch, 1, T - 1) to broadcast with channels.
        """
        if (steps is None) == (times is None):
            raise ValueError("AR1Prior needs either steps or times, and not both.")
        if times is None:
            if not isinstance(steps, int | Integral) or steps < 1:
                raise ValueError(
                    f"AR1Prior: steps is {steps!r}; it must be an integer >= 1. For times that are "
                    "not 1 apart, pass times=."
                )
            return self.log_time_constant.new_ones(1), steps
        if not isinstance(times, Tensor) or times.dim() < 1 or times.shape[-1] < 1:
            raise ValueError("AR1Prior: times must be a tensor of shape (T,) or (*batch, T).")
        # Before rounding to the precision of the parameters: times may be large.
        elapsed = times.diff(dim=-1)
        if not (elapsed > 0).all():
            raise ValueError(
                f"AR1Prior: times must be {order}, but of {elapsed.numel()} intervals "
                f"{(~(elapsed > 0)).sum().item()} are not positive; sort them, and merge "
                "observations at the same time."
            )
        return elapsed.to(self.log_time_constant).unsqueeze(-2), times.shape[-1]


class Sites(nn.Module):
    """A posterior for a prior that is a chain: pseudo-observations of it, 2 numbers per step.

    q(z) is what the prior becomes after observations of precision w_t and value v_t at each step,
    that a network makes up from the data: `prior.condition(v, precision=w)`. The outputs alpha and
    beta are such that

        w_t scale_t^2 = exp(alpha_t),    w_t scale_t (v_t - loc_t) = beta_t    (10.8), notebooks/10

    so that beta, precision times value, stays finite even where w -> 0 and v, their quotient, does
    not. It has as many outputs as the diagonal posterior, knows the time constant of the prior, and
    its covariance contains the optimum (10.1), or comes as near to it as one likes, where the
    likelihood of a step depends on that step of one channel alone and is log-concave, as of counts
    with a log-rate; elsewhere the optimal precision may be negative, which exp(alpha) is not. At
    first alpha is near log 0.1 and beta near 0: close to the prior.

    It is not among the `POSTERIORS`, whose heads get the features alone.

    Args:
        features: size of the last dimension of what it gets.
        channels: number of latent time series C.
    Reference:
        Opper and Archambeau (2009), The variational Gaussian approximation revisited, for the
        optimum; Johnson et al. (2016), arXiv 1603.06277, for a network that outputs observations.

    Example::

        >>> import torch
        >>> from torch.distributions import kl_divergence
        >>> from rhovae import AR1Prior, Sites
        >>> prior, head = AR1Prior(3, time_constant=20.0), Sites(features=16, channels=3)
        >>> p = prior(100)
        >>> q = head(torch.randn(8, 100, 16), p)
        >>> q.rsample().shape, kl_divergence(q, p).shape
        (torch.Size([8, 3, 100]), torch.Size([8, 3]))
    """

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.features, self.channels = features, channels
        self.log_precision = nn.Linear(features, channels)
        self.shift = nn.Linear(features, channels)
        with torch.no_grad():
            self.log_precision.bias.fill_(math.log(0.1))
            self.shift.bias.zero_()

    def forward(self, features: Tensor, prior: AR1Normal) -> AR1Normal:
        """The posterior, of the class of the prior.

        Args:
            features: (*batch, T, features), time before features as for nn.Linear; the output of a
                convolution over time, (*batch, features, T), goes in as its `.mT`.
            prior: event shape (T,), batch shape (channels,) or (*batch, channels).
        Returns:
            Batch shape (*batch, channels), event shape (T,).
        Raises:
            ValueError: shapes that do not fit.
        """
        expected = (*prior.event_shape, self.features)
        if features.shape[-2:] != expected:
            raise ValueError(
                f"Sites: features have shape {tuple(features.shape)}; the last two dimensions must "
                f"be {expected}, the steps of the prior and the features of each."
            )
        if prior.batch_shape[-1:] != (self.channels,):
            raise ValueError(
                f"Sites: the prior has batch shape {tuple(prior.batch_shape)}; its last dimension "
                f"must be {self.channels}, the channels."
            )
        weight = self.log_precision(features).exp().mT
        return prior._observed(weight, self.shift(features).mT, natural=True)


def _per_channel(name: str, value: Any, channels: int, spread: bool = False) -> Tensor:
    """`value` as one positive number per channel; a pair is spread evenly in the logarithm."""
    sizes = {1, channels, 2} if spread else {1, channels}
    try:
        given = torch.as_tensor(value, dtype=torch.get_default_dtype()).detach().reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        given = torch.empty(0)
    if len(given) not in sizes:
        pair = ", or a pair to spread the channels between" if spread else ""
        raise ValueError(
            f"AR1Prior: {name} is {value!r}; it must be a number, one per channel ({channels})"
            f"{pair}."
        )
    if not ((given > 0) & given.isfinite()).all():
        raise ValueError(f"AR1Prior: {name} is {value!r}; it must be positive and finite.")
    if len(given) == 2 and channels != 2:
        low, high = given.log()
        # A single channel starts in the middle.
        place = torch.linspace(0, 1, channels) if channels > 1 else torch.tensor([0.5])
        given = (low + (high - low) * place).exp()
    return given.expand(channels).clone()


def _join(before: Tensor, after: Tensor) -> Tensor:
    """One after the other along time, with their batch shapes broadcast."""
    batch = torch.broadcast_shapes(before.shape[:-1], after.shape[:-1])
    return torch.cat([x.expand(*batch, x.shape[-1]) for x in (before, after)], -1)
