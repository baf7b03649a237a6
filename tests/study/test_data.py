"""Images: the embedded samples, the full sets, and what a user brings."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from rhovae.study import as_images, data, load_images
from rhovae.study.data import load_labels


@pytest.mark.parametrize("name", data.DATASETS)
def test_embedded_samples(name):
    train, test = load_images(name, "train"), load_images(name, "test")
    assert train.dtype == test.dtype == torch.uint8
    assert train.shape == (10_000, 1, 28, 28) and test.shape == (2_000, 1, 28, 28)
    assert train.max() == 255 and train.min() == 0
    path = data.DATA_FOLDER / "embedded" / f"{name}.npz"
    with np.load(path, allow_pickle=False) as arrays:
        assert np.bincount(arrays["train_labels"]).min() > 800


def test_embedded_samples_are_small():
    sizes = [p.stat().st_size for p in (data.DATA_FOLDER / "embedded").glob("*.npz")]
    assert len(sizes) == 2 and sum(sizes) < 10e6


def test_the_readme_of_the_data_states_the_checksums():
    readme = (data.DATA_FOLDER / "README.md").read_text()
    for name, digest in data.EMBEDDED_SHA256.items():
        content = (data.DATA_FOLDER / "embedded" / f"{name}.npz").read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert digest in readme


def test_a_damaged_sample_is_refused(tmp_path, monkeypatch):
    content = bytearray((data.DATA_FOLDER / "embedded" / "mnist.npz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "mnist.npz").write_bytes(content)
    monkeypatch.setattr(data, "DATA_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"mnist.npz is damaged: its SHA-256 .*git checkout"):
        load_images("mnist")
    with pytest.raises(FileNotFoundError, match=r"fashion-mnist.npz is not in .*git checkout"):
        load_images("fashion-mnist")


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_full_set(root, folder="MNIST", train=30, test=20):
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (train + test, 28, 28))
    for prefix, part in (("train", pixels[:train]), ("t10k", pixels[train:])):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(part))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.zeros(len(part))))
    return pixels


@pytest.fixture
def any_content(monkeypatch):
    """For tests with small sets in the place of the real ones."""
    monkeypatch.setattr(data, "_check_whole", lambda *_: None)


@pytest.mark.usefixtures("any_content")
def test_full_sets_in_torchvisions_layout(tmp_path, monkeypatch):
    pixels = write_full_set(tmp_path)
    train = load_images("mnist", "train", "full", root=tmp_path)
    assert torch.equal(train[:, 0], torch.as_tensor(pixels[:30], dtype=torch.uint8))
    monkeypatch.setenv("RHOVAE_DATA", str(tmp_path))
    assert load_images("mnist", "test", "full").shape == (20, 1, 28, 28)


def test_full_data_missing_without_network(tmp_path, monkeypatch):
    def no_network(self):
        Path(self.raw_folder).mkdir(parents=True)
        raise RuntimeError("Error downloading:\nno route to host\n")

    monkeypatch.setattr(datasets.MNIST, "download", no_network)
    with pytest.raises(FileNotFoundError) as error:
        load_images("fashion-mnist", source="full", root=tmp_path)
    message = str(error.value)
    assert str(tmp_path / "FashionMNIST" / "raw") in message and "no route to host" in message
    assert "RHOVAE_DATA" in message and "source='embedded'" in message
    assert error.value.__context__ is None and "\n" not in message
    assert not list(tmp_path.iterdir()), "empty folders left behind"


@pytest.mark.usefixtures("any_content")
def test_a_download_shows_whole_files_or_none(tmp_path, monkeypatch):
    """Runs start together: what one sees of another's download must be complete."""
    raw = tmp_path / "MNIST" / "raw"

    def slow_network(self):
        write_full_set(Path(self.root))
        assert not list(raw.glob("*-ubyte")), "a file under its final name, and not all written"

    monkeypatch.setattr(datasets.MNIST, "download", slow_network)
    assert load_images("mnist", "test", "full", root=tmp_path).shape == (20, 1, 28, 28)
    assert (
        len(list(raw.iterdir())) == 4 and load_labels("mnist", "test", "full", tmp_path).sum() == 0
    )


def test_a_truncated_full_set_is_refused(tmp_path):
    write_full_set(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"full mnist in .*MNIST/raw is damaged .* delete"):
        load_images("mnist", source="full", root=tmp_path)


def test_a_full_set_of_other_images_is_refused(tmp_path):
    write_full_set(tmp_path)
    with pytest.raises(ValueError, match=r"is damaged .*SHA-256 of its test images "):
        load_images("mnist", "test", "full", root=tmp_path)


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (("cifar",), "Unknown data set 'cifar'; known are 'mnist', 'fashion-mnist'"),
        (("mnist", "valid"), "Unknown split 'valid'; known are 'train', 'test'"),
        (("mnist", "train", "half"), "Unknown source 'half'; known are 'embedded', 'full'"),
    ],
)
def test_unknown_names_are_refused_with_those_that_exist(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_images(*arguments)


def test_own_images():
    floats = np.linspace(0, 1, 2 * 3 * 4).reshape(2, 3, 4)
    images = as_images(floats)
    assert images.shape == (2, 1, 3, 4) and images.dtype == torch.uint8
    torch.testing.assert_close(data.to_unit_interval(images)[:, 0].double(),
                               torch.as_tensor(floats), rtol=0, atol=0.5 / 255 + 1e-6)  # fmt: skip
    assert as_images(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)).shape == (5, 3, 8, 8)


@pytest.mark.parametrize(
    "images,sentence",
    [
        (np.zeros((3, 4)), r"shape \(3, 4\); expected at least one image as \(n, height, width\)"),
        (np.zeros((0, 28, 28)), r"expected at least one image"),
        (np.full((1, 2, 2), 255.0), r"lie between 255 and 255; scale them to \[0, 1\]"),
        (np.full((1, 2, 2), -0.1), r"scale them to \[0, 1\]"),
        (np.full((1, 2, 2), math.nan), r"lie between nan and nan; .* without NaN"),
        (np.zeros((1, 2, 2), dtype=np.int64), r"type torch.int64; pass uint8"),
    ],
)
def test_own_images_of_the_wrong_kind_are_refused(images, sentence):
    with pytest.raises(ValueError, match=sentence):
        as_images(images)


def test_images_that_are_no_bytes_are_not_scaled():
    with pytest.raises(ValueError, match=r"type torch.float64; convert them with as_images first"):
        data.to_unit_interval(torch.zeros(1, 1, 2, 2))


def test_the_fingerprint_sees_every_pixel():
    images = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    before = data.fingerprint(images)
    images[1, 0, 2, 2] = 1
    assert data.fingerprint(images) != before
