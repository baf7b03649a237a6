"""The released models of Figures 3 to 5 against a literal transcription of each class."""

import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from rhovae.objectives import standard_normal_like
from rhovae.study import Experiment, run_experiment
from rhovae.study.evaluation import evaluate
from rhovae.study.experiments import build_objective, build_vae
from rhovae.study.released import (
    InfoNormal,
    ReleasedCNN,
    ReleasedInfo,
    ReleasedRhoCNN,
    ReleasedRhoInfo,
    as_reported,
    rate_drops,
)

ROOT = Path(__file__).resolve().parents[2]
LATENT = 10
NETWORKS = {"beta": "beta_cnn", "cnn": "released_cnn", "info": "dcgan"}
EARLY = ["released-early-cnn", "released-early-rho-cnn"]
POSTERIORS = [f"released-{rho}{name}" for name in NETWORKS for rho in ("", "rho-")] + EARLY
CHARGES_THE_MEAN = ["released-beta", "released-cnn", "released-rho-cnn", *EARLY]
CHARGES_ANOTHER = [p for p in POSTERIORS if "rho" in p or p == "released-info"]


def experiment(posterior, **settings):
    name = posterior.rpartition("-")[2]
    size = {"image_size": 64} if name == "beta" else {}
    return Experiment(**(
        dict(dataset="mnist", architecture=NETWORKS[name], posterior=posterior, latent=LATENT,
             initialisation="released") | size | settings
    ))  # fmt: skip


@pytest.fixture
def narrow(monkeypatch):
    """CNN_VAE with trunks of 8 hidden units in the place of 1,024."""
    for head in (ReleasedCNN, ReleasedRhoCNN):
        monkeypatch.setattr(head, "hidden", 8)


def make(posterior, seed=0):
    """A model in evaluation mode whose biases and running statistics are no longer 0 and 1."""
    vae = build_vae(experiment(posterior, seed=seed), image_shape(posterior)).double().eval()
    for parameter in vae.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape))  # whatever its layout in memory
    for module in vae.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return vae


def image_shape(posterior):
    return (1, 64, 64) if posterior.endswith("beta") else (1, 28, 28)


# The transcription. It takes the weights of a model and nothing else: kernels, strides, paddings,
# activations and the order of layers are written down here once more.


def weighted(module):
    return iter(
        [m for m in module.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    )


def convolve(layer, x, stride, padding):
    return F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=padding)


def transpose(layer, x, stride, padding):
    return F.conv_transpose2d(x, layer.weight, layer.bias, stride=stride, padding=padding)


def affine(layer, x):
    return x @ layer.weight.T + layer.bias


def normalise(layer, x):
    x = (x - layer.running_mean[:, None, None]) / (layer.running_var[:, None, None] + 1e-5).sqrt()
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


def encode_beta(vae, x):
    layer = weighted(vae.encoder)
    for _ in range(4):
        x = F.relu(convolve(next(layer), x, 2, 1))
    x = F.relu(convolve(next(layer), x, 1, 0))
    assert x.shape[1:] == (256, 1, 1)
    return affine(vae.posterior.numbers, x.reshape(-1, 256))


def encode_info(vae, x):
    layer = weighted(vae.encoder)
    for stride in (2, 1, 2, 1):  # kernels 4, 3, 4, 3
        x = F.relu(convolve(next(layer), x, stride, 1))
        x = normalise(next(layer), x)
    assert x.shape[1:] == (128, 7, 7)
    return affine(next(layer), x.reshape(len(x), -1))


def encode_cnn(vae, x):
    layer = weighted(vae.encoder)
    x = F.elu(convolve(next(layer), x, 2, 15))
    x = F.elu(convolve(next(layer), x, 2, 15))
    assert x.shape[1:] == (128, 28, 28)
    return x.reshape(len(x), -1)


