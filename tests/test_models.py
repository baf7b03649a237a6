"""Posterior heads, networks, the VAE and its objectives."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Laplace, MultivariateNormal, Normal, kl_divergence

from rhovae import POSTERIORS, VAE, AR1Normal
from rhovae.objectives import (
    KERNELS,
    bernoulli_nll,
    beta_elbo,
    importance_weighted_nll,
    info_vae,
    negative_elbo,
    squared_mmd,
    standard_normal_like,
)
from rhovae.study.evaluation import evaluate, inference_gaps, iwae_nll
from rhovae.study.experiments import ALL_POSTERIORS, Experiment, build_vae
from rhovae.study.networks import NETWORKS, count_parameters

SHAPE = (1, 6, 5)


def small_vae(posterior="ar1", latent=3):
    bodies = NETWORKS["mlp"](SHAPE, latent, hidden=8)
    head = ALL_POSTERIORS[posterior](bodies.features, latent)
    return VAE(bodies.encoder, head, bodies.decoder)


SHAPES = {"mlp": SHAPE, "cnn": (1, 8, 12), "dcgan": (3, 8, 4), "beta_cnn": (1, 64, 64),
          "rows": (3, 7, 4)}  # fmt: skip


@pytest.mark.parametrize("posterior", ALL_POSTERIORS)
@pytest.mark.parametrize("latent", [1, 2, 7])
def test_every_head_fits_every_network(posterior, latent):
    assert set(SHAPES) == set(NETWORKS)
    torch.set_default_dtype(torch.float32)
    for network, shape in SHAPES.items() if latent == 7 else [("mlp", SHAPE)]:
        bodies = NETWORKS[network](shape, latent)
        head = ALL_POSTERIORS[posterior](bodies.features, latent)
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


def test_parameters_of_the_heads():
    features, latent = 400, 5
    numbers = {"isotropic": 6, "diagonal": 10, "ar1": 7, "ar1-scaled": 11, "ar1-stepped": 14,
               "low-rank": 20, "full": 20}  # fmt: skip
    assert set(numbers) == set(POSTERIORS)
    for name, expected in numbers.items():
        head = POSTERIORS[name](features, latent)
        assert head.numbers_per_image == expected
        assert count_parameters(head) == (features + 1) * expected


def test_the_mlp_is_the_papers():
    vae = build_vae(Experiment("mnist", posterior="diagonal", latent=5), (1, 28, 28))
    weights = [tuple(p.shape) for name, p in vae.named_parameters() if name.endswith("weight")]
    assert weights == [(400, 784), (5, 400), (5, 400), (400, 5), (784, 400)]


def test_the_ar1_head_is_an_ar1_normal():
    head = POSTERIORS["ar1"](4, 6)
    features = torch.randn(2, 4)
    q = head(features)
    assert type(q) is AR1Normal
    torch.testing.assert_close(q.rho, torch.tanh(head.fisher_z(features)))
    torch.testing.assert_close(q.scale**2, torch.exp(head.log_variance(features)))


def same_normal(one, other):
    for property in ("mean", "variance", "stddev"):
        torch.testing.assert_close(getattr(one, property), getattr(other, property))
    z = torch.randn(5, *one.mean.shape)
    torch.testing.assert_close(one.log_prob(z), other.log_prob(z))
    torch.testing.assert_close(one.entropy(), other.entropy())
    prior = standard_normal_like(one.mean)
    torch.testing.assert_close(kl_divergence(one, prior), kl_divergence(other, prior))


def take(head, other, *layers):
    """Give a head some of another's layers; one output stands for all where the sizes differ."""
    for layer in layers:
        for one, source in zip(
            getattr(head, layer).parameters(), getattr(other, layer).parameters(), strict=True
        ):
            one.data = source.data.expand_as(one).clone()


@pytest.mark.parametrize("name", ["ar1-scaled", "ar1-stepped"])
def test_the_chains_contain_the_diagonal_and_the_ar1_posterior(name):
    features, h = 4, torch.randn(3, 4)
    diagonal, ar1 = POSTERIORS["diagonal"](features, 6), POSTERIORS["ar1"](features, 6)
    chain = POSTERIORS[name](features, 6)
    take(chain, diagonal, "loc", "log_variance")
    for parameter in chain.fisher_z.parameters():
        parameter.data.zero_()
    same_normal(chain(h), diagonal(h))
    torch.manual_seed(0)
    drawn = chain(h).rsample()
    torch.manual_seed(0)
    assert torch.equal(drawn, diagonal(h).rsample()), "exactly, draws as well"
    take(chain, ar1, "loc", "log_variance", "fisher_z")
    same_normal(chain(h), ar1(h))
    torch.manual_seed(0)
    drawn = chain(h).rsample()
    torch.manual_seed(0)
    torch.testing.assert_close(drawn, ar1(h).rsample())


