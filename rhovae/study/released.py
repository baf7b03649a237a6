"""The models of the paper's Figures 3 to 5 as released. For the audit only.

Class by class (d = 10), with the names they have here:

| class        | architecture   | posterior           | scale of the draw   | m in the loss |
|--------------|----------------|---------------------|---------------------|---------------|
| BETAVAE      | `beta_cnn`     | `released-beta`     | free                | loc           |
| RHO_BETAVAE  | `beta_cnn`     | `released-rho-beta` | walk, s free        | the draw      |
| CNN_VAE      | `released_cnn` | `released-cnn`      | variance >= 0.02    | loc           |
| RHO_CNN_VAE  | `released_cnn` | `released-rho-cnn`  | walk, s free        | loc           |
| INFO_VAE     | `dcgan`        | `released-info`     | deviation >= 0.01   | the draw      |
| RHO_INFO_VAE | `dcgan`        | `released-rho-info` | walk, s >= 0.02     | the draw      |

The floors of the CNN pair came in at 05e1756 (2019-09-12 20:48), which also cut the driver script
down to this pair on Fashion-MNIST; at 8a62f4a, two hours before, it had run all 16 models. So the
curves of Figure 4 on MNIST are probably those of the pair without floors: `released-early-cnn` and
`released-early-rho-cnn`.

(VanillaVAE and RHO_VanillaVAE, Figure 1, are `mlp` with `diagonal` and `published-script`.) Every
posterior is a distribution that samples what the code samples, with its true log_prob and KL;
beside them stands what the code charges. All are trained by Adam at 1e-3 with the initialisation
"released".

Source: github.com/sssohrab/rho_VAE, models.py, utils.py and main.py at 66aa5c0 (2019).
"""

from math import ceil, inf, prod

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ..posteriors import PosteriorHead
from .networks import Bodies
from .published import PublishedNormal


class InfoNormal(Independent):
    """What INFO_VAE samples: N(loc, diag(v^2)), with v its floored output.

    The code takes v for the standard deviation where it draws, and for the variance where it
    charges; and it charges the draw z in the place of loc:

        1/2 sum_j (z_j^2 + v_j - log v_j - 1)

    Its mean over draws is below the KL by -1/2 sum_j (v_j + log v_j), which is positive for
    v_j < 0.567.

    Args:
        loc: (*batch, latent).
        v: (*batch, latent), standard deviation.
    """

    def __init__(self, loc: Tensor, v: Tensor):
        super().__init__(Normal(loc, v, validate_args=False), 1, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        """The same law as a plain Independent; what the code charges belongs to its own batch."""
        return super().expand(batch_shape, Independent.__new__(Independent))

    @property
    def location_kl(self) -> Tensor:
        """|loc|^2 / 2, shape (*batch,)."""
        return 0.5 * self.mean.square().sum(-1)

    @property
    def formula_kl(self) -> Tensor:
        """The KL of N(loc, diag(v)), which the code writes down, in nats, shape (*batch,)."""
        return self.location_kl + self._scale_kl

    def charged_kl(self, batch_size: int) -> Tensor:
        """Mean over draws of what the code charges, whatever the batch, shape (*batch,)."""
        return self.formula_kl + 0.5 * self.variance.sum(-1)

    def charge(self, z: Tensor) -> Tensor:
        """The KL term that the code puts into its loss for the draw z, shape (*batch,)."""
        return 0.5 * z.square().sum(-1) + self._scale_kl

    @property
    def _scale_kl(self) -> Tensor:
        v = self.stddev
        return 0.5 * (v - v.log() - 1).sum(-1)


def _random_walk(loc: Tensor, log_s: Tensor, fisher_z: Tensor, **settings) -> PublishedNormal:
    """The sampler of every rho class: rho is charged for, and does not occur in the draw."""
    return PublishedNormal(loc, log_s, fisher_z, forget_rho=True, epsilon=0.0, **settings)


def _diagonal(loc: Tensor, log_variance: Tensor) -> Distribution:
    normal = Normal(loc, torch.exp(0.5 * log_variance), validate_args=False)
    return Independent(normal, 1, validate_args=False)


class ReleasedBeta(nn.Module):
    """BETAVAE: one linear layer for all numbers, N(loc, diag(exp(log_variance)))."""

    def __init__(self, features: int, latent: int):
        super().__init__()
        self.latent = latent
        self.numbers = nn.Linear(features, 2 * latent)

    def forward(self, features: Tensor) -> Distribution:
        return _diagonal(*self.numbers(features).chunk(2, -1))


class ReleasedRhoBeta(nn.Module):
    """RHO_BETAVAE: one linear layer for all numbers; the draw is charged in the place of loc."""

    def __init__(self, features: int, latent: int):
        super().__init__()
        self.latent = latent
        self.numbers = nn.Linear(features, latent + 2)

    def forward(self, features: Tensor) -> PublishedNormal:
        loc, fisher_z, log_s = self.numbers(features).split((self.latent, 1, 1), -1)
        return _random_walk(loc, log_s, fisher_z, charge_draw=True)


class ReleasedInfo(PosteriorHead):
    """INFO_VAE: a linear output, no less than 0.01, is both standard deviation and variance."""

    floor: float | None = 0.01

    def __init__(self, features: int, latent: int):
        super().__init__(features, latent)
        self.v = nn.Linear(features, latent)

    def forward(self, features: Tensor) -> InfoNormal:
        return InfoNormal(self.loc(features), self.v(features).clamp(min=self.floor))


class ReleasedRhoInfo(PosteriorHead):
    """RHO_INFO_VAE: s is a linear output, no less than 0.02; the draw is charged for loc."""

    floor: float | None = 0.02

    def __init__(self, features: int, latent: int):
        super().__init__(features, latent)
        self.s = nn.Linear(features, 1)
        self.fisher_z = nn.Linear(features, 1)

    def forward(self, features: Tensor) -> PublishedNormal:
        log_s = self.s(features).clamp(min=self.floor).log()
        return _random_walk(self.loc(features), log_s, self.fisher_z(features), charge_draw=True)


class ReleasedCNN(nn.Module):
    """CNN_VAE: a trunk of its own for loc and for the variance, which is no less than 0.02.

    Without a floor (None) the second trunk gives the log-variance.
    """

    floor: float | None = 0.02
    hidden = 1024

    def __init__(self, features: int, latent: int):
        super().__init__()
        self.latent = latent
        self.loc = _trunk(features, self.hidden, latent)
        self.spread = _trunk(features, self.hidden, latent)

    def forward(self, features: Tensor) -> Distribution:
        spread = self.spread(features)
        log_variance = spread if self.floor is None else spread.clamp(min=self.floor).log()
        return _diagonal(self.loc(features), log_variance)


class EarlyCNN(ReleasedCNN):
    """CNN_VAE from 6f88de4 until 05e1756."""

    floor = None


class _FlooredLog(nn.Module):
    def __init__(self, floor: float):
        super().__init__()
        self.floor = floor

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=self.floor).log()


