"""AR1Normal inside models and libraries that nobody here wrote."""

import copy
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import (
    Independent,
    Normal,
    TransformedDistribution,
    constraints,
    kl_divergence,
    transforms,
)
from torch.nn.functional import binary_cross_entropy_with_logits

from rhovae import AR1Normal, Sites
from rhovae.objectives import negative_elbo
from rhovae.study import load_images
from rhovae.study.data import to_unit_interval
from rhovae.study.experiments import Experiment, build_vae

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def batches():
    """One epoch of the embedded set, in order, as images in [0, 1]."""
    return [to_unit_interval(x) for x in load_images("mnist", "train").split(128)]


def fallen(losses):
    """Whether the last tenth of the losses of an epoch lies well below the first."""
    tenth = max(1, len(losses) // 10)
    return sum(losses[-tenth:]) < 0.7 * sum(losses[:tenth])


class PlainVAE(nn.Module):
    """The usual first VAE, 784-400-20, written without any of this package."""

    def __init__(self, latent=20):
        super().__init__()
        self.body, self.loc = nn.Linear(784, 400), nn.Linear(400, latent)
        self.log_variance = nn.Linear(400, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, 400), nn.ReLU(), nn.Linear(400, 784))

    def encode(self, x):
        h = self.body(x).relu()
        return Independent(Normal(self.loc(h), (0.5 * self.log_variance(h)).exp()), 1)

    def forward(self, x):
        q = self.encode(x.flatten(1))
        return q, self.decoder(q.rsample())


class PlainRhoVAE(PlainVAE):
    """The same with three lines changed: two in the head, and the one that makes q."""

    def __init__(self, latent=20):
        super().__init__(latent)
        self.log_variance = nn.Linear(400, 1)
        self.fisher_z = nn.Linear(400, 1)

    def encode(self, x):
        h = self.body(x).relu()
        scale = (0.5 * self.log_variance(h)).exp()
        return AR1Normal(self.loc(h), scale, fisher_z=self.fisher_z(h))


