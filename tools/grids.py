"""The experiments of each part of the work, as lists. The Snakefile runs them.

A grid is named by what needs it. Names and order of the records follow from the experiments alone.
"""

from itertools import product

from rhovae import Experiment

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


def convolutional() -> list[Experiment]:
    """Notebook 06: the networks of the paper's Figures 3, 4 and 5, published and corrected.

    Fewer epochs than the paper's 15 where a CPU takes minutes for one; the same command with more
    epochs goes on from the checkpoints.
    """
    networks = {"beta_cnn": dict(epochs=15, image_size=64), "cnn": dict(epochs=5),
                "dcgan": dict(epochs=5)}  # fmt: skip
    return [
        Experiment(dataset=dataset, source="full", architecture=network, posterior=posterior,
                   latent=10, initialisation="xavier", iwae_images=500, **networks[network])
        for network, dataset, posterior in product(
            networks, SETS, ("diagonal", "ar1", "published-script")
        )
    ]  # fmt: skip


GRIDS = {"audit": audit, "control": control, "convolutional": convolutional}