def numbers(posterior, vae, x):
    """(loc, log-variance as the loss takes it) or (loc, rho, log s)."""
    head = vae.posterior
    if posterior == "released-beta":
        out = encode_beta(vae, x)
        return out[:, :LATENT], out[:, LATENT:]
    if posterior == "released-rho-beta":
        out = encode_beta(vae, x)
        return out[:, :LATENT], out[:, LATENT : LATENT + 1].tanh(), out[:, LATENT + 1 :]
    if posterior == "released-info":
        h = encode_info(vae, x)
        return affine(head.loc, h), affine(head.v, h).clamp(min=0.01).log()
    if posterior == "released-rho-info":
        h = encode_info(vae, x)
        rho, log_s = affine(head.fisher_z, h).tanh(), affine(head.s, h).clamp(min=0.02).log()
        return affine(head.loc, h), rho, log_s
    h = encode_cnn(vae, x)
    first, last = zip(*((trunk[0], trunk[-1]) for trunk in head.children()), strict=True)
    hidden = [F.elu(affine(layer, h)) for layer in first]
    if posterior == "released-early-cnn":
        return affine(last[0], hidden[0]), affine(last[1], hidden[1])
    if posterior == "released-cnn":
        return affine(last[0], hidden[0]), affine(last[1], hidden[1]).clamp(min=0.02).log()
    middle = hidden[1] if "early" in posterior else hidden[1].clamp(min=0.02).log()
    log_s = affine(last[1], middle)
    return affine(last[0], hidden[0]), affine(last[2], hidden[2]).tanh(), log_s


def draw(posterior, noise, loc, *rest):
    if "rho" in posterior:
        log_s = rest[1]
        z = [noise[..., :1] * log_s.exp().sqrt()]
        for j in range(1, LATENT):
            z.append(z[-1] + noise[..., j : j + 1] * log_s.exp().sqrt())
        return loc + torch.cat(z, -1)
    log_variance = rest[0]
    deviation = log_variance.exp() if posterior == "released-info" else (log_variance / 2).exp()
    return loc + deviation * noise


def decode(posterior, vae, z):
    layer = weighted(vae.decoder)
    if posterior.endswith("beta"):
        x = F.relu(affine(next(layer), z)).reshape(-1, 256, 1, 1)
        x = F.relu(transpose(next(layer), x, 1, 0))
        for _ in range(3):
            x = F.relu(transpose(next(layer), x, 2, 1))
        return transpose(next(layer), x, 2, 1).sigmoid()
    if posterior.endswith("cnn"):
        x = F.elu(affine(next(layer), z))
        x = F.elu(affine(next(layer), x)).reshape(-1, 128, 7, 7)
        x = F.relu(transpose(next(layer), x, 2, 1))
        return transpose(next(layer), x, 2, 1).sigmoid()
    x = F.relu(affine(next(layer), z))
    x = F.relu(affine(next(layer), x)).reshape(-1, 128, 7, 7)
    for stride in (2, 1, 2):  # kernels 4, 3, 4
        x = F.relu(transpose(next(layer), x, stride, 1))
        x = normalise(next(layer), x)
    return transpose(next(layer), x, 1, 1).sigmoid()


def batch_total(posterior, x, x_hat, z, loc, *rest):
    """The number that the code minimises for a batch: not divided by anything."""
    cross_entropy = F.binary_cross_entropy(x_hat, x, reduction="sum")
    m = loc if posterior in CHARGES_THE_MEAN else z
    if "rho" not in posterior:
        v = rest[0]
        return cross_entropy - 0.5 * (1 + v - m**2 - v.exp()).sum()
    rho, log_s = rest
    inside = (m**2).sum() - LATENT * log_s - (LATENT - 1) * torch.log(1 - rho**2)
    return cross_entropy + (0.5 * (inside + LATENT * (log_s.exp() - 1))).mean()