def test_the_other_containments():
    """Isotropic in AR(1), AR(1)-scaled in stepped, diagonal in low-rank and in full."""
    features, h = 4, torch.randn(3, 4)
    heads = {name: head(features, 6) for name, head in POSTERIORS.items()}
    for larger, smaller, layers, silent in (
        ("ar1", "isotropic", ("loc", "log_variance"), "fisher_z"),
        ("ar1-stepped", "ar1-scaled", ("loc", "log_variance", "fisher_z"), None),
        ("low-rank", "diagonal", ("loc", "log_variance"), "factor"),
        ("full", "diagonal", ("loc", "log_variance"), "below"),
    ):
        take(heads[larger], heads[smaller], *layers)
        for parameter in getattr(heads[larger], silent).parameters() if silent else ():
            parameter.data.zero_()
        same_normal(heads[larger](h), heads[smaller](h))


def test_every_tridiagonal_precision_is_a_stepped_chain():
    below = torch.randn(7)
    precision = torch.diag(below, -1) + torch.diag(below, 1)
    precision += torch.diag(precision.abs().sum(-1) + torch.rand(8))
    covariance = torch.linalg.inv(precision)
    scale = covariance.diagonal().sqrt()
    rho = covariance.diagonal(1) / scale[1:] / scale[:-1]
    q = AR1Normal(torch.zeros(8), scale, rho=rho)
    torch.testing.assert_close(q.covariance_matrix, covariance)
    torch.testing.assert_close(q.precision_matrix, precision)


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_family_is_the_dense_normal_of_its_moments(name):
    """Density, entropy and KL to the prior by dense algebra; mean and covariance by its draws."""
    q = POSTERIORS[name](4, 5)(2 * torch.randn(3, 4))
    n = 200_000
    draws = q.sample((n,))
    centred = draws - q.mean
    covariance = torch.einsum("nbi,nbj->bij", centred, centred) / n
    exact = covariance_of(q)
    # 4.9 standard errors: 75 entries, a false alarm in some 10,000 seeds.
    variances = exact.diagonal(dim1=-2, dim2=-1)
    error = ((exact.square() + variances.unsqueeze(-1) * variances.unsqueeze(-2)) / n).sqrt()
    assert ((covariance - exact).abs() < 4.9 * error).all()
    same_normal(q, MultivariateNormal(q.mean, exact))
    if name not in ("isotropic", "diagonal"):
        assert (exact - torch.diag_embed(variances)).abs().max() > 1e-3


def covariance_of(q):
    if isinstance(q, Independent):
        return torch.diag_embed(q.variance)
    return q.covariance_matrix


def test_the_kl_of_dense_normals_to_a_diagonal_one_is_torchs():
    loc, scale = torch.randn(5), torch.rand(5) + 0.5
    p = Independent(Normal(loc, scale), 1)
    dense = MultivariateNormal(loc, torch.diag(scale.square()))
    for name in ("low-rank", "full"):
        q = POSTERIORS[name](4, 5)(torch.randn(3, 4))
        torch.testing.assert_close(
            kl_divergence(q, p),
            kl_divergence(MultivariateNormal(q.mean, q.covariance_matrix), dense),
        )
    with pytest.raises(NotImplementedError):
        kl_divergence(q, Independent(Laplace(loc, scale), 1))


def test_xavier_touches_linear_layers_only():
    vae = build_vae(Experiment("mnist", initialisation="xavier"), SHAPE)
    linear = vae.encoder[1]
    bound = math.sqrt(6 / (linear.in_features + linear.out_features))
    assert not linear.bias.any() and 0.98 * bound < linear.weight.abs().max() <= bound


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_objective_does_not_change_when_the_batch_is_split(posterior):
    vae = small_vae(posterior)
    x = torch.rand(12, *SHAPE)
    q, z, logits = vae(x)
    whole = negative_elbo(q, z, logits, x)
    parts = []
    for rows in (slice(0, 1), slice(1, 5), slice(5, 12)):
        q_part = vae.encode(x[rows])
        parts.append(negative_elbo(q_part, z[rows], vae.decoder(z[rows]), x[rows]))
    for together, split in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(split), together, rtol=1e-12, atol=1e-12)
    kl = kl_divergence(q, standard_normal_like(q.mean))
    torch.testing.assert_close(whole.kl, kl)
    torch.testing.assert_close(whole.loss, whole.reconstruction + kl)


def test_bernoulli_nll_is_the_binary_likelihood():
    x, logits = torch.randint(0, 2, (3, *SHAPE)).double(), torch.randn(3, *SHAPE)
    expected = -torch.distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(bernoulli_nll(logits, x), expected)
    torch.testing.assert_close(bernoulli_nll(logits.expand(4, *logits.shape), x)[2], expected)


