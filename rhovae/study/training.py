"""Fit a VAE: epochs over images that are already in memory, one history entry per epoch."""

import copy
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..objectives import Terms
from ..vae import VAE
from .checkpoint import Checkpoint
from .data import to_unit_interval
from .evaluation import evaluate, means_per_image


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or for "auto" the first there is of cuda, mps and cpu."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def set_seed(seed: int, *path: int) -> None:
    """Seed torch's generators on every device for one stage of a run, named by integers.

    Each epoch has a stream of its own, so that what happens between two epochs (an evaluation, an
    interruption) cannot change what follows.
    """
    state = np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def fit(
    vae: VAE,
    train: Tensor,
    test: Tensor,
    objective: Callable[..., Terms],
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    schedule: Callable[[int], float] | None = None,
    seed: int = 0,
    clip_norm: float = 0.0,
    binarised: bool = False,
    validation: Tensor | None = None,
    patience: int = 0,
    compiled: bool = False,
    progress: bool = True,
    label: str = "",
    checkpoint: Checkpoint | None = None,
) -> list[dict]:
    """Train with Adam on the mean objective of each batch, and evaluate after every epoch.

    Seeds torch's global generators. The order of the images is drawn on the CPU and is therefore
    the same on every device.

    Args:
        vae: the model, on the device of the images.
        train, test: uint8 images (n, channels, height, width).
        objective: (q, z, logits, x) -> Terms, per image.
        epochs, batch_size, learning_rate: of Adam; the last, smaller batch is kept.
        schedule: the epoch, from 1 -> factor on the learning rate; a constant rate if None.
        seed: of the order of the images and of the posterior draws.
        clip_norm: the norm to which a larger gradient is shortened; 0 for no limit. It helps
            against single batches with a large gradient. Adam divides a constant factor out
            again, so against a learning rate that is too high it does not.
        binarised: draw the pixels of every training batch afresh, 1 with their grey value as
            probability, else 0.
        validation: uint8 images that are neither trained on nor reported. The model is left as it
            was after the epoch with the lowest loss on them, and not after the last.
        patience: after how many epochs without a lower loss on them to stop; 0 for never.
        compiled: let torch.compile make one piece of code of model, objective and gradient, on a
            GPU as a CUDA graph. Needs a C++ compiler and takes seconds before the first step.
        progress: show a tqdm bar over epochs.
        label: what the bar is called.
        checkpoint: where to save every epoch, and to go on from if it holds this run already. The
            numbers are those of a run that was never interrupted.
    Returns:
        One entry per epoch: epoch, train and test means in nats per image (loss, negative_elbo,
        reconstruction, kl), the mean rho over test images (None without a rho), and seconds; with
        validation images their means as well. See `judged_epoch`.
    Raises:
        ValueError: patience without validation images.
        FloatingPointError: a training or test loss that is no longer finite, with epoch and step,
            and loss and largest gradient of the last step before. The checkpoint stays that of
            the epoch before.
    """
    if patience and validation is None:
        raise ValueError(
            f"patience is {patience}, but there are no validation images; set some apart, as the "
            "test images must not decide when a run stops."
        )
    # The fused kernel is the fastest where measured, and not there on every device.
    fused = train.device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(vae.parameters(), lr=learning_rate, fused=fused)
    history = checkpoint.restore(epochs, vae, optimizer) if checkpoint else []
    if history is None:
        history, checkpoint = [], None
    done = len(history)
    best = checkpoint.best if checkpoint else None
    loss_of = batch_loss(vae, objective, compiled, binarised)
    bar = tqdm(
        range(done + 1, epochs + 1), initial=done, total=epochs,
        desc=label, unit="epoch", disable=None if progress else True,
    )  # fmt: skip
    for epoch in bar:
        if patience and history and epoch - 1 - judged_epoch(history)["epoch"] >= patience:
            break
        start = time.perf_counter()
        if schedule:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(epoch)
        set_seed(seed, 1, epoch)
        before = copy.deepcopy((vae.state_dict(), optimizer.state_dict()))
        sums = train_epoch(vae, train, loss_of, optimizer, batch_size, clip_norm)
        bad = (~sums[:, 0].isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            vae.load_state_dict(before[0])
            optimizer.load_state_dict(before[1])
            set_seed(seed, 1, epoch)  # once more, as far as all was well
            train_epoch(vae, train, loss_of, optimizer, batch_size, clip_norm, steps=step)
            last = _last_step(vae, sums[:step, 0], batch_size)
            raise FloatingPointError(
                f"The training loss became {sums[step, 0].item()} in step {step + 1} of "
                f"{len(sums)} of epoch {epoch} of {epochs}; {last}. Lower the learning rate (it is "
                f"{learning_rate}); if single batches are to blame, clip_norm (it is {clip_norm}) "
                "limits their gradient."
            )
        train_means = means_per_image(sums, len(train))
        set_seed(seed, 2)  # the same draws after every epoch, so that curves show the model move
        test_means, rho = evaluate(vae, test, objective, batch_size)
        means = {"test": test_means}
        if validation is not None:
            set_seed(seed, 9)
            means["validation"], _ = evaluate(vae, validation, objective, batch_size)
        for name, found in means.items():
            if not all(map(math.isfinite, found.values())):
                raise FloatingPointError(
                    f"The {name} loss became {found['loss']} after epoch {epoch} of {epochs}, with "
                    f"a training loss of {train_means['loss']:.6g}; lower the learning rate (it is "
                    f"{learning_rate})."
                )
        entry = {"epoch": epoch, "train": train_means, **means, "rho": rho}
        history.append(entry | {"seconds": round(time.perf_counter() - start, 2)})
        if validation is not None and judged_epoch(history) is history[-1]:
            best = copy.deepcopy(vae.state_dict())
        if checkpoint:
            checkpoint.best = best
            checkpoint.save(history, vae, optimizer)
        bar.set_postfix_str(f"test -ELBO {test_means['negative_elbo']:.2f} nats")
    if best:
        vae.load_state_dict(best)
    return history


def judged_epoch(history: list[dict]) -> dict:
    """The entry of the epoch whose model `fit` leaves: the last, or the best on validation images.

    The first of several that are equally good.
    """
    if "validation" not in history[-1]:
        return history[-1]
    return min(history, key=lambda entry: entry["validation"]["loss"])


def tripling(epoch: int) -> float:
    """10^(-i / 7) in stage i = 0, ..., 7, which has 3^i epochs: 3,280 in all (Burda et al. 2016).

    The stages end after epochs 1, 4, 13, 40, 121, 364, 1,093 and 3,280.
    """
    stage = sum(epoch > (3**i - 1) // 2 for i in range(1, 8))
    return float(10 ** (-stage / 7))


SCHEDULES: dict[str, Callable[[int], float] | None] = {"constant": None, "tripling": tripling}


def batch_loss(
    vae: VAE, objective: Callable[..., Terms], compiled: bool = False, binarised: bool = False
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x -> the mean loss of a batch of images in [0, 1], and the sums of its Terms, (3,).

    The pixels are drawn as 0 or 1 first if `binarised`.
    """
    if binarised:
        loss_of_drawn = batch_loss(vae, objective, compiled)
        return lambda x: loss_of_drawn(x.bernoulli())

    def loss_of(x: Tensor) -> tuple[Tensor, Tensor]:
        terms = objective(*vae(x), x)
        return terms.loss.mean(), torch.stack(terms).detach().sum(1)

    if not compiled:
        return loss_of
    cuda = next(vae.parameters()).is_cuda
    graph = torch.compile(loss_of, mode="reduce-overhead" if cuda else "default")

    def compiled_loss_of(x: Tensor) -> tuple[Tensor, Tensor]:
        loss, sums = graph(x)
        return loss, sums.clone()  # a CUDA graph writes its results into the same memory each time

    return compiled_loss_of


def train_epoch(
    vae: VAE,
    images: Tensor,
    loss_of: Callable[[Tensor], tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    clip_norm: float = 0.0,
    steps: int | None = None,
) -> Tensor:
    """One pass in random order; the loss of each batch, with the weights of its step.

    Images stay where they are, as bytes; a step gathers and scales its own. Nothing is asked of
    the device.

    Args:
        vae: the model; left in training mode.
        images: uint8, (n, channels, height, width), on the device of the model.
        loss_of: see `batch_loss`.
        optimizer: of the model's parameters.
        batch_size: images in a step; the last, smaller batch is kept.
        clip_norm: the norm to which a larger gradient is shortened; 0 for no limit.
        steps: how many batches of the pass to take; all if None.
    Returns:
        Sums over each batch of loss, reconstruction and KL in nats, (batches, 3).
    """
    vae.train()
    order = torch.randperm(len(images)).to(images.device)
    sums = []
    for indices in order.split(batch_size)[:steps]:
        loss, of_batch = loss_of(to_unit_interval(images.index_select(0, indices)))
        optimizer.zero_grad()
        loss.backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(vae.parameters(), clip_norm)
        optimizer.step()
        sums.append(of_batch)
    return torch.stack(sums) if sums else torch.zeros(0, 3, device=images.device)


def _last_step(vae: VAE, losses: Tensor, batch_size: int) -> str:
    """The loss of the last step that was taken, and where its gradient was largest."""
    gradients = {n: p.grad.abs().max() for n, p in vae.named_parameters() if p.grad is not None}
    if not len(losses) or not gradients:
        return "no step of it went well"
    name = max(gradients, key=lambda name: float(gradients[name]))
    return (
        f"the step before had {losses[-1].item() / batch_size:.6g} nats per image, and its largest "
        f"gradient in {name} ({gradients[name].item():.3g})"
    )
