"""Images as uint8 tensors in memory, (n, 1, height, width): no workers, no per-image Python.

Three sources: the samples embedded in the repository (10,000 training and 2,000 test images per
set), the full sets through torchvision, and your own array through `as_images`.
"""

import hashlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # torchvision's names
SPLITS = ("train", "test")
SOURCES = ("embedded", "full")

EMBEDDED_SHA256 = {
    "mnist": "0f13b3d4b41e8f9fcc5d7894d35d91c99266fde411a39964f88fe9abd8c18588",
    "fashion-mnist": "d2e3082e52dc42e8731b36c46651bc201c3960ae50470802125daac2de29c144",
}
# Of pixels and labels, as bytes.
FULL_SHA256 = {
    ("mnist", "train"): "edc0d1098aa497be14ace79ddd5171e5a3dcf9c4d196c015389203eb3ba1f59b",
    ("mnist", "test"): "c3f9adf9c66efb572b1f9326c3a511b45910c7173b97be66ceceeeeaef6b802b",
    ("fashion-mnist", "train"): "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    ("fashion-mnist", "test"): "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
}

# Of the clone that this package lies in. A wheel holds code alone, and nothing is there then.
DATA_FOLDER = Path(__file__).resolve().parents[2] / "data"


def load_images(
    name: str, split: str = "train", source: str = "embedded", root: str | Path | None = None
) -> Tensor:
    """Images of a set, in memory.

    Args:
        name: "mnist" or "fashion-mnist".
        split: "train" or "test".
        source: "embedded" for the sample in this repository, "full" for all 60,000 or 10,000.
        root: folder with the full sets in torchvision's layout; else the environment variable
            RHOVAE_DATA, else data/torchvision/ in a clone or ~/.cache/rhovae/. Sets that are
            missing there are downloaded by torchvision.
    Returns:
        uint8 tensor of shape (n, 1, 28, 28), 0 is black.
    Raises:
        ValueError: an unknown name, split or source, or an embedded file that was altered.
        FileNotFoundError: full data neither found nor to be had from the network.
    """
    return as_images(_load(name, split, source, root)[0])


def load_labels(
    name: str, split: str = "train", source: str = "embedded", root: str | Path | None = None
) -> Tensor:
    """Classes 0 to 9 of the images that `load_images` gives for the same arguments, int64 (n,)."""
    return torch.as_tensor(_load(name, split, source, root)[1]).long()


def _load(name: str, split: str, source: str, root) -> tuple[np.ndarray, np.ndarray]:
    require_known("data set", name, DATASETS)
    require_known("split", split, SPLITS)
    require_known("source", source, SOURCES)
    if source == "embedded":
        arrays = _embedded(name)
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]
    full = _full(name, split, root)
    return full.data.numpy(), full.targets.numpy()


def as_images(images: np.ndarray | Tensor) -> Tensor:
    """Your own images as this package wants them: uint8, (n, channels, height, width).

    Args:
        images: array or tensor of shape (n, height, width) or (n, channels, height, width), either
            uint8 or floating point in [0, 1], which is rounded to 256 levels.
    Returns:
        uint8 tensor of shape (n, channels, height, width).
    Raises:
        ValueError: for any other shape, type or range.
    """
    images = torch.as_tensor(images)
    if images.dim() == 3:
        images = images.unsqueeze(1)
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(
            f"Images have shape {tuple(images.shape)}; expected at least one image as "
            "(n, height, width) or (n, channels, height, width)."
        )
    if images.is_floating_point():
        low, high = images.min().item(), images.max().item()
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"Floating-point images lie between {low:.6g} and {high:.6g}; scale them to "
                "[0, 1], without NaN, or pass uint8."
            )
        images = (images * 255).round().to(torch.uint8)
    if images.dtype != torch.uint8:
        raise ValueError(
            f"Images have type {images.dtype}; pass uint8 in 0..255 or floating point in [0, 1]."
        )
    return images.contiguous()