class ReleasedRhoCNN(nn.Module):
    """RHO_CNN_VAE: three trunks. Floor and logarithm act on hidden units; log s itself is free.

    Without a floor (None) there is no logarithm either.
    """

    floor: float | None = 0.02
    hidden = 1024

    def __init__(self, features: int, latent: int):
        super().__init__()
        self.latent = latent
        self.loc = _trunk(features, self.hidden, latent)
        between = () if self.floor is None else (_FlooredLog(self.floor),)
        self.log_s = _trunk(features, self.hidden, 1, *between)
        self.fisher_z = _trunk(features, self.hidden, 1)

    def forward(self, features: Tensor) -> PublishedNormal:
        return _random_walk(self.loc(features), self.log_s(features), self.fisher_z(features))


class EarlyRhoCNN(ReleasedRhoCNN):
    """RHO_CNN_VAE from 6f88de4 until 05e1756."""

    floor = None


def _trunk(features: int, hidden: int, outputs: int, *between: nn.Module) -> nn.Sequential:
    first, last = nn.Linear(features, hidden), nn.Linear(hidden, outputs)
    return nn.Sequential(first, nn.ELU(), *between, last)


def released_cnn(image_shape: tuple[int, ...], latent: int, dense: int = 1024) -> Bodies:
    """CNN_VAE: two 4x4 convolutions with stride 2 and a padding of 15, so that 28 pixels stay 28.

    Their 100,352 features go into the trunks of the head, of 103 million parameters each.
    """
    channels, height, width = image_shape
    if (height, width) != (28, 28):
        raise ValueError(
            f"The network released_cnn takes images of 28x28 pixels, but these have "
            f"{height}x{width}; set image_size=28 to have them resized."
        )
    encoder = nn.Sequential(
        *(nn.Conv2d(channels, 64, 4, 2, 15), nn.ELU()),
        *(nn.Conv2d(64, 128, 4, 2, 15), nn.ELU(), nn.Flatten()),
    )
    inner = (128, 7, 7)
    decoder = nn.Sequential(
        *(nn.Linear(latent, dense), nn.ELU()),
        *(nn.Linear(dense, prod(inner)), nn.ELU(), nn.Unflatten(-1, inner)),
        *(nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU()),
        nn.ConvTranspose2d(64, channels, 4, 2, 1),
    )
    return Bodies(encoder, 128 * 28 * 28, decoder)


def initialise_batch_norm(module: nn.Module) -> None:
    """Weights uniform in [0, 1], as torch drew them up to 1.1; since 1.2 they are 1.

    The released code sets none, so that they are those of the torch of its day.
    """
    if isinstance(module, nn.BatchNorm2d):
        nn.init.uniform_(module.weight)


def as_reported(loss: float, images: int, batch_size: int = 128) -> float:
    """A mean loss per image as the code reports it: every batch counts as a whole one.

    10,000 test images make 79 batches of 128, and the sum of their losses is divided by 10,112.
    """
    return loss * images / (ceil(images / batch_size) * batch_size)


def rate_drops(test_losses: list[float], patience: int = 10, threshold: float = 1e-4) -> list[int]:
    """The epochs after which the code divides its learning rate by ten: in 15, none at all.

    main.py steps a ReduceLROnPlateau("min") with its defaults after every epoch. It acts after
    `patience` + 1 epochs in a row that do not improve the best test loss by a factor of
    1 - `threshold`. So in 15 epochs it can act before the last one only if the fourth and all
    later ones are no better than one of the first three.

    Args:
        test_losses: one per epoch.
        patience, threshold: torch's defaults.
    """
    best, waited, drops = inf, 0, []
    for epoch, loss in enumerate(test_losses, start=1):
        if loss < best * (1 - threshold):
            best, waited = loss, 0
        else:
            waited += 1
        if waited > patience:
            waited = 0
            drops.append(epoch)
    return drops


RELEASED_POSTERIORS = {
    "released-beta": ReleasedBeta,
    "released-rho-beta": ReleasedRhoBeta,
    "released-cnn": ReleasedCNN,
    "released-rho-cnn": ReleasedRhoCNN,
    "released-early-cnn": EarlyCNN,
    "released-early-rho-cnn": EarlyRhoCNN,
    "released-info": ReleasedInfo,
    "released-rho-info": ReleasedRhoInfo,
}
RELEASED_NETWORKS = {"released_cnn": released_cnn}
