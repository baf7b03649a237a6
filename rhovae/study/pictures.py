"""What a record keeps to be looked at: images as base64 PNG, and a map of the latent space."""

import numpy as np
import torch
from torch import Tensor

from ..vae import VAE
from .data import to_unit_interval
from .records import encode_png

SAMPLES, RECONSTRUCTIONS = 32, 8
TRAVERSED, PAIRS, STEPS = 10, 4, 8
MAPPED = 1000


@torch.no_grad()
def pictures(vae: VAE, test: Tensor) -> dict[str, str]:
    """Rows of small images, drawn with torch's global generator; `records.decode_png` reads them.

    Returns:
        samples: draws of the prior, decoded.
        originals, reconstructions: the first test images, and decoded from their posterior means.
        traversals: the code of the first test image with one latent variable after the other (the
            first ten at most) moved from -3 to 3 in eight steps, one variable after the other.
        interpolations: four pairs of test images, in eight equal steps between their codes.
    """
    vae.eval()
    originals = test[torch.arange(RECONSTRUCTIONS) % len(test)]
    x = to_unit_interval(originals)
    codes = vae.encode(x).mean
    steps = torch.linspace(0, 1, STEPS, device=codes.device, dtype=codes.dtype)
    traversed = codes[0].repeat(min(TRAVERSED, codes.shape[-1]), STEPS, 1)
    for variable, row in enumerate(traversed):
        row[:, variable] = 6 * steps - 3
    starts, ends = codes[:PAIRS].unsqueeze(1), codes[PAIRS:].unsqueeze(1)
    between = torch.lerp(starts, ends, steps[:, None])
    rows = {
        "samples": vae.generate(SAMPLES),
        "originals": x,
        "reconstructions": vae.decoder(codes).sigmoid(),
        "traversals": vae.decoder(traversed.flatten(0, 1)).sigmoid(),
        "interpolations": vae.decoder(between.flatten(0, 1)).sigmoid(),
    }
    return {key: encode_png(_pixels(row)) for key, row in rows.items()}


def _pixels(images: Tensor) -> np.ndarray:
    """Three channels are shown in colour; of any other number the first, in grey."""
    grey_values = (images * 255).round().to(torch.uint8).cpu()
    in_colour = images.shape[1] == 3
    return (grey_values.permute(0, 2, 3, 1) if in_colour else grey_values[:, 0]).numpy()


@torch.no_grad()
def latent_map(vae: VAE, test: Tensor, labels: Tensor | None) -> dict:
    """Where the posterior means of the first test images lie, in two dimensions.

    Returns:
        points: (x, y) per image: the two latent variables, or where there are more the first two
            principal components of the means, to three decimals.
        explained: share of the variance of the means that the plane shows; None where there is
            none to share: one variable, or means that are all the same.
        labels: class of each image, or None.
    """
    vae.eval()
    batches = test[:MAPPED].split(500)
    means = (
        torch.cat([vae.encode(to_unit_interval(batch)).mean for batch in batches]).cpu().double()
    )
    explained = None
    if means.shape[-1] == 1:
        points = torch.cat((means, torch.zeros_like(means)), -1)
    elif means.shape[-1] == 2:
        points, explained = means, 1.0
    elif not (centred := means - means.mean(0)).any():
        points = means[:, :2]
    else:
        _, values, axes = torch.linalg.svd(centred, full_matrices=True)
        # The sign of a principal axis is arbitrary: let its largest entry be positive.
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        points = means @ (axes * largest.sign())[:2].T
        explained = round((values[:2].square().sum() / values.square().sum()).item(), 4)
    return {
        "points": [[round(v, 3) for v in point] for point in points.tolist()],
        "explained": explained,
        "labels": labels[:MAPPED].tolist() if labels is not None else None,
    }
