"""The experiments of each part of the work, as lists: data/results/<grid>/<name>.json.

The Snakefile runs them, each through notebook 05.
"""

import dataclasses
import json
import shlex
from itertools import product
from pathlib import Path

from rhovae import POSTERIORS
from rhovae.study import Experiment
from rhovae.study.flows import FLOWS
from rhovae.study.records import load_record
from rhovae.study.training import judged_epoch

RESULTS = Path(__file__).resolve().parents[1] / "data" / "results"
SETS = ("mnist", "fashion-mnist")
SEEDS = range(5)


def audit() -> list[Experiment]:
    """Notebooks 04 and 06: the paper's Figure 1 and its notebook, published and corrected."""
    ours = ("diagonal", "isotropic", "ar1")
    notebook = product(SEEDS, SETS[1:], (*ours, "published-notebook"), (5,), ("torch",))
    script = product(SEEDS, SETS, (*ours, "published-script"), (10,), ("xavier",))
    return [
        Experiment(dataset=dataset, source="full", posterior=posterior, latent=latent, seed=seed,
                   initialisation=initialisation)
        for seed, dataset, posterior, latent, initialisation in (*notebook, *script)
    ]  # fmt: skip


def control() -> list[Experiment]:
    """Notebook 04: each of the code's two departures alone, in the setting of its notebook."""
    departures = [("diagonal", "divided-kl"), ("ar1", "divided-kl"), ("published-notebook", "elbo")]
    return [
        Experiment(dataset="fashion-mnist", source="full", latent=5, seed=seed,
                   posterior=posterior, objective=objective)
        for seed, (posterior, objective) in product(SEEDS, departures)
    ]  # fmt: skip


def control_script() -> list[Experiment]:
    """Notebook 04: the same in the setting of the script, the random walk and both together.

    What the code really charges, the division with rho in it, is in `audit`.
    """
    departures = [("diagonal", "divided-kl"), ("ar1", "divided-kl"),
                  ("published-script", "elbo"), ("published-script", "divided-kl")]  # fmt: skip
    return [
        Experiment(dataset=dataset, source="full", seed=seed, initialisation="xavier",
                   posterior=posterior, objective=objective)
        for seed, dataset, (posterior, objective) in product(SEEDS, SETS, departures)
    ]  # fmt: skip


def released() -> list[Experiment]:
    """Notebook 06: the models of the paper's Figures 3 to 5 as released.

    First one seed of everything, then the others. The 200 to 300 million parameters of Figure 4
    get one epoch on MNIST, as they were before the floors and, for the baseline, with its floor;
    for a GPU, more is a change of `figure_4`. (RHO_CNN_VAE with its floor had an infinite loss in
    step 6 and step 8 with the two seeds that were tried: in float32 rho was 1.)
    """
    figure_3 = dict(architecture="beta_cnn", image_size=64)
    figure_4 = dict(architecture="released_cnn", epochs=1, pictures=False)
    figure_5 = dict(architecture="dcgan")
    beta, info = ((f"released-{name}", f"released-rho-{name}") for name in ("beta", "info"))
    cnn = ("released-early-cnn", "released-early-rho-cnn", "released-cnn")
    runs = [
        *product((0,), SETS[:1], info, (figure_5,)),
        *product((0,), SETS[:1], beta, (figure_3,)),
        *product((0,), SETS[1:], info, (figure_5,)),
        *product((0,), SETS[1:], beta, (figure_3,)),
        *product((0,), SETS[:1], cnn, (figure_4,)),
        *product((1, 2), SETS, beta, (figure_3,)),
        *product((1, 2), SETS, info, (figure_5,)),
    ]
    return [
        Experiment(dataset=dataset, source="full", posterior=posterior, seed=seed,
                   initialisation="released", iwae_samples=100, iwae_images=500, **network)
        for seed, dataset, posterior, network in runs
    ]  # fmt: skip


def corrected() -> list[Experiment]:
    """Notebook 06: our networks of Figures 3 to 5 at the paper's length, with seeds.

    First one seed of everything, then two more of the two smaller networks. Its dcgan starts near
    the prior, as in `convolutional`.
    """
    one = convolutional(epochs=15)
    more = [
        dataclasses.replace(experiment, seed=seed)
        for seed in SEEDS[1:3]
        for experiment in one
        if experiment.architecture != "dcgan"
    ]
    return [*one, *more]