def transcription(posterior, vae, x, noise):
    parameters = numbers(posterior, vae, x)
    z = draw(posterior, noise, *parameters)
    x_hat = decode(posterior, vae, z)
    return parameters, z, x_hat, batch_total(posterior, x, x_hat, z, *parameters)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_forward_draw_and_loss_are_those_of_the_class(posterior, narrow):
    vae = make(posterior)
    x = torch.rand(3, *image_shape(posterior))
    torch.manual_seed(1)
    noise = torch.randn(3, LATENT)
    parameters, z, x_hat, total = transcription(posterior, vae, x, noise)
    torch.manual_seed(1)
    q, ours, logits = vae(x)
    exact = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.mean, parameters[0], **exact)
    torch.testing.assert_close(ours, z, **exact)
    torch.testing.assert_close(logits.sigmoid(), x_hat, **exact)
    terms = build_objective(experiment(posterior))(q, ours, logits, x)
    torch.testing.assert_close(terms.loss.sum(), total, **exact)
    # The gradients are those of the code too: nothing is detached, or clamped on another side.
    weights = list(vae.parameters())
    expected, found = (torch.autograd.grad(loss, weights) for loss in (total, terms.loss.sum()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_true_density_and_kl_are_those_of_the_draw(posterior, narrow):
    vae = make(posterior, seed=1)
    parameters = [
        p.detach() for p in numbers(posterior, vae, torch.rand(4, *image_shape(posterior)))
    ]
    torch.manual_seed(3)
    # Away from where a new model is: other scales for each image, and strong correlations.
    parameters[0] = torch.randn(4, LATENT)
    if "rho" in posterior:
        parameters[1], parameters[2] = torch.rand(4, 1) * 1.9 - 0.95, torch.randn(4, 1)
    else:
        parameters[1] = torch.randn(4, LATENT)
    q = distribution(posterior, *parameters)
    jacobian = draw(posterior, torch.eye(LATENT)[:, None], *parameters) - parameters[0]
    covariance = torch.einsum("kbi,kbj->bij", jacobian, jacobian)
    dense = MultivariateNormal(parameters[0], covariance)
    prior = MultivariateNormal(torch.zeros(LATENT), torch.eye(LATENT))
    z = torch.randn(5, 4, LATENT)
    exact = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.log_prob(z), dense.log_prob(z), **exact)
    kl = kl_divergence(q, standard_normal_like(q.mean))
    torch.testing.assert_close(kl, kl_divergence(dense, prior), **exact)


def distribution(posterior, loc, *rest):
    """The head's distribution for given numbers, by a head that passes its features on."""
    build = {"released-info": lambda: InfoNormal(loc, rest[0].exp())}
    if posterior in build:
        return build[posterior]()
    vae = build_vae(experiment(posterior), image_shape(posterior))
    head = vae.posterior
    if posterior.endswith("beta"):
        head.numbers = nn.Identity()
        raw = (loc, rest[0]) if len(rest) == 1 else (loc, rest[0].atanh(), rest[1])
        return head(torch.cat(raw, -1))
    given = {
        "released-cnn": ("spread", rest[0].exp()),
        "released-early-cnn": ("spread", rest[0]),
        "released-rho-cnn": ("log_s", rest[-1]),
        "released-early-rho-cnn": ("log_s", rest[-1]),
        "released-rho-info": ("s", rest[-1].exp()),
    }
    outputs = {"loc": loc, given[posterior][0]: given[posterior][1]}
    if len(rest) == 2:
        outputs["fisher_z"] = rest[0].atanh()
    for name, value in outputs.items():
        setattr(head, name, Given(value))
    return head(torch.zeros(4, 1))


class Given(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, features):
        return self.value


@pytest.mark.parametrize("posterior", CHARGES_ANOTHER)
def test_the_charge_has_the_mean_over_draws_that_is_stated(posterior, narrow, draws=20_000):
    torch.manual_seed(2)
    batch = 4  # of the distributions that `distribution` makes
    loc, scale = torch.randn(batch, LATENT), torch.randn(batch, LATENT) / 2
    rest = (scale,) if "rho" not in posterior else (scale[:, :1].tanh(), scale[:, 1:2])
    q = distribution(posterior, loc, *rest)
    charges = torch.stack([q.charge(z) for z in q.sample((draws,))])
    standard_error = charges.std(0) / draws**0.5
    difference = (charges.mean(0) - q.charged_kl(batch)).abs()
    assert (difference <= 4 * standard_error + 1e-9).all(), (difference, standard_error)
    assert (charges.std(0) > 1e-9).all() == (posterior not in CHARGES_THE_MEAN)


def test_the_info_baseline_charges_less_than_its_kl_by_what_is_stated():
    v = torch.tensor([[0.01, 0.1, 0.567, 1.0, 2.0]])
    q = InfoNormal(torch.randn(1, 5), v)
    missing = kl_divergence(q, standard_normal_like(q.mean)) - q.charged_kl(1)
    torch.testing.assert_close(missing, -0.5 * (v + v.log()).sum(-1))
    assert -(0.01 + math.log(0.01)) / 2 == pytest.approx(2.2976, abs=1e-4)
    assert abs(0.567 + math.log(0.567)) < 1e-3  # where the sign changes
    z = torch.randn(3, 1, 5)
    torch.testing.assert_close(q.expand((3, 1)).log_prob(z), q.log_prob(z))


@pytest.mark.parametrize("head, floor", [(ReleasedInfo, 0.01), (ReleasedRhoInfo, 0.02),
                                         (ReleasedCNN, 0.02)])  # fmt: skip
def test_the_floor_holds_from_below_only_and_stops_the_gradient(head, floor):
    features = torch.tensor([[-3.0], [floor / 2], [floor * 2], [50.0]])
    layer = head(1, LATENT)
    raw = {ReleasedInfo: "v", ReleasedRhoInfo: "s", ReleasedCNN: "spread"}[head]
    setattr(layer, raw, nn.Linear(1, 1 if head is ReleasedRhoInfo else LATENT))
    linear = getattr(layer, raw)
    nn.init.ones_(linear.weight), nn.init.zeros_(linear.bias)
    features.requires_grad_()
    layer.loc = Given(torch.zeros(4, LATENT))
    if head is ReleasedRhoInfo:
        layer.fisher_z = Given(torch.zeros(4, 1))
    q = layer(features)
    number = {ReleasedInfo: lambda: q.stddev[:, 0], ReleasedCNN: lambda: q.variance[:, 0],
              ReleasedRhoInfo: lambda: q.log_s[:, 0].exp()}[head]()  # fmt: skip
    torch.testing.assert_close(number, torch.tensor([floor, floor, 2 * floor, 50.0]))
    (gradient,) = torch.autograd.grad(number.sum(), features)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_in_the_rho_cnn_the_floor_acts_on_hidden_units_and_the_scale_is_free(monkeypatch):
    monkeypatch.setattr(ReleasedRhoCNN, "hidden", 2)
    head = ReleasedRhoCNN(2, LATENT)
    first, last = head.log_s[0], head.log_s[-1]
    first.weight.data, first.bias.data = torch.eye(2), torch.zeros(2)
    last.weight.data, last.bias.data = torch.tensor([[3.0, 1.0]]), torch.zeros(1)
    log_s = head(torch.tensor([[-1.0, 5.0], [0.5, -0.1]])).log_s
    expected = [3 * math.log(0.02) + math.log(5), 3 * math.log(0.5) + math.log(0.02)]
    torch.testing.assert_close(log_s, torch.tensor(expected)[:, None])
    assert (log_s < math.log(0.02)).all()


PARAMETERS = {  # weights and biases, layer by layer, for 10 latent variables
    "released-info": 2 * (1024 * 10 + 10),
    "released-rho-info": 1024 * 10 + 10 + 2 * (1024 + 1),
    "released-beta": 257 * 20,
    "released-rho-beta": 257 * 12,
    "released-cnn": 2 * (100352 * 1024 + 1024 + 1024 * 10 + 10),
    "released-rho-cnn": 3 * (100352 * 1024 + 1024) + 1024 * 10 + 10 + 2 * 1025,
}


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_counts_of_parameters(posterior):
    with torch.device("meta"):
        vae = build_vae(experiment(posterior), image_shape(posterior))
    dense = 11 * 1024 + 1025 * 6272
    bodies = {
        "info": (64 * 17 + 64 * (64 * 9 + 1) + 128 * (64 * 16 + 1) + 128 * (128 * 9 + 1)
                 + 2 * (64 + 64 + 128 + 128) + 1024 * 6273
                 + dense + 128 * 64 * 16 + 64 + 64 * 64 * 9 + 64 + 64 * 32 * 16 + 32
                 + 2 * (64 + 64 + 32) + 32 * 9 + 1),
        "beta": (32 * 17 + 32 * 513 + 64 * 513 + 64 * 1025 + 256 * 1025
                 + 256 * 11 + 64 * 4097 + 64 * 1025 + 32 * 1025 + 32 * 513 + 513),
        "cnn": 64 * 17 + 128 * 1025 + dense + 128 * 64 * 16 + 64 + 64 * 16 + 1,
    }  # fmt: skip
    expected = bodies[posterior.rpartition("-")[2]] + PARAMETERS[posterior.replace("early-", "")]
    assert sum(p.numel() for p in vae.parameters()) == expected


def test_initialisation_is_that_of_the_code_with_the_torch_of_its_day():
    def build(initialisation):
        return build_vae(experiment("released-info", initialisation=initialisation), (1, 28, 28))

    vae, default = build("released"), build("torch")
    norms, transposed = [], 0
    for ours, torchs in zip(vae.modules(), default.modules(), strict=True):
        if isinstance(ours, nn.Linear | nn.Conv2d):
            fan_in, fan_out = (s * ours.weight[0, 0].numel() for s in ours.weight.shape[1::-1])
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert 0.95 * bound < ours.weight.abs().max() <= bound and not ours.bias.any()
        elif isinstance(ours, nn.ConvTranspose2d):
            assert torch.equal(ours.weight, torchs.weight) and torch.equal(ours.bias, torchs.bias)
            transposed += 1
        elif isinstance(ours, nn.BatchNorm2d):
            assert not ours.bias.any() and torch.equal(torchs.weight, torch.ones(len(ours.bias)))
            norms.append(ours.weight.detach())
    norms = torch.cat(norms)
    assert transposed == 4 and len(norms) == 544 and 0 <= norms.min() and norms.max() <= 1
    standard_error = len(norms) ** -0.5  # of mean and variance of a uniform, generously
    assert abs(norms.mean() - 1 / 2) < standard_error
    assert abs(norms.var() - 1 / 12) < standard_error


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_reported_test_loss_counts_every_batch_as_a_whole_one(posterior, narrow):
    vae, batch = make(posterior), 8
    images = torch.randint(0, 256, (2 * batch + 3, *image_shape(posterior)), dtype=torch.uint8)
    torch.manual_seed(4)
    total = 0.0
    for part in images.split(batch):
        x, noise = part / 255, torch.randn(len(part), LATENT)
        total += transcription(posterior, vae, x, noise)[-1].item() / batch
    torch.manual_seed(4)
    vae = _in_double(vae)
    means, _ = evaluate(vae, images, build_objective(experiment(posterior)), batch)
    assert as_reported(means["loss"], len(images), batch) == pytest.approx(total / 3, rel=1e-6)


def _in_double(vae):
    vae.encoder = nn.Sequential(_Double(), vae.encoder)
    return vae


class _Double(nn.Module):
    def forward(self, x):
        return x.double()


def test_ten_thousand_images_are_divided_by_10112():
    assert as_reported(1.0, 10_000) == 10_000 / 10_112


def test_the_learning_rate_falls_where_torch_lets_it_fall():
    generator = torch.Generator().manual_seed(0)
    fell = 0
    for _ in range(100):
        losses = torch.randn(40, generator=generator).tolist()
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min")
        expected = []
        for epoch, loss in enumerate(losses, start=1):
            before = optimizer.param_groups[0]["lr"]
            plateau.step(loss)
            if optimizer.param_groups[0]["lr"] < before:
                expected.append(epoch)
        assert rate_drops(losses) == expected
        fell += len(expected)
    assert fell
    # Within 15 epochs it can act before the last one only after an early best.
    assert rate_drops([3, 2, 1] + [2] * 12) == [14]
    assert rate_drops([4, 3, 2, 1] + [2] * 11) == [15]


def test_the_learning_rate_of_the_published_curves_never_fell():
    curves = {}
    with (ROOT / "data/published_curves.csv").open() as file:
        for row in csv.DictReader(file):
            key = (row["figure"], row["dataset"], row["posterior"])
            curves.setdefault(key, []).append(float(row["test_loss"]))
    assert len(curves) == 18
    assert not any(rate_drops(curve) for curve in curves.values())


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_runs_from_names_to_record(posterior, narrow):
    train, test = (torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8) for n in (20, 12))
    settings = dict(dataset="noise", source="own", epochs=1, batch_size=8, iwae_samples=2,
                    iwae_images=4)  # fmt: skip
    record = run_experiment(
        experiment(posterior, **settings), train=train, test=test, progress=False
    )
    assert record["experiment"]["objective"] == "as-published"
    charged = record["test"]["loss"] - record["test"]["reconstruction"]
    if posterior in CHARGES_ANOTHER:
        parts = record["published"]
        assert parts["kl_true"] == pytest.approx(record["test"]["kl"], rel=1e-4)
        assert ("rho" in parts) == ("rho" in posterior)
        assert charged != pytest.approx(record["test"]["kl"], rel=1e-3)
        assert parts["location"] <= parts["kl_charged"]
    else:
        assert "published" not in record
        assert charged == pytest.approx(record["test"]["kl"], rel=1e-4, abs=1e-3)


def test_the_network_of_figure_4_takes_28_pixels_only():
    with pytest.raises(ValueError, match="28x28 pixels, but these have 64x64"):
        build_vae(experiment("released-cnn"), (1, 64, 64))
