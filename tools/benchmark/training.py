"""Steps of training, as this repository, the released code and a library do them."""

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.nn.functional import binary_cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from rhovae import VAE, kernels
from rhovae.objectives import (
    _bernoulli_nll_of_many,
    bernoulli_nll,
    negative_elbo,
    standard_normal_like,
)
from rhovae.study import Experiment
from rhovae.study.experiments import build_vae
from rhovae.study.training import batch_loss, train_epoch

from .clock import Calls

STEPS = 20  # of 128 images, in one timed call
POSTERIORS = {
    "diagonal": ("diagonal", True),
    "AR(1)": ("ar1", True),
    "AR(1) by the scan": ("ar1", False),
}


def pixels() -> Tensor:
    return torch.randint(0, 256, (128 * STEPS, 1, 28, 28), dtype=torch.uint8)


def new_vae(posterior: str, latent: int) -> VAE:
    return build_vae(Experiment("mnist", posterior=posterior, latent=latent), (1, 28, 28))


def our_steps(
    posterior: str, loops: bool, latent: int, compiled: bool = False
) -> Callable[[], None]:
    """An epoch; `loops` allows the compiled draw, `compiled` is torch.compile for everything."""
    vae, images = new_vae(posterior, latent), pixels()
    loss = batch_loss(vae, negative_elbo, compiled)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)

    def epoch():
        with kernels.use(loops):
            train_epoch(vae, images, loss, optimizer, 128)

    return epoch


def published_steps(latent: int) -> Callable[[], None]:
    """Images one by one through PIL and ToTensor, sigmoid and cross-entropy, .item() each step."""

    class Images(MNIST):
        """torchvision's, around images that are in memory."""

        def __init__(self, data):
            self.data, self.targets = data[:, 0], torch.zeros(len(data), dtype=torch.long)
            self.transform, self.target_transform = ToTensor(), None

    vae = new_vae("diagonal", latent)
    loader = DataLoader(Images(pixels()), batch_size=128, shuffle=True)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)

    def epoch():
        total = 0.0
        for x, _ in loader:
            optimizer.zero_grad()
            q, _, logits = vae(x)
            loss = binary_cross_entropy(logits.sigmoid(), x, reduction="sum")
            loss = loss + kl_divergence(q, standard_normal_like(q.mean)).sum()
            loss.backward()
            total += loss.item()
            optimizer.step()

    return epoch


def pythae_steps(latent: int, folder: str) -> Callable[[], None]:
    """Pythae's VAE, data set and trainer, with its defaults for a multilayer perceptron."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU())
            self.loc, self.log_variance = nn.Linear(400, latent), nn.Linear(400, latent)

        def forward(self, x):
            h = self.body(x)
            return ModelOutput(embedding=self.loc(h), log_covariance=self.log_variance(h))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(latent, 400), nn.ReLU(), nn.Linear(400, 784))

        def forward(self, z):
            image = self.body(z).sigmoid().reshape(-1, 1, 28, 28)
            return ModelOutput(reconstruction=image)

    logging.getLogger("pythae").setLevel(logging.ERROR)
    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=latent, reconstruction_loss="bce")
    images = pixels().float() / 255
    trainer = BaseTrainer(
        PythaeVAE(config, encoder=Encoder(), decoder=Decoder()),
        BaseDataset(images, torch.zeros(len(images))),
        training_config=BaseTrainerConfig(
            output_dir=folder, per_device_train_batch_size=128, learning_rate=1e-3, no_cuda=True
        ),
    )
    trainer.prepare_training()
    trainer.model.train()
    return lambda: trainer.train_step(1)


def floor(latent: int) -> Callable[[], None]:
    """The matrix products of as many steps, forward and backward, and nothing else."""
    shapes = [(784, 400), (400, latent), (400, latent), (latent, 400), (400, 784)]
    layers = [
        (torch.randn(128, m), torch.randn(m, n), torch.randn(128, n), i > 0)
        for i, (m, n) in enumerate(shapes)
    ]
    spare = [(torch.empty(128, n), torch.empty(m, n), torch.empty(128, m)) for m, n in shapes]

    def products():
        for _ in range(STEPS):
            for (x, weight, gradient, needs_input), (y, dw, dx) in zip(layers, spare, strict=True):
                torch.mm(x, weight, out=y)
                torch.mm(x.mT, gradient, out=dw)
                if needs_input:
                    torch.mm(gradient, weight.mT, out=dx)

    return products


def steps(latent: int, everything: bool, folder: str) -> Calls:
    calls = {name: our_steps(*how, latent) for name, how in POSTERIORS.items()}
    if everything:
        calls["published pipeline"] = published_steps(latent)
        if find_spec("pythae"):
            calls["Pythae"] = pythae_steps(latent, folder)
        calls["floor"] = floor(latent)
    return calls


def compiled_steps(latent: int) -> Calls:
    """By torch.compile, where there is a C++ compiler. To be measured last: see `comparisons`."""
    names = ("diagonal", "AR(1)") if shutil.which(os.environ.get("CXX", "g++")) else ()
    return {name: our_steps(*POSTERIORS[name], latent, compiled=True) for name in names}


def optimizers() -> Calls:
    """One step of Adam on the parameters of a rho-VAE, in torch's implementations."""
    kinds = {"for each tensor": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    calls = {}
    for name, how in kinds.items():
        how = how or {"foreach": False, "fused": False}
        vae = new_vae("ar1", 20)
        for parameter in vae.parameters():
            parameter.grad = torch.randn_like(parameter)
        calls[name] = torch.optim.Adam(vae.parameters(), lr=1e-3, **how).step
    return calls


def layouts(architecture: str) -> Calls:
    """A step of 128 images of a convolutional rho-VAE, its weights in either layout of memory."""
    size = 64 if architecture == "beta_cnn" else 28
    images = torch.randint(0, 256, (128, 1, size, size), dtype=torch.uint8)
    experiment = Experiment("mnist", architecture=architecture, latent=10, image_size=size)
    calls = {}
    for name in ("contiguous_format", "channels_last"):
        vae = build_vae(experiment, (1, size, size)).to(memory_format=getattr(torch, name))
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
        loss = batch_loss(vae, negative_elbo)
        calls[name] = partial(train_epoch, vae, images, loss, optimizer, 128)
    return calls


@torch.no_grad()
def likelihoods(draws: int = 40) -> Calls:
    """-log p(x|z) of draws of a batch, as in training and as in the importance-weighted bound."""
    logits, x = torch.randn(draws, 128, 1, 28, 28), torch.rand(128, 1, 28, 28)
    kinds = {"cross-entropy": bernoulli_nll, "ours": _bernoulli_nll_of_many}
    return {name: partial(nll, logits, x) for name, nll in kinds.items()}


GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "Adam": ("aten::_fused_adam_", "Optimizer.step", "Optimizer.zero_grad"),
    "cross-entropy": ("aten::log_sigmoid", "aten::sigmoid", "aten::binary_cross", "aten::sub"),
    "images": ("aten::index_select", "aten::randperm", "aten::div_"),
}


def time_by_kind(name: str, latent: int = 20) -> dict[str, float]:
    """Where a training step spends its time, by torch.profiler: milliseconds by group."""
    epoch = our_steps(*POSTERIORS[name], latent)
    for _ in range(3):
        epoch()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        epoch()
    shares = dict.fromkeys((*GROUPS, "everything else"), 0.0)
    for event in profiled.key_averages():
        fits = [group for group, names in GROUPS.items() if event.key.startswith(names)]
        shares[fits[0] if fits else "everything else"] += event.self_cpu_time_total / 1e3 / STEPS
    return shares