def convolutional(epochs: int = 5) -> list[Experiment]:
    """Notebook 06: networks of the paper's Figures 3 to 5, published and corrected.

    The paper trains for 15 epochs. Where a CPU takes minutes for one, the committed runs have
    fewer; with more of them asked for, training goes on from the checkpoints. In the network of
    Figure 5 all posteriors start near the prior: with a log-variance that nothing bounds it
    diverges in its first steps. (The released code keeps the scale between 0.01 and 1.)

    Args:
        epochs: of cnn and dcgan.
    """
    networks = {
        "beta_cnn": dict(epochs=15, image_size=64),
        "cnn": dict(epochs=epochs),
        "dcgan": dict(epochs=epochs, head_scale=0.01),
    }
    return [
        Experiment(dataset=dataset, source="full", architecture=network, posterior=posterior,
                   latent=10, initialisation="xavier", iwae_samples=100, iwae_images=500,
                   **networks[network])
        for network, dataset, posterior in product(
            networks, SETS, ("diagonal", "ar1", "published-script")
        )
    ]  # fmt: skip


def families() -> list[Experiment]:
    """Notebook 12: every family of posteriors in one network, by latent dimension and seed.

    75 seconds for a run, 190 for full with fifty latent variables: the fourth and fifth seed of
    ten and fifty take 1.3 core-hours.
    """
    return [
        Experiment(dataset=dataset, source="full", posterior=posterior, latent=latent, seed=seed,
                   pictures=False)
        for seed, latent, dataset, posterior in product(SEEDS, (5, 10, 20, 50), SETS, POSTERIORS)
    ]  # fmt: skip


def gaps() -> list[Experiment]:
    """Notebook 12: what the encoder and what each family costs, for decoders of three families.

    Four to five minutes for a run: the second and third seed take 0.9 core-hours.
    """
    decoders = ("diagonal", "ar1", "full")
    return [
        Experiment(dataset=dataset, source="full", posterior=posterior, latent=20, seed=seed,
                   gap_images=500, pictures=False)
        for seed, dataset, posterior in product(SEEDS[:3], SETS, decoders)
    ]  # fmt: skip


def rows() -> list[Experiment]:
    """Notebook 13: the same families where each row of an image has a latent variable of its own.

    The decoder is local, so here no rotation of the latent space can absorb a correlation. Two
    minutes for a run: the fourth and fifth seed take one core-hour.
    """
    return [
        Experiment(dataset=dataset, source="full", architecture="rows", posterior=posterior,
                   latent=28, seed=seed, iwae_samples=100, iwae_images=500, pictures=False)
        for seed, dataset, posterior in product(SEEDS, SETS, POSTERIORS)
    ]  # fmt: skip


def long() -> list[Experiment]:
    """Notebook 12: whether what 15 epochs show holds after 100. About 6 core-hours.

    (Seconds per epoch in the quickest records of `families`: 3.8 for diagonal to 6 for full, and
    with fifty latent variables 4.2 and 12.)
    """
    sizes = [*product((20,), ("diagonal", "ar1", "ar1-stepped", "full")),
             *product((50,), ("diagonal", "full"))]  # fmt: skip
    return [
        Experiment(dataset=dataset, source="full", posterior=posterior, latent=latent, seed=seed,
                   epochs=100, pictures=False)
        for seed, dataset, (latent, posterior) in product(SEEDS[:3], SETS, sizes)
    ]  # fmt: skip


RATES = (3e-4, 1e-3, 3e-3)
FAIR = dict(source="full", latent=20, epochs=50, head_scale=0.01, validation_images=5000,
            patience=5, pictures=False)  # fmt: skip


def rates() -> list[Experiment]:
    """Notebook 12: three learning rates for every family, to choose one on validation images.

    All start near the prior, and stop when they have not become better for five epochs. At most
    3 core-hours (7 families at 4 to 6 s per epoch in `families`), less where runs stop early.
    """
    return [
        Experiment(dataset=dataset, posterior=posterior, learning_rate=rate, **FAIR)
        for dataset, posterior, rate in product(SETS, POSTERIORS, RATES)
    ]


def chosen_rates(folder: Path = RESULTS / "rates") -> dict[tuple[str, str], float]:
    """(data set, posterior) -> the rate with the lowest validation loss, where all have run."""
    losses: dict = {}
    for experiment in rates():
        path = folder / f"{experiment.name}.json"
        if path.is_file():
            record = load_record(path)
            loss = judged_epoch(record["history"])["validation"]["loss"]
            found = losses.setdefault((experiment.dataset, experiment.posterior), {})
            found[experiment.learning_rate] = loss
    return {key: min(found, key=found.get) for key, found in losses.items() if len(found) == 3}