def to_unit_interval(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1], the input of an encoder."""
    if images.dtype != torch.uint8:
        raise ValueError(f"Images have type {images.dtype}; convert them with as_images first.")
    return images.to(torch.float32).div_(255)


def resized(images: Tensor, size: int) -> Tensor:
    """Bilinear and antialiased, as the paper's script resizes through Pillow; 0: as they are."""
    if size == 0 or images.shape[-2:] == (size, size):
        return images
    from torchvision.transforms.v2 import functional  # here, as it loads more than torch does

    return functional.resize(images, [size, size], antialias=True)


def set_apart(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All images but `count`, and those, drawn by torch's global generator on the CPU."""
    order = torch.randperm(len(images))
    kept, apart = (part.sort().values for part in (order[count:], order[:count]))
    return images[kept], images[apart]


def drawn_once(images: Tensor) -> Tensor:
    """Binary images: each pixel 255 with its grey value as probability, else 0.

    By random numbers of their own, so that every run is judged on the same ones.
    """
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(images.shape, generator=generator, dtype=torch.float32)
    return (255 * chance < images.cpu()).to(images).mul(255)


def fingerprint(images: Tensor) -> str:
    """SHA-256 over the bytes of an image tensor: which data a record was made from."""
    return hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()


def require_known(what: str, name: str, known) -> None:
    """Refuse a name that is not among the known ones, and list those."""
    if name not in known:
        raise ValueError(f"Unknown {what} {name!r}; known are {', '.join(map(repr, known))}.")


def _embedded(name: str) -> dict[str, np.ndarray]:
    path = DATA_FOLDER / "embedded" / f"{name}.npz"
    if not path.parent.is_dir():
        raise FileNotFoundError(
            "The embedded images are in the repository and not in the installed package; clone it "
            "and run there, or use source='full'."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"The embedded sample {path.name} is not in {path.parent}; restore it with "
            "`git checkout data/embedded`."
        )
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != EMBEDDED_SHA256[name]:
        raise ValueError(
            f"The embedded sample {path} is damaged: its SHA-256 is {found[:16]}..., expected "
            f"{EMBEDDED_SHA256[name][:16]}...; restore it with `git checkout data/embedded`."
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def _default_root() -> Path:
    """Where full sets are looked for and downloaded to, unless told otherwise."""
    cache = Path.home() / ".cache" / "rhovae"
    return DATA_FOLDER / "torchvision" if DATA_FOLDER.is_dir() else cache


def _download(dataset: type, folder: Path) -> None:
    """Fetch a set into a place of its own, then move its files: runs that start together each find
    whole files or none."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as place:
        dataset(place, download=True)
        for file in Path(place).rglob("*-ubyte"):
            file.replace(folder / file.name)


def _check_whole(full, name: str, split: str) -> None:
    """Files can have the right form and the wrong content."""
    digest = hashlib.sha256(full.data.numpy().tobytes())
    digest.update(full.targets.numpy().astype(np.uint8).tobytes())
    expected = FULL_SHA256[name, split]
    if digest.hexdigest() != expected:
        raise ValueError(
            f"the SHA-256 of its {split} images and labels is {digest.hexdigest()[:16]}..., "
            f"expected {expected[:16]}..."
        )


def _full(name: str, split: str, root: str | Path | None):
    from torchvision import datasets  # here, as it loads more than torch does

    root = Path(root or os.environ.get("RHOVAE_DATA") or _default_root())
    dataset, train = getattr(datasets, DATASETS[name]), split == "train"
    folder = root / DATASETS[name] / "raw"
    complete = len(list(folder.glob("*-ubyte"))) == 4
    try:
        if not complete:
            _download(dataset, folder)
        full = dataset(root, train=train)
        _check_whole(full, name, split)
        return full
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged files fail in more ways than can be listed
        reason = f"({type(error).__name__}: {' '.join(str(error).split()).rstrip('; ')})"
    if complete:
        raise ValueError(
            f"The full {name} in {folder} is damaged {reason}; delete its files there to have them "
            "downloaded again, or use source='embedded'."
        )
    for made in (folder, folder.parent):  # they were made for the download
        if made.is_dir() and not any(made.iterdir()):
            made.rmdir()
    raise FileNotFoundError(
        f"The full {name} is not in {folder} and could not be downloaded {reason}; put "
        "torchvision's four files of it there, point RHOVAE_DATA or root at a folder that has "
        "them, or use source='embedded'."
    )
