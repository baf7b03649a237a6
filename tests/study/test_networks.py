"""Networks with every posterior, the models built of them, and their evaluation."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from rhovae import POSTERIORS, VAE
from rhovae.objectives import bernoulli_nll, negative_elbo
from rhovae.study.evaluation import evaluate, inference_gaps, iwae_nll
from rhovae.study.experiments import Experiment, build_vae
from rhovae.study.networks import NETWORKS
from rhovae.study.published import PUBLISHED_POSTERIORS

HEADS = POSTERIORS | PUBLISHED_POSTERIORS  # those of Figures 3 to 5: test_released.py
SHAPE = (1, 6, 5)


def small_vae(posterior="ar1", latent=3):
    bodies = NETWORKS["mlp"](SHAPE, latent, hidden=8)
    head = HEADS[posterior](bodies.features, latent)
    return VAE(bodies.encoder, head, bodies.decoder)


SHAPES = {"mlp": SHAPE, "cnn": (1, 8, 12), "dcgan": (3, 8, 4), "beta_cnn": (1, 64, 64),
          "rows": (3, 7, 4), "tanh_mlp": SHAPE}  # fmt: skip


@pytest.mark.parametrize("posterior", HEADS)
@pytest.mark.parametrize("latent", [1, 2, 7])
def test_every_head_fits_every_network(posterior, latent):
    assert set(SHAPES) == set(NETWORKS)
    torch.set_default_dtype(torch.float32)
    for network, shape in SHAPES.items() if latent == 7 else [("mlp", SHAPE)]:
        bodies = NETWORKS[network](shape, latent)
        head = HEADS[posterior](bodies.features, latent)
        vae = VAE(bodies.encoder, head, bodies.decoder)
        x = torch.rand(4, *shape)
        q, z, logits = vae(x)
        assert q.batch_shape == (4,) and q.event_shape == (latent,) and z.shape == (4, latent)
        assert logits.shape == x.shape and vae.generate(2).shape == (2, *shape)
        negative_elbo(q, z, logits, x).loss.mean().backward()
        # A single latent variable has no neighbour, so nothing depends on rho.
        unused = {"posterior.fisher_z", "posterior.below"} if latent == 1 else set()
        if posterior == "published-script":
            unused |= {"posterior.fisher_z"}
        for name, parameter in vae.named_parameters():
            no_gradient = parameter.grad is None or not parameter.grad.any()
            assert no_gradient == (name.rpartition(".")[0] in unused), name


def test_the_decoder_of_rows_is_local_and_the_same_for_each_row():
    """A latent variable reaches two rows up and down, and moving all of them moves the image."""
    decoder = NETWORKS["rows"]((1, 12, 5), 12).decoder
    z = torch.randn(2, 12)
    other = z.clone()
    other[:, 6] += 1
    changed = (decoder(z) != decoder(other)).any(-1).any(1)
    assert changed.tolist() == [[4 <= row <= 8 for row in range(12)]] * 2
    moved = decoder(z.roll(1, -1))
    torch.testing.assert_close(moved[..., 4:9, :], decoder(z)[..., 3:8, :])


def test_the_mlp_is_the_papers():
    vae = build_vae(Experiment("mnist", posterior="diagonal", latent=5), (1, 28, 28))
    weights = [tuple(p.shape) for name, p in vae.named_parameters() if name.endswith("weight")]
    assert weights == [(400, 784), (5, 400), (5, 400), (400, 5), (784, 400)]


def test_the_tanh_mlp_is_that_of_burda_and_others():
    experiment = Experiment("mnist", architecture="tanh_mlp", posterior="diagonal", latent=50)
    vae = build_vae(experiment, (1, 28, 28))
    weights = [tuple(p.shape) for name, p in vae.named_parameters() if name.endswith("weight")]
    assert weights[:4] == [(200, 784), (200, 200), (50, 200), (50, 200)]
    assert weights[4:] == [(200, 50), (200, 200), (784, 200)]
    kinds = [type(m) for m in (*vae.encoder, *vae.decoder) if not isinstance(m, nn.Linear)]
    assert kinds == [nn.Flatten, *4 * [nn.Tanh], nn.Unflatten]


def test_xavier_touches_linear_layers_only():
    vae = build_vae(Experiment("mnist", initialisation="xavier"), SHAPE)
    linear = vae.encoder[1]
    bound = math.sqrt(6 / (linear.in_features + linear.out_features))
    assert not linear.bias.any() and 0.98 * bound < linear.weight.abs().max() <= bound


def test_evaluation_averages_over_all_images():
    torch.set_default_dtype(torch.float32)
    vae = small_vae()
    images = torch.randint(0, 256, (25, *SHAPE), dtype=torch.uint8)
    values = []
    for batch_size in (1, 10, 100):
        means, rho = evaluate(vae, images, negative_elbo, batch_size)
        assert -1 < rho < 1
        assert means["negative_elbo"] == means["reconstruction"] + means["kl"]
        values.append(means["kl"])
    assert max(values) - min(values) < 1e-5
    assert evaluate(small_vae("diagonal"), images, negative_elbo)[1] is None
    assert math.isfinite(iwae_nll(vae, images, samples=10, batch_size=7))


@pytest.mark.parametrize(
    "name,shape,sentence",
    [
        ("cnn", (1, 30, 28), "cnn takes images .* divisible by 4, but these have 30x28; resize"),
        ("dcgan", (1, 28, 27), "dcgan takes images .* divisible by 4, but these have 28x27"),
        ("rows", (1, 28, 28), "one latent variable per row, but latent is .* set latent=28"),
        ("beta_cnn", (1, 28, 28), "takes images of 64x64 pixels, .* 28x28; set image_size=64"),
    ],
)
def test_a_network_that_does_not_fit_the_images_says_so(name, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        NETWORKS[name](shape, 5)


def best_by_quadrature(vae, x):
    """min over mean and variance of -ELBO with one latent variable, and -log p(x): no draws."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    numbers = torch.zeros(2, len(x), 1).to(x).requires_grad_()

    def negative_elbo_each():
        q = Normal(numbers[0], (0.5 * numbers[1]).exp())
        logits = vae.decoder((q.mean + q.stddev * nodes).reshape(-1, 1)).unflatten(0, (len(x), -1))
        reconstruction = bernoulli_nll(logits.transpose(0, 1), x).T @ weights
        return reconstruction + kl_divergence(q, Normal(0.0, 1.0)).squeeze(-1)

    optimizer = torch.optim.LBFGS([numbers], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = negative_elbo_each().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    grid = torch.linspace(-8, 8, 2001).to(x).unsqueeze(-1)
    logits = vae.decoder(grid).unsqueeze(1).expand(-1, len(x), *x.shape[1:])
    prior = Normal(0.0, 1.0).log_prob(grid) + math.log(16 / 2000)
    nll = -(prior - bernoulli_nll(logits, x)).logsumexp(0)
    return negative_elbo_each().mean().item(), nll.mean().item()


def test_inference_gaps_find_the_best_posterior_of_each_image(float32):
    """One latent variable, against quadrature; every family is then the same."""
    torch.manual_seed(3)
    vae = small_vae("diagonal", 1)
    with torch.no_grad():
        vae.decoder[0].weight.mul_(4)  # images that say something about z
    images = torch.randint(0, 256, (24, *SHAPE), dtype=torch.uint8)
    best, nll = best_by_quadrature(copy.deepcopy(vae).double(), images.double() / 255)
    gaps = inference_gaps(vae, images, steps=250, learning_rate=0.06, samples=16)
    assert list(gaps) == ["encoder", *POSTERIORS]
    assert gaps["encoder"]["negative_elbo"] > best + 0.2 and nll < best - 0.001
    for name in POSTERIORS:
        assert gaps[name]["negative_elbo"] == pytest.approx(best, abs=0.02), name
        assert gaps[name]["nll"] == pytest.approx(nll, abs=0.02), name
        parts = gaps[name]["reconstruction"] + gaps[name]["kl"]
        assert parts == pytest.approx(gaps[name]["negative_elbo"])


def test_inference_gaps_see_a_correlation_that_the_decoder_asks_for(float32):
    """A decoder of the sum of two variables: their posterior is correlated, and variances alike."""
    torch.manual_seed(0)
    vae = small_vae("diagonal", 2)
    decoder = nn.Linear(2, math.prod(SHAPE))
    with torch.no_grad():
        decoder.weight.copy_(torch.linspace(-1, 1, 30).unsqueeze(-1).expand(-1, 2))
    vae.decoder = nn.Sequential(decoder, nn.Unflatten(-1, SHAPE))
    before = [p.clone() for p in vae.parameters()]
    images = torch.randint(0, 256, (5, *SHAPE), dtype=torch.uint8)
    gaps = {name: g["negative_elbo"] for name, g in inference_gaps(vae, images).items()}
    for name in ("ar1", "ar1-scaled", "ar1-stepped", "low-rank", "full"):
        assert gaps[name] < gaps["diagonal"] - 0.15, name
        assert gaps[name] == pytest.approx(gaps["full"], abs=0.02), name
    assert gaps["isotropic"] == pytest.approx(gaps["diagonal"], abs=0.02)
    assert all(map(torch.equal, before, vae.parameters()))
    assert all(p.grad is None for p in vae.parameters())