def fair() -> list[Experiment]:
    """Notebook 12: each family at the rate that the committed records of `rates` choose for it.

    Seeds that had no part in the choice; as long as those records are not there, nothing. At most
    3 core-hours.
    """
    return [
        Experiment(dataset=dataset, posterior=posterior, learning_rate=rate, seed=seed, **FAIR)
        for seed, ((dataset, posterior), rate) in product(SEEDS[1:4], chosen_rates().items())
    ]


ACTIVE = {"mnist": 25, "fashion-mnist": 17}


def active() -> list[Experiment]:
    """Notebook 12: families with as many latent variables as the diagonal one uses of fifty.

    ACTIVE has the mean of its active units over three seeds in `families`, rounded. There
    isotropic and AR(1) keep all fifty: with one scale no variable can be switched off. Half a
    core-hour.
    """
    compared = ("diagonal", "isotropic", "ar1", "full")
    return [
        Experiment(dataset=dataset, source="full", posterior=posterior, latent=latent, seed=seed,
                   pictures=False)
        for seed, (dataset, latent), posterior in product(SEEDS[:3], ACTIVE.items(), compared)
    ]  # fmt: skip


def anchor() -> list[Experiment]:
    """Notebook 12: the one number that others can compare with theirs, Burda et al. (2016).

    Their VAE with one stochastic layer (k = 1): binarised MNIST, 50 latent variables, two hidden
    layers of 200 tanh units, batches of 20, and 5,000 draws for each of the 10,000 test images.
    Theirs has 3,280 epochs in eight stages and a rate that ends at 1e-4. Here are the first five
    stages, 121 epochs, with a rate that ends at 2.7e-4: 25 minutes on one core for diagonal, 30
    for AR(1) and 40 for full, of which a third is the 5,000 draws; the whole schedule would take
    eight hours. Missing as well: their epsilon of 1e-4 in Adam, and output biases that start at the
    mean image. They train on 59,600 images and draw test pixels afresh in every pass.
    """
    return [
        Experiment(dataset="mnist", source="full", architecture="tanh_mlp", posterior=posterior,
                   latent=50, epochs=121, batch_size=20, schedule="tripling", binarised=True,
                   initialisation="xavier", iwae_samples=5000, iwae_images=10_000, pictures=False)
        for posterior in ("diagonal", "ar1", "full")
    ]  # fmt: skip


def flows() -> list[Experiment]:
    """Notebook 12: two posteriors by Pyro's flows, in network and length of `families`.

    Two minutes for each run, 0.6 core-hours.
    """
    return [
        Experiment(dataset=dataset, source="full", posterior=posterior, latent=20, seed=seed,
                   pictures=False)
        for seed, dataset, posterior in product(SEEDS, SETS, FLOWS)
    ]  # fmt: skip


def smoke() -> list[Experiment]:
    """Two small runs that show that the grid works: seconds, on the embedded images."""
    return [
        Experiment(dataset="mnist", posterior=posterior, latent=2, epochs=5, batch_size=1000,
                   iwae_samples=10, iwae_images=100, pictures=pictures)
        for posterior, pictures in (("diagonal", False), ("ar1", True))
    ]  # fmt: skip


GRIDS = {
    "active": active,
    "anchor": anchor,
    "audit": audit,
    "control": control,
    "control_script": control_script,
    "convolutional": convolutional,
    "corrected": corrected,
    "fair": fair,
    "families": families,
    "flows": flows,
    "gaps": gaps,
    "long": long,
    "rates": rates,
    "released": released,
    "rows": rows,
    "smoke": smoke,
}


def parameters(experiment: Experiment) -> dict:
    """An experiment as parameters of notebook 05; what is default is left out."""
    changed = {
        field.name: getattr(experiment, field.name)
        for field in dataclasses.fields(experiment)
        if getattr(experiment, field.name) != field.default
    }
    named = ("dataset", "architecture", "objective", "initialisation", "image_size")
    settings = {name: changed.pop(name) for name in named if name in changed}
    for name in ("source", "latent", "epochs"):  # here the notebook has defaults of its own
        settings[name] = getattr(experiment, name)
        changed.pop(name, None)
    settings |= {"posteriors": [experiment.posterior], "seeds": [experiment.seed], "more": changed}
    for name in ("posterior", "seed"):
        changed.pop(name, None)
    return settings


def command_line(**settings) -> str:
    """Notebook parameters as arguments of tools/notebooks.py run."""
    pairs = (f"-p {name} {shlex.quote(json.dumps(value))}" for name, value in settings.items())
    return " ".join(pairs)
