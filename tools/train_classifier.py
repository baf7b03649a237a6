"""Train the classifiers whose features judge samples: python tools/train_classifier.py [--root F]

From the full training sets, with one seed and one thread, into data/classifiers/.
"""

import argparse

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from rhovae.study.data import DATASETS, load_images, load_labels, to_unit_interval
from rhovae.study.quality import build_classifier, classifier_file
from rhovae.study.training import set_seed

EPOCHS, BATCH, LEARNING_RATE = 5, 128, 3e-3


def train(dataset: str, root: str | None) -> float:
    """Write the classifier of a set and return its accuracy on the test images."""
    images, test = (load_images(dataset, split, "full", root) for split in ("train", "test"))
    labels, wanted = (load_labels(dataset, split, "full", root) for split in ("train", "test"))
    set_seed(0)
    classifier = build_classifier()
    network = torch.nn.Sequential(*classifier.values())
    optimizer = torch.optim.Adam(network.parameters())
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in tqdm(range(EPOCHS), desc=dataset, unit="epoch"):
        network.train()
        for indices in torch.randperm(len(images)).split(BATCH):
            loss = cross_entropy(network(to_unit_interval(images[indices])), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        predicted = torch.cat([network(to_unit_interval(x)).argmax(1) for x in test.split(1000)])
    accuracy = (predicted == wanted).double().mean().item()
    path = classifier_file(dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), path, metadata={"test_accuracy": f"{accuracy:.4f}"})
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder with the full sets in torchvision's layout")
    root = parser.parse_args().root
    torch.set_num_threads(1)
    for dataset in DATASETS:
        print(f"{dataset}: {train(dataset, root):.2%} of the test images")


if __name__ == "__main__":
    main()
