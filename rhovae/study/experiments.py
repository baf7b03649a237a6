"""One training run from names to record: Experiment -> run_experiment -> JSON."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..objectives import KERNELS, OBJECTIVES, Terms, negative_elbo
from ..posteriors import POSTERIORS
from ..vae import VAE
from .checkpoint import Checkpoint
from .data import (
    DATASETS,
    SOURCES,
    as_images,
    drawn_once,
    fingerprint,
    load_images,
    load_labels,
    require_known,
    resized,
    set_apart,
    to_unit_interval,
)
from .evaluation import evaluate, inference_gaps, iwae_nll, latent_statistics
from .flows import FLOWS, sampled_elbo
from .networks import NETWORKS, count_parameters
from .pictures import latent_map, pictures
from .provenance import environment
from .published import PUBLISHED_POSTERIORS, decompose, divided_loss, published_loss
from .quality import sample_quality
from .records import SCHEMA, load_record, require_writable, save_record
from .released import RELEASED_NETWORKS, RELEASED_POSTERIORS, initialise_batch_norm
from .training import SCHEDULES, fit, judged_epoch, pick_device, set_seed

ALL_NETWORKS = NETWORKS | RELEASED_NETWORKS
# Of the paper's code: trained by default on its loss.
CODE_POSTERIORS = PUBLISHED_POSTERIORS | RELEASED_POSTERIORS
ALL_POSTERIORS = POSTERIORS | FLOWS | CODE_POSTERIORS
ALL_OBJECTIVES = {
    **OBJECTIVES,
    "as-published": published_loss,
    "divided-kl": divided_loss,
    "sampled-elbo": sampled_elbo,
}
OBJECTIVE_SETTINGS = {"beta-elbo": ("beta",), "info-vae": ("alpha", "lambda_", "kernel")}
INITIALISATIONS = ("torch", "xavier", "released")
# What is judged after training: it does not decide what is trained.
EVALUATION = ("iwae_samples", "iwae_images", "gap_images", "pictures")


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the numbers of a run. Names are checked when it is made.

    Args:
        dataset: "mnist", "fashion-mnist", or any label if you pass your own images.
        source: "embedded" (10,000 training and 2,000 test images) or "full".
        architecture: a name in NETWORKS or RELEASED_NETWORKS.
        posterior: a name in POSTERIORS, or in FLOWS (by Pyro, see `flows`), or
            "published-notebook", "published-script", or a name in RELEASED_POSTERIORS (see
            `released`).
        objective: "elbo", "beta-elbo", "info-vae", "as-published" (the released code's loss, the
            default for its posteriors), "divided-kl" (its division by the batch size, for any
            posterior) or "sampled-elbo" (the KL by one draw; of flows no other is known).
        latent: number of latent variables.
        epochs, batch_size, learning_rate: of Adam.
        schedule: "constant", or "tripling" (see `training.tripling`), a factor on the rate.
        clip_norm: the norm to which a larger gradient is shortened; 0 for no limit.
        binarised: pixels are drawn as 0 or 1 with their grey value as probability: of training
            images for every step, of validation and test images once and the same in every run.
        validation_images: how many training images to set apart, drawn by the seed. What is judged
            is then the model after the epoch that was best on them.
        patience: after how many epochs without a lower loss on them to stop; 0 for never.
        compiled: train with torch.compile, which rounds differently (see `training.fit`).
        seed: of initial weights, order of images and posterior draws.
        initialisation: "torch" (PyTorch's own), "xavier" (uniform, no bias; the paper's script) or
            "released" (the same, with the batch norm of the torch of its day).
        head_scale: factor on the initial weights of the posterior head. With 0.01 all posteriors
            start near the prior, without which dcgan diverges in its first steps.
        image_size: height and width to which images are resized; 0 leaves them as they are.
        beta: weight of the KL, with objective "beta-elbo".
        alpha, lambda_, kernel: of InfoVAE and its MMD ("rbf" or "imq"), with objective "info-vae".
        iwae_samples, iwae_images: draws per image and test images for the importance-weighted NLL.
        gap_images: test images for which every family's best posterior is found without an encoder
            (see `inference_gaps`; minutes for 500); 0 for none.
        pictures: whether the record holds pictures, a latent map and the scores of samples, as
            against 4 kB of numbers.
    Raises:
        ValueError: an unknown name or a value out of range.
    """

    dataset: str
    source: str = "embedded"
    architecture: str = "mlp"
    posterior: str = "ar1"
    objective: str = ""
    latent: int = 10
    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 1e-3
    schedule: str = "constant"
    clip_norm: float = 0.0
    binarised: bool = False
    validation_images: int = 0
    patience: int = 0
    compiled: bool = False
    seed: int = 0
    initialisation: str = "torch"
    head_scale: float = 1.0
    image_size: int = 0
    beta: float = 1.0
    alpha: float = 0.0
    lambda_: float = 1000.0
    kernel: str = "rbf"
    iwae_samples: int = 500
    iwae_images: int = 2000
    gap_images: int = 0
    pictures: bool = True

    def __post_init__(self):
        for name in ("dataset", "source", "architecture", "posterior", "objective",
                     "initialisation", "kernel", "schedule"):  # fmt: skip
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a name.")
        for name in ("beta", "alpha", "lambda_", "clip_norm", "learning_rate", "head_scale"):
            object.__setattr__(self, name, self._number(name))  # 2 and 2.0 are one experiment
        require_known("posterior", self.posterior, ALL_POSTERIORS)
        if not self.objective:
            implied = "as-published" if self.posterior in CODE_POSTERIORS else "elbo"
            implied = "sampled-elbo" if self.posterior in FLOWS else implied
            object.__setattr__(self, "objective", implied)
        require_known("source", self.source, (*SOURCES, "own"))
        if not re.fullmatch(r"[\w.-]+", self.dataset) or self.dataset.startswith("."):
            raise ValueError(
                f"dataset is {self.dataset!r}; as it becomes a file name, use letters, digits, "
                "'_', '-' and '.' only, and no '.' in front."
            )
        if self.source != "own":
            require_known("data set", self.dataset, DATASETS)
        require_known("architecture", self.architecture, ALL_NETWORKS)
        require_known("objective", self.objective, ALL_OBJECTIVES)
        require_known("initialisation", self.initialisation, INITIALISATIONS)
        require_known("kernel", self.kernel, KERNELS)
        require_known("schedule", self.schedule, SCHEDULES)
        if self.posterior in FLOWS and (self.objective != "sampled-elbo" or self.gap_images):
            raise ValueError(
                f"The KL of {self.posterior} has no closed form, which objective "
                f"{self.objective!r} with gap_images={self.gap_images!r} needs; choose "
                "objective='sampled-elbo' and gap_images=0."
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for objective, names in OBJECTIVE_SETTINGS.items():
            idle = [n for n in names if getattr(self, n) != defaults[n]]
            if idle and self.objective != objective:
                raise ValueError(
                    f"{', '.join(idle)} has no effect with objective {self.objective!r}; choose "
                    f"objective={objective!r} or leave it out."
                )
        for name in ("beta", "alpha", "lambda_", "clip_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 0.")
        for name in ("image_size", "gap_images", "validation_images", "patience"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 0.")
        for name in ("latent", "epochs", "batch_size", "iwae_samples", "iwae_images"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; it must be an integer of at least 0.")
        if self.patience and not self.validation_images:
            raise ValueError(
                f"patience is {self.patience}, but validation_images is 0; set some apart, as the "
                "test images must not decide when a run stops."
            )
        for name in ("compiled", "pictures", "binarised"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false.")
        for name in ("learning_rate", "head_scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be positive.")

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        try:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        except OverflowError:
            pass  # an integer of hundreds of digits
        raise ValueError(f"{name} is {value!r}; it must be a number.")

    @property
    def name(self) -> str:
        """File name of the record: the main fields, then the others where they are not default."""
        return self._name(f"e{self.epochs}", "epochs")

    @property
    def run_name(self) -> str:
        """File name of the checkpoint: the same without what can change as training goes on."""
        return self._name("", "epochs", *EVALUATION)

    def _name(self, epochs: str, *hidden: str) -> str:
        main = ("dataset", "source", "architecture", "objective", "posterior")
        parts = [getattr(self, key) for key in main]
        parts += [part for part in (f"d{self.latent}", epochs, f"s{self.seed}") if part]
        left_out = {*main, *hidden, "latent", "seed"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in left_out and value != field.default:
                parts.append(f"{field.name}={value}")
        return "-".join(parts)


def build_objective(experiment: Experiment) -> Callable[..., Terms]:
    """The objective of an experiment with its weights, (q, z, logits, x) -> Terms."""
    names = OBJECTIVE_SETTINGS.get(experiment.objective, ())
    settings = {name: getattr(experiment, name) for name in names}
    return functools.partial(ALL_OBJECTIVES[experiment.objective], **settings)


def build_vae(experiment: Experiment, image_shape: tuple[int, ...]) -> VAE:
    """The untrained model of an experiment, its weights drawn from the experiment's seed."""
    set_seed(experiment.seed, 0)
    bodies = ALL_NETWORKS[experiment.architecture](image_shape, experiment.latent)
    head = ALL_POSTERIORS[experiment.posterior](bodies.features, experiment.latent)
    vae = VAE(bodies.encoder, head, bodies.decoder)
    if experiment.initialisation in ("xavier", "released"):
        vae.apply(_xavier_uniform)
    if experiment.initialisation == "released":
        vae.apply(initialise_batch_norm)
    for parameter in head.parameters():
        parameter.data.mul_(experiment.head_scale)
    # The layout in which a CPU convolves fastest (notebooks/08, Section 8.5).
    return vae.float().to(memory_format=torch.channels_last)


def run_experiment(
    experiment: Experiment,
    *,
    train: Tensor | None = None,
    test: Tensor | None = None,
    root: str | Path | None = None,
    folder: str | Path | None = None,
    reuse: bool = False,
    checkpoints: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict:
    """Train, evaluate and describe one experiment.

    Args:
        experiment: what to run.
        train, test: your own images (see `as_images`), with source="own"; else the named set.
        root: folder of the full sets (see `load_images`).
        folder: where to save the record as JSON; nowhere if None.
        reuse: take the record from `folder` if this very experiment is there already.
        checkpoints: folder where every epoch is saved, and from where a run goes on that was
            interrupted or shall now have more epochs; nowhere if None. On the same device and
            with as many threads the numbers are those of a run that was never interrupted.
        device: "auto", or a name torch knows.
        progress: show a progress bar.
    Returns:
        The record, a dictionary of plain numbers and strings; see data/README.md.
    Raises:
        ValueError: own images that do not fit, or source="own" without them.
        FileNotFoundError: full data neither found nor to be downloaded.
        OSError: a folder that cannot be written to, before anything is trained.
    """
    path = Path(folder) / f"{experiment.name}.json" if folder else None
    images = None
    if reuse and path and path.is_file():
        record = load_record(path)
        try:  # Through Experiment, as an older record lacks the fields that came later.
            same = Experiment(**record["experiment"]) == experiment
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not state an experiment ({error}); delete it and run it again, or "
                "update rhovae."
            ) from None
        if same and experiment.source == "own":
            images = _images(experiment, train, test, root)
            same = record["data"] == _fingerprints(*images)
        if same:
            return record
    for kept in (folder, checkpoints):
        if kept:
            require_writable(kept, experiment.name)
    images = images or _images(experiment, train, test, root)
    place = pick_device(device)
    train, test = (resized(part, experiment.image_size).to(place) for part in images)
    train, validation = _validation(experiment, train)
    if experiment.binarised:
        test = drawn_once(test)
        validation = None if validation is None else drawn_once(validation)
    vae = build_vae(experiment, tuple(train.shape[1:])).to(place)
    origin = environment(place)
    checkpoint = _checkpoint(experiment, images, origin, checkpoints) if checkpoints else None
    history = fit(
        vae, train, test, build_objective(experiment),
        epochs=experiment.epochs, batch_size=experiment.batch_size,
        learning_rate=experiment.learning_rate, schedule=SCHEDULES[experiment.schedule],
        seed=experiment.seed, clip_norm=experiment.clip_norm, binarised=experiment.binarised,
        validation=validation, patience=experiment.patience, compiled=experiment.compiled,
        progress=progress, label=experiment.posterior,
        checkpoint=checkpoint,
    )  # fmt: skip
    start = time.perf_counter()
    record = {
        "schema": SCHEMA,
        "name": experiment.name,
        "experiment": dataclasses.asdict(experiment),
        "history": history,
        "test": judged_epoch(history)["test"],
        **_judge(experiment, vae, train, test, root),
        "parameters": {
            "total": count_parameters(vae),
            **{name: count_parameters(part) for name, part in vae.named_children()},
        },
        "data": _fingerprints(*images),
        "environment": origin,
    }
    if validation is not None:
        record["validation"] = {
            "images": len(validation),
            "sha256": fingerprint(validation),
            "epoch": judged_epoch(history)["epoch"],
        }
    if checkpoint and checkpoint.environments != [origin]:
        record["trained_in"] = checkpoint.environments
    training = sum(entry["seconds"] for entry in history)
    both = training + time.perf_counter() - start
    record["wall_time_s"] = {"training": round(training, 2), "all": round(both, 2)}
    if folder:
        save_record(record, folder)
    return record


def _judge(experiment: Experiment, vae: VAE, train: Tensor, test: Tensor, root) -> dict:
    """The parts of a record that say how good the trained model is."""
    named = experiment.source != "own"
    judged = test[: experiment.iwae_images]
    stream = functools.partial(set_seed, experiment.seed)  # each part has random numbers of its own
    stream(3)
    nll = iwae_nll(vae, judged, experiment.iwae_samples)
    bound = sampled_elbo if experiment.posterior in FLOWS else negative_elbo
    same_images, _ = evaluate(vae, judged, bound)
    iwae = {
        "nll": nll,
        "negative_elbo": same_images["negative_elbo"],
        "samples": experiment.iwae_samples,
        "images": len(judged),
    }
    stream(5)
    parts: dict = {"iwae": iwae, "latent": latent_statistics(vae, test)}
    if experiment.gap_images:
        stream(7)
        parts["gaps"] = inference_gaps(vae, test[: experiment.gap_images])
    if experiment.pictures:
        labels = load_labels(experiment.dataset, "test", experiment.source, root) if named else None
        stream(6)
        parts["quality"] = sample_quality(experiment.dataset, vae, test, train) if named else None
        stream(4)
        parts["images"] = pictures(vae, test)
        parts["map"] = latent_map(vae, test, labels)
    if hasattr(vae.encode(to_unit_interval(test[:1])), "charged_kl"):
        parts["published"] = decompose(vae, test, experiment.batch_size)
    return parts


def _validation(experiment: Experiment, train: Tensor) -> tuple[Tensor, Tensor | None]:
    """The images to train on, and those set apart."""
    count = experiment.validation_images
    if not count:
        return train, None
    if count >= len(train):
        raise ValueError(
            f"validation_images is {count}, but there are {len(train)} training images; leave some "
            "to train on."
        )
    set_seed(experiment.seed, 8)
    return set_apart(train, count)


def _checkpoint(experiment: Experiment, images, origin: dict, folder: str | Path) -> Checkpoint:
    """The place of a run, described by all that decides it: settings and images."""
    idle = {"epochs", *EVALUATION}
    run = {k: v for k, v in dataclasses.asdict(experiment).items() if k not in idle}
    defaults = {f.name: f.default for f in dataclasses.fields(Experiment) if f.name in run}
    path = Path(folder) / f"{experiment.run_name}.pt"
    data = _fingerprints(*images)
    defaults["image_shape"] = data["image_shape"]  # the first checkpoints did not state it
    return Checkpoint(path, run | data, origin, defaults)


def _fingerprints(train: Tensor, test: Tensor) -> dict:
    return {
        "train_sha256": fingerprint(train),
        "test_sha256": fingerprint(test),
        "image_shape": list(train.shape[1:]),
    }


def _images(experiment, train, test, root) -> tuple[Tensor, Tensor]:
    own = train is not None and test is not None
    if (experiment.source == "own") != own or (train is None) != (test is None):
        raise ValueError(
            f"source is {experiment.source!r} and {'' if own else 'not '}both train and test "
            "images were given; pass both with source='own', or neither to load a named set."
        )
    if own:
        train, test = as_images(train), as_images(test)
        if train.shape[1:] != test.shape[1:]:
            raise ValueError(
                f"Training images have shape {tuple(train.shape[1:])} and test images "
                f"{tuple(test.shape[1:])}; they must be the same."
            )
        return train, test
    train, test = (
        load_images(experiment.dataset, split, experiment.source, root)
        for split in ("train", "test")
    )
    return train, test


def _xavier_uniform(module: nn.Module) -> None:
    """Linear and Conv2d layers only, as in the paper's script; transposed ones keep torch's."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
