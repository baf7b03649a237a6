"""A VAE on moving images, with a chain per latent channel as its prior.      notebooks/11, 11.2

Sequences of ten binary images, some of whose frames are missing as a whole. All posteriors read the
same features of one encoder. Four have a mean for each step straight from it and differ in the
covariance alone; `Sites` passes both through the prior.
"""

import functools
import math

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, one_hot, silu

from ..chains import AR1Prior, Sites
from ..distribution import AR1Normal
from ..objectives import bernoulli_nll
from .data import load_images, require_known, to_unit_interval
from .gpvae import BandedHead

STEPS = 10
SIZE = 14
DATA = ("digits", "spot")
FAMILIES = ("diagonal", "karhunen-loeve", "gp-vae", "chain", "sites")
MISSING = (0.0, 0.3, 0.6)
CHANNELS = {"digits": 8, "spot": 2}
TIME_CONSTANT = (1.0, STEPS / 2)  # where learning starts: spread between these two
SPOT_TIME_CONSTANT = 5.0


def rotating_digits(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned at a constant speed of its own, from an angle of its own.

    Speeds are 10 to 30 degrees per frame, either way round; angles are anything. Turned
    bilinearly, pooled from 28 to 14 pixels a side by averaging, and set to 1 above one half, so
    that the pixels are binary and their Bernoulli likelihood is one.

    Args:
        images: uint8, (n, 1, 28, 28).
    Returns:
        zeros and ones, (n, 10, 196).
    """
    n = len(images)
    start, speed, side = torch.rand(3, n, 1, generator=generator)
    speed = (10 + 20 * speed) * torch.where(side < 0.5, -1.0, 1.0)
    angle = (360 * start + speed * torch.arange(STEPS)) * math.pi / 180
    turn = torch.zeros(n, STEPS, 2, 3)
    turn[..., 0, 0] = turn[..., 1, 1] = angle.cos()
    turn[..., 1, 0], turn[..., 0, 1] = angle.sin(), -angle.sin()
    made = []
    pixels = to_unit_interval(images).to(turn)
    for part, how in zip(pixels.split(500), turn.split(500), strict=True):
        frames = part.expand(-1, STEPS, -1, -1).reshape(-1, 1, 28, 28)
        grid = affine_grid(how.flatten(0, 1), frames.shape, align_corners=False)
        pooled = avg_pool2d(grid_sample(frames, grid, align_corners=False), 2)
        made.append((pooled > 0.5).to(turn).reshape(len(part), STEPS, -1))
    return torch.cat(made)


def moving_spot(n: int, generator: torch.Generator) -> Tensor:
    """A dim spot whose two coordinates are AR(1) processes of a known time constant, 5 steps.

    With z ~ N(0, 1) the spot is 2.2 z pixels from the middle, and a pixel at the distance r from it
    is 1 with probability 0.15 exp(-r^2 / 8).

    Returns:
        zeros and ones, (n, 10, 196).
    """
    noise = torch.randn(n, 2, STEPS, generator=generator)
    rho = torch.tensor([math.exp(-1 / SPOT_TIME_CONSTANT)])
    prior = AR1Normal(torch.zeros(STEPS), 1.0, rho=rho)
    place = 2.2 * (noise @ prior.scale_tril.mT)
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    x, y = (place[:, i, :, None] - axis for i in (0, 1))
    chance = 0.15 * torch.exp(-(x[..., :, None].square() + y[..., None, :].square()) / 8)
    return (torch.rand(chance.shape, generator=generator) < chance).to(chance).flatten(-2)


@functools.cache
def sequences(data: str, split: str) -> Tensor:
    """The sequences of a data set, the same in every run: 10,000 to train with, 500 to test."""
    require_known("data set", data, DATA)
    generator = torch.Generator().manual_seed(1 if split == "train" else 2)
    n = 10_000 if split == "train" else 500
    if data == "digits":
        return rotating_digits(load_images("mnist", split)[:n], generator)
    return moving_spot(n, generator)


def frame_mask(n: int, missing: float, generator: torch.Generator) -> Tensor:
    """(n, 10), one where a frame is seen; frames drop out one by one, but at least one is seen."""
    chance = torch.rand(n, STEPS, generator=generator)
    mask = (chance >= missing).to(chance)
    kept = one_hot(torch.randint(STEPS, (n,), generator=generator), STEPS)
    return torch.where(mask.sum(-1, keepdim=True) > 0, mask, kept.to(mask))


class Encoder(nn.Module):
    """Frames and mask -> features of each step, (batch, 10, features).

    A network for each frame, which sees zeros and a mask bit where one is missing, then two
    convolutions over time, of five steps and, two apart, of five again.
    """

    features = 64

    def __init__(self):
        super().__init__()
        self.frame = nn.Sequential(
            nn.Linear(SIZE**2 + 1, 128), nn.SiLU(), nn.Linear(128, self.features)
        )
        self.near = nn.Conv1d(self.features, self.features, 5, padding=2)
        self.far = nn.Conv1d(self.features, self.features, 5, padding=4, dilation=2)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        mask = mask.unsqueeze(-1)
        h = self.frame(torch.cat([mask * frames, mask], -1)).mT
        h = h + self.near(silu(h))
        return (h + self.far(silu(h))).mT


class Diagonal(nn.Module):
    """Independent steps: 2 numbers per step and channel."""

    def __init__(self, features: int, channels: int):
        super().__init__()
        self.loc = nn.Linear(features, channels)
        self.log_variance = nn.Linear(features, channels)

    def forward(self, features: Tensor, prior: AR1Normal) -> AR1Normal:
        scale = (0.5 * self.log_variance(features)).exp().mT
        return AR1Normal(self.loc(features).mT, scale, rho=0.0, validate_args=False)


class Chain(Diagonal):
    """A free chain: 3 numbers per step and channel."""

    def __init__(self, features: int, channels: int):
        super().__init__(features, channels)
        self.fisher_z = nn.Linear(features, channels)

    def forward(self, features: Tensor, prior: AR1Normal) -> AR1Normal:
        scale = (0.5 * self.log_variance(features)).exp().mT
        fisher_z = self.fisher_z(features).mT[..., :-1]
        return AR1Normal(self.loc(features).mT, scale, fisher_z=fisher_z, validate_args=False)


class Banded(BandedHead):
    """The family of GP-VAE, whose neighbours correlate negatively."""

    def forward(self, features: Tensor, prior: AR1Normal) -> AR1Normal:
        return super().forward(features)


class InEigenvectors:
    """A normal that is diagonal in the eigenvectors of the prior, its Karhunen-Loeve basis.

    z = loc + V (sqrt(d s) * e) with the prior's covariance V diag(d) V^T, so that s is the variance
    along an eigenvector in units of the prior's. Batch (*batch, channels), event (T,).
    """

    def __init__(self, loc: Tensor, log_variance: Tensor, prior: AR1Normal):
        values, vectors = torch.linalg.eigh(prior.covariance_matrix.double())
        self.loc, self.log_variance = loc, log_variance
        self.vectors, self.log_values = vectors.to(loc), values.log().to(loc)

    @property
    def scale(self) -> Tensor:
        return (0.5 * (self.log_values + self.log_variance)).exp()

    def rsample(self, sample_shape=()) -> Tensor:
        noise = torch.randn(*sample_shape, *self.loc.shape)
        return self.loc + (self.vectors @ (self.scale * noise).unsqueeze(-1)).squeeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        along = (self.vectors.mT @ (value - self.loc).unsqueeze(-1)).squeeze(-1) / self.scale
        constant = math.log(2 * math.pi)
        return -(0.5 * (along.square() + constant) + self.scale.log()).sum(-1)

    def kl_to_prior(self) -> Tensor:
        """Shape (*batch, channels)."""
        mean = (self.vectors.mT @ self.loc.unsqueeze(-1)).squeeze(-1)
        shift = mean.square() * (-self.log_values).exp()
        return 0.5 * (shift + self.log_variance.exp() - 1 - self.log_variance).sum(-1)


class KarhunenLoeve(nn.Module):
    """Diagonal in the prior's eigenvectors: their variances from the features of all steps."""

    def __init__(self, features: int, channels: int):
        super().__init__()
        self.channels = channels
        self.loc = nn.Linear(features, channels)
        self.log_variance = nn.Linear(STEPS * features, channels * STEPS)

    def forward(self, features: Tensor, prior: AR1Normal) -> InEigenvectors:
        log_variance = self.log_variance(features.flatten(-2)).unflatten(-1, (self.channels, STEPS))
        return InEigenvectors(self.loc(features).mT, log_variance, prior)


class Smoothed(Sites):
    """A control: the mean of `Sites`, which the prior has smoothed, and independent steps."""

    def __init__(self, features: int, channels: int):
        super().__init__(features, channels)
        self.log_variance = nn.Linear(features, channels)

    def forward(self, features: Tensor, prior: AR1Normal) -> AR1Normal:
        scale = (0.5 * self.log_variance(features)).exp().mT
        return AR1Normal(super().forward(features, prior).loc, scale, rho=0.0, validate_args=False)


HEADS = {
    "diagonal": Diagonal,
    "karhunen-loeve": KarhunenLoeve,
    "gp-vae": Banded,
    "chain": Chain,
    "sites": Sites,
    "smoothed": Smoothed,
}


class MovingVAE(nn.Module):
    """One encoder, one head, a decoder for each frame alone, and a chain per channel as prior."""

    def __init__(
        self, family: str, channels: int, time_constant: float | tuple[float, float] = TIME_CONSTANT
    ):
        require_known("family", family, HEADS)
        super().__init__()
        self.encoder = Encoder()
        self.head = HEADS[family](Encoder.features, channels)
        self.decoder = nn.Sequential(
            nn.Linear(channels, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
            nn.Linear(128, SIZE**2),
        )  # fmt: skip
        self.prior = AR1Prior(channels, time_constant=time_constant)

    def posterior(self, frames: Tensor, mask: Tensor):
        """q(z | seen frames) and p(z), batch (batch, channels) and (channels,)."""
        p = self.prior(STEPS)
        return self.head(self.encoder(frames, mask), p), p

    def frame_nll(self, z: Tensor, frames: Tensor) -> Tensor:
        """-log p(x_t | z_t) of each frame, (*draws, batch, 10), for z (*draws, batch, C, 10)."""
        logits = self.decoder(z.mT)
        return bernoulli_nll(logits.flatten(0, -2), frames.expand_as(logits).flatten(0, -2)).view(
            logits.shape[:-1]
        )

    def negative_elbo(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Of the seen frames, by one draw, nats per sequence, (batch,).    (11.8), notebooks/11"""
        q, p = self.posterior(frames, mask)
        return (mask * self.frame_nll(q.rsample(), frames)).sum(-1) + kl_to(q, p)


def kl_to(q, p: AR1Normal) -> Tensor:
    """KL(q || p), summed over the channels, (batch,)."""
    kl = q.kl_to_prior() if isinstance(q, InEigenvectors) else kl_divergence(q, p)
    return kl.sum(-1)


@torch.no_grad()
def judge(model: MovingVAE, frames: Tensor, mask: Tensor, draws: int = 100) -> dict:
    """A trained model on test sequences, all from the same draws of the posterior.

    negative_elbo and iwae: of the seen frames, nats per sequence, K draws. The missing frames x_t
    have K-draw estimates of -log p(x_t | seen), nats per missing frame:

        predicted  -log 1/K sum_k p(x_t | z_k), z_k ~ q        (11.9), notebooks/11
        weighted   the same with weights w_k = p(seen, z_k) / q(z_k), normalised to sum 1

    Returns:
        Means over sequences, and over missing frames (none where no frame is missing).
    """
    bounds, weighted, plain = [], [], []
    for x, m in zip(frames.split(50), mask.split(50), strict=True):
        q, p = model.posterior(x, m)
        z = q.rsample((draws,))
        nll = model.frame_nll(z, x)
        seen = (m * nll).sum(-1)
        log_weight = (p.log_prob(z) - q.log_prob(z)).sum(-1) - seen
        bounds.append(
            torch.stack([seen.mean(0) + kl_to(q, p), math.log(draws) - log_weight.logsumexp(0)])
        )
        share = log_weight.log_softmax(0).unsqueeze(-1)
        weighted.append(-(share - nll).logsumexp(0)[m == 0])
        plain.append((math.log(draws) - (-nll).logsumexp(0))[m == 0])
    negative_elbo, iwae = torch.cat(bounds, -1).mean(-1).tolist()
    result = {"negative_elbo": negative_elbo, "iwae": iwae}
    if (mask == 0).any():
        result |= {"predicted": torch.cat(plain).mean().item(),
                   "weighted": torch.cat(weighted).mean().item()}  # fmt: skip
    return result


def train(
    data: str,
    missing: float,
    posterior: str,
    seed: int,
    steps: int = 1500,
    batch: int = 64,
    learning_rate: float = 2e-3,
    time_constant: float | tuple[float, float] = TIME_CONSTANT,
) -> dict:
    """Train on sequences whose frames go missing anew each time, and judge on 500 others.

    The prior's time constants start at `time_constant`, as `AR1Prior` takes it.

    Returns:
        What `judge` says at the end; time_constants, sorted; curve, -ELBO on the test sequences at
        four times in training (10 draws).
    """
    torch.manual_seed(seed)
    model = MovingVAE(posterior, CHANNELS[data], time_constant)
    own = [model.prior.log_time_constant]
    others = [p for p in model.parameters() if p is not own[0] and p.requires_grad]
    groups = [{"params": others, "lr": learning_rate}, {"params": own, "lr": 10 * learning_rate}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    frames, test = sequences(data, "train"), sequences(data, "test")
    hidden = frame_mask(len(test), missing, torch.Generator().manual_seed(3))
    fresh = torch.Generator().manual_seed(1000 + seed)
    curve = []
    for step in range(1, steps + 1):
        chosen = torch.randint(len(frames), (batch,), generator=fresh)
        mask = frame_mask(batch, missing, fresh)
        loss = model.negative_elbo(frames[chosen], mask).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(others, 100.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 4) == 0:
            curve.append(judge(model, test, hidden, draws=10)["negative_elbo"])
    constants = model.prior.time_constant.sort().values.tolist()
    return judge(model, test, hidden) | {"time_constants": constants, "curve": curve}