def test_importance_weighted_nll_does_not_depend_on_the_chunks():
    vae, x = small_vae(), torch.rand(5, *SHAPE)
    estimates = []
    for pixels in (1, 400, 10**9):
        torch.manual_seed(7)
        estimates.append(importance_weighted_nll(vae, x, samples=4000, max_pixels=pixels))
    assert estimates[0].shape == (5,)
    # The chunks draw in another order only where a chunk holds several draws of several images.
    for estimate in estimates[1:]:
        torch.testing.assert_close(estimate, estimates[0], rtol=0, atol=0.05)


def test_importance_weighted_nll_is_the_evidence_of_a_model_we_can_integrate():
    vae = small_vae(latent=2)
    x = torch.rand(3, *SHAPE)
    axis = torch.linspace(-8, 8, 321)
    z = torch.cartesian_prod(axis, axis)
    log_joint = standard_normal_like(z).log_prob(z)[:, None] - torch.stack(
        [bernoulli_nll(vae.decoder(z), row.expand(len(z), *SHAPE)) for row in x], dim=1
    )
    exact = -(log_joint.logsumexp(0) + 2 * math.log(axis[1] - axis[0]))
    estimate = importance_weighted_nll(vae, x, samples=20_000)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.05)
    q, z, logits = vae(x.repeat(500, 1, 1, 1))
    assert (negative_elbo(q, z, logits, x.repeat(500, 1, 1, 1)).loss.mean() > exact.mean()).all()


def test_importance_weighted_nll_needs_a_sample():
    with pytest.raises(ValueError, match="samples is 0; the bound needs at least 1"):
        importance_weighted_nll(small_vae(), torch.rand(1, *SHAPE), samples=0)


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


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_head_needs_a_latent_variable(posterior):
    with pytest.raises(ValueError, match="latent is 0; a posterior needs at least 1"):
        POSTERIORS[posterior](4, 0)


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


def test_beta_weighs_the_kl_alone():
    vae, x = small_vae(), torch.rand(4, *SHAPE)
    drawn = vae(x)
    terms = negative_elbo(*drawn, x)
    torch.testing.assert_close(beta_elbo(*drawn, x, beta=1.0).loss, terms.loss)
    heavy = beta_elbo(*drawn, x, beta=4.0)
    torch.testing.assert_close(heavy.loss, terms.reconstruction + 4 * terms.kl)
    torch.testing.assert_close(heavy.kl, terms.kl)


@pytest.mark.parametrize("kernel", KERNELS)
def test_info_vae_contains_the_elbo_and_the_mmd_autoencoder(kernel):
    vae, x = small_vae(), torch.rand(6, *SHAPE)
    drawn = vae(x)
    terms = negative_elbo(*drawn, x)
    elbo = info_vae(*drawn, x, alpha=0.0, lambda_=1.0, kernel=kernel)
    torch.testing.assert_close(elbo.loss, terms.loss)
    torch.manual_seed(5)
    mmd = squared_mmd(drawn[1], torch.randn_like(drawn[1]), KERNELS[kernel])
    torch.manual_seed(5)
    autoencoder = info_vae(*drawn, x, alpha=1.0, lambda_=1.0, kernel=kernel)
    torch.testing.assert_close(autoencoder.loss, terms.reconstruction + mmd)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("latent", [2, 10])
def test_mmd_is_zero_in_the_mean_for_draws_of_the_prior_and_not_for_others(kernel, latent):
    def values(scale, repeats=400, n=64):
        pairs = ((scale * torch.randn(n, latent), torch.randn(n, latent)) for _ in range(repeats))
        return torch.stack([squared_mmd(x, y, KERNELS[kernel]) for x, y in pairs])

    same, other = values(1.0), values(0.5)
    assert same.mean().abs() < 4 * same.std() / len(same) ** 0.5
    assert (same < 0).any(), "an unbiased estimate of zero is negative at times"
    assert other.mean() > 10 * other.std() / len(other) ** 0.5


def test_mmd_is_its_definition():
    x, y = torch.randn(5, 3), torch.randn(4, 3)

    def k(a, b):
        return math.exp(-((a - b) ** 2).sum() / (2 * 3))

    within_x = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_y = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    across = sum(k(a, b) for a in x for b in y) / 20
    expected = torch.tensor(within_x + within_y - 2 * across)
    torch.testing.assert_close(squared_mmd(x, y, KERNELS["rbf"]), expected)
    with pytest.raises(ValueError, match="at least 2 draws on each side, but there are 1 and 4"):
        squared_mmd(x[:1], y, KERNELS["rbf"])


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
    images = torch.randint(0, 256, (6, *SHAPE), dtype=torch.uint8)
    best, nll = best_by_quadrature(copy.deepcopy(vae).double(), images.double() / 255)
    gaps = inference_gaps(vae, images, samples=16, judged=4000)
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