@pytest.mark.parametrize("model", [PlainVAE, PlainRhoVAE])
def test_in_a_plain_vae(model, batches):
    torch.manual_seed(0)
    vae, losses = model(), []
    prior = Independent(Normal(torch.zeros(20), torch.ones(20)), 1)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for x in batches:
        q, logits = vae(x)
        fit = binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(-1)
        loss = (fit + kl_divergence(q, prior)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert fallen(losses), losses


@pytest.fixture
def pyro():
    return pytest.importorskip("pyro", reason="needs Pyro: pip install rhovae[pyro]")


def model_and_guide(pyro, vae):
    """A Pyro program of one of our VAEs, with its own AR1Normal."""
    from pyro import distributions as dist

    from rhovae.pyro import AR1Normal as PyroAR1Normal

    def model(x):
        pyro.module("decoder", vae.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            pixels = dist.Bernoulli(logits=vae.decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(3), obs=x)

    def guide(x):
        pyro.module("encoder", vae.encoder)
        pyro.module("posterior", vae.posterior)
        q = vae.encode(x)
        with pyro.plate("images", len(x)):
            pyro.sample("z", PyroAR1Normal(q.loc, q.scale, fisher_z=q.fisher_z))

    return model, guide


@pytest.mark.parametrize("objective", ["Trace_ELBO", "TraceMeanField_ELBO"])
def test_in_pyro(pyro, objective, batches):
    from pyro import infer

    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = build_vae(Experiment("mnist", posterior="ar1", latent=5), (1, 28, 28))
    model, guide = model_and_guide(pyro, vae)
    optimizer = pyro.optim.Adam({"lr": 1e-3})
    svi = infer.SVI(model, guide, optimizer, getattr(infer, objective)())
    losses = [svi.step(x) / len(x) for x in batches]
    assert fallen(losses), losses


@pytest.mark.parametrize("posterior", ["ar1", "ar1-stepped"])
def test_pyro_computes_our_objective(pyro, posterior, batches):
    """TraceMeanField_ELBO takes the KL in closed form, from the same registry as torch."""
    from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

    torch.set_default_dtype(torch.float64)
    vae, x = build_vae(Experiment("mnist", posterior=posterior, latent=5), (1, 28, 28)), batches[0]
    vae, x = vae.double(), x.double()
    torch.manual_seed(1)
    expected = negative_elbo(*vae(x), x)
    for elbo in (TraceMeanField_ELBO(), Trace_ELBO()):
        torch.manual_seed(1)
        loss = elbo.loss(*model_and_guide(pyro, vae), x)
        analytic = isinstance(elbo, TraceMeanField_ELBO)
        close = loss == pytest.approx(expected.loss.sum().item(), rel=1e-5 if analytic else 0.02)
        assert close, (loss, expected.loss.sum())
        assert analytic == (loss == pytest.approx(expected.loss.sum().item(), rel=1e-9))


def test_as_a_pyro_distribution(pyro):
    from rhovae.pyro import AR1Normal as PyroAR1Normal

    q = PyroAR1Normal(torch.randn(4, 3), torch.ones(4, 1), fisher_z=torch.randn(4, 1))
    assert isinstance(q, AR1Normal) and isinstance(q.expand((5, 4)), PyroAR1Normal)
    assert q.shape() == q().shape == (4, 3) and q.expand_by((2,)).shape() == (2, 4, 3)
    assert q.to_event(1).event_shape == (4, 3)
    assert torch.equal(q.mask(False).log_prob(torch.zeros(4, 3)), torch.zeros(4))


@pytest.mark.parametrize("dependence", ["rho", "fisher_z"])
def test_pyro_can_reparametrise_it(pyro, dependence):
    from pyro.infer.reparam import LocScaleReparam

    from rhovae.pyro import AR1Normal as PyroAR1Normal

    def model():
        return pyro.sample("z", PyroAR1Normal(torch.ones(3), 2.0, **{dependence: 0.5}))

    moved = pyro.poutine.reparam(model, {"z": LocScaleReparam()})
    trace = pyro.poutine.trace(moved).get_trace()
    inner = trace.nodes["z_decentered"]["fn"]
    torch.testing.assert_close(getattr(inner, dependence), torch.full((1,), 0.5))
    assert trace.nodes["_RETURN"]["value"].shape == (3,)


class Counts(nn.Module):
    """Poisson counts with a latent AR(1) log-rate, as Pyro programs; Sites is the posterior."""

    def __init__(self, pyro, time_constant):
        from pyro import distributions as dist

        from rhovae.pyro import AR1Prior

        super().__init__()
        self.pyro, self.dist = pyro, dist
        self.prior, self.sites = AR1Prior(1, time_constant), Sites(16, 1)
        self.encoder = nn.Sequential(nn.Conv1d(1, 16, 9, padding=4), nn.Tanh())
        self.log_rate = nn.Parameter(torch.zeros(()))

    def posterior(self, counts):
        return self.sites(self.encoder(counts.log1p()).mT, self.prior(counts.shape[-1]))

    def model(self, counts):
        self.pyro.module("counts", self)
        with self.pyro.plate("series", len(counts)):
            z = self.pyro.sample("z", self.prior(counts.shape[-1]).to_event(1))
            rate = (self.log_rate + z).exp()
            self.pyro.sample("counts", self.dist.Poisson(rate).to_event(2), obs=counts)

    def guide(self, counts):
        self.pyro.module("counts", self)
        with self.pyro.plate("series", len(counts)):
            self.pyro.sample("z", self.posterior(counts).to_event(1))


@pytest.mark.parametrize("objective", ["Trace_ELBO", "TraceMeanField_ELBO"])
def test_time_series_in_pyro(pyro, objective, steps=200):
    from pyro import infer

    pyro.clear_param_store()
    torch.manual_seed(0)
    truth = Counts(pyro, time_constant=20.0)
    counts = torch.poisson((0.5 + truth.prior(steps).sample((32,))).exp())
    counts_model = Counts(pyro, time_constant=3.0)
    pyro.clear_param_store()
    svi = infer.SVI(
        counts_model.model, counts_model.guide, pyro.optim.Adam({"lr": 0.02}),
        getattr(infer, objective)(),
    )  # fmt: skip
    losses = [svi.step(counts) / counts.numel() for _ in range(300)]
    assert losses[-1] < losses[0] - 0.1, losses
    # 32 series of ten time constants each; twice the truth would be far outside what they leave.
    assert 10 < counts_model.prior.time_constant.item() < 40


def test_pyro_computes_the_objective_of_a_chain(pyro):
    from pyro.infer import TraceMeanField_ELBO

    pyro.clear_param_store()
    torch.set_default_dtype(torch.float64)
    counts_model, counts = Counts(pyro, 5.0), torch.poisson(torch.ones(4, 1, 30))
    torch.manual_seed(1)
    q, p = counts_model.posterior(counts), counts_model.prior(30)
    fit = torch.distributions.Poisson((counts_model.log_rate + q.rsample()).exp()).log_prob(counts)
    expected = kl_divergence(q, p).sum() - fit.sum()
    torch.manual_seed(1)
    loss = TraceMeanField_ELBO().loss(counts_model.model, counts_model.guide, counts)
    assert loss == pytest.approx(expected.item(), rel=1e-9)


def test_pyro_can_update_it_with_what_was_observed(pyro):
    from pyro import distributions as dist
    from pyro.infer.reparam import ConjugateReparam

    from rhovae.pyro import AR1Normal as PyroAR1Normal

    torch.set_default_dtype(torch.float64)
    prior = PyroAR1Normal(torch.randn(4, 6), 1.5, rho=0.7)
    value, scale = torch.randn(4, 6), torch.rand(4, 6) + 0.1
    noise = dist.Normal(value, scale).to_event(1)
    updated, log_normaliser = prior.conjugate_update(noise)
    assert type(updated) is type(updated.expand((2, 4))) is PyroAR1Normal
    z = torch.randn(3, 4, 6)
    left, right = prior.log_prob(z) + noise.log_prob(z), updated.log_prob(z) + log_normaliser
    torch.testing.assert_close(left, right)
    with pytest.raises(NotImplementedError, match=r"takes Normal\(value, scale\)\.to_event\(1\)"):
        prior.conjugate_update(dist.Normal(value, scale))

    def model():
        with pyro.plate("series", 4):
            z = pyro.sample("z", prior)
            pyro.sample("value", dist.Normal(z, scale).to_event(1), obs=value)

    moved = pyro.poutine.reparam(model, {"z": ConjugateReparam(noise)})
    evidence = prior.log_evidence(value, precision=scale**-2).sum()
    for _ in range(2):  # whatever is drawn
        trace = pyro.poutine.trace(moved).get_trace()
        torch.testing.assert_close(trace.log_prob_sum(), evidence)


def test_without_pyro_the_remedy_is_named(monkeypatch):
    import builtins
    import sys

    actual = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "pyro":
            raise ModuleNotFoundError("No module named 'pyro'", name="pyro")
        return actual(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "rhovae.pyro", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install rhovae\[pyro\]"):
        import rhovae.pyro  # noqa: F401


NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "09_your_own_model.ipynb"


def run_the_program(library, check, tmp_path):
    """The whole program for a library in the text of notebook 9, as a file of its own."""
    texts = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]]
    blocks = re.findall(r"```python\n(.*?)```", "\n".join(texts), re.S)
    (code,) = [block for block in blocks if re.search(rf"^(import|from) {library}\b", block, re.M)]
    if "RhoVAE()\n" in code:
        classes = [t for t in texts if t.startswith(("class PlainVAE", "class RhoVAE"))]
        place = "# Here the two classes of 9.1, PlainVAE and RhoVAE.\n"
        assert place in code
        code = code.replace(place, "\n\n".join(classes) + "\n")
    file = tmp_path / "own_model.py"
    file.write_text(f"{code}\n{check}\n")
    environment = os.environ | {"PYTHONPATH": str(NOTEBOOK.parents[1])}
    subprocess.run([sys.executable, file], cwd=tmp_path, env=environment, check=True)


def test_in_pythae(tmp_path):
    """Its VAE with an encoder and a forward of ours; its trainer does the rest."""
    pytest.importorskip("pythae", reason="needs Pythae: pip install rhovae[pythae]")
    check = """\
fresh, device = PythaeRhoVAE(config, encoder=Encoder(20)), next(vae.parameters()).device
with torch.no_grad():
    trained, untrained = (m.to(device)({"data": images.to(device)}).loss for m in (vae, fresh))
assert trained < 0.7 * untrained"""
    run_the_program("pythae", check, tmp_path)


def test_in_lightning(tmp_path):
    pytest.importorskip("lightning", reason="needs Lightning: pip install rhovae[lightning]")
    check = """\
with torch.no_grad():
    trained, untrained = (m.training_step(images, 0) for m in (module, LitRhoVAE()))
assert trained < 0.7 * untrained"""
    run_the_program("lightning", check, tmp_path)


def some(**changes):
    settings = dict(loc=torch.randn(4, 3), scale=torch.rand(4, 1) + 0.1, rho=torch.rand(4, 1) - 0.5)
    return AR1Normal(**(settings | changes))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_are_the_same_distribution(duplicate):
    q = some()
    q.entropy()  # what is kept for later is copied, too
    twin = duplicate(q)
    z = q.sample()
    assert torch.equal(twin.log_prob(z), q.log_prob(z)) and twin.batch_shape == q.batch_shape


def test_inside_independent_and_transformed_distributions():
    q = some()
    z = q.sample((2,))
    joint = Independent(q, 1)
    assert joint.event_shape == (4, 3) and joint.batch_shape == ()
    torch.testing.assert_close(joint.log_prob(z), q.log_prob(z).sum(-1))
    lognormal = TransformedDistribution(q, transforms.ExpTransform())
    y = lognormal.rsample((2,))
    assert (y > 0).all() and lognormal.event_shape == (3,)
    torch.testing.assert_close(lognormal.log_prob(y), q.log_prob(y.log()) - y.log().sum(-1))
    assert constraints.independent(constraints.positive, 1).check(y).all()


def test_a_state_dict_is_loaded_without_running_code():
    experiment = Experiment("mnist", posterior="ar1", latent=5)
    vae, other = (build_vae(experiment, (1, 28, 28)) for _ in range(2))
    with torch.no_grad():
        vae.posterior.fisher_z.bias.add_(1)
    file = io.BytesIO()
    torch.save(vae.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(other.encode(x).rho, vae.encode(x).rho)


@pytest.mark.parametrize("posterior", ["ar1", "ar1-stepped"])
def test_under_autocast(posterior):
    torch.manual_seed(0)
    vae = build_vae(Experiment("mnist", posterior=posterior, latent=5), (1, 28, 28))
    x = torch.rand(64, 1, 28, 28)
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(negative_elbo(*vae(x), x).loss.float().mean())
    results[1].backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters())
    assert results[1].item() == pytest.approx(results[0].item(), rel=0.01)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("posterior", ["diagonal", "ar1"])
def test_a_compiled_vae(posterior):
    torch.manual_seed(0)
    vae = build_vae(Experiment("mnist", posterior=posterior, latent=5), (1, 28, 28))
    compiled, x = torch.compile(vae, backend="aot_eager"), torch.rand(8, 1, 28, 28)
    for model in (compiled, vae):
        vae.zero_grad()
        loss = negative_elbo(*model(x), x).loss.mean()
        loss.backward()
        assert math.isfinite(loss.item())
        assert all(p.grad is not None and p.grad.any() for p in vae.parameters())
    q, z, logits = compiled(x)
    torch.testing.assert_close(logits, vae.decoder(z), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q.variance, vae.encode(x).variance)
