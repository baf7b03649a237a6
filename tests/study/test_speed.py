"""What can be tested of speed without a clock: memory, synchronisation, compiled training."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rhovae.objectives import negative_elbo
from rhovae.study import Experiment, run_experiment
from rhovae.study.evaluation import iwae_nll
from rhovae.study.experiments import build_vae
from rhovae.study.training import batch_loss, train_epoch

pytestmark = pytest.mark.usefixtures("float32")

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
CHAIN = """
q = AR1Normal(torch.randn(16, 100_000, requires_grad=True), torch.ones(16, 1, requires_grad=True),
              torch.full((16, {steps}), 0.9, requires_grad=True))
loss = q.log_prob(q.rsample().detach()).sum() + q.rsample().sum()
loss.backward()
"""


def peak_growth(code: str) -> float:
    """MiB by which a process of its own grows at most while it runs the code."""
    program = f"""
import torch
from rhovae import AR1Normal
def peak():
    # Not getrusage: its peak is that of whoever started this process, if that was higher.
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
{code}
print(peak() - before)
"""
    return float(subprocess.check_output([sys.executable, "-c", program], text=True))


@LINUX
@pytest.mark.parametrize("steps", (1, 99_999))
def test_a_chain_of_100_000_needs_no_matrix(steps):
    """One 100,000 x 100,000 matrix would take 37 GiB; draws and gradients take some vectors."""
    assert peak_growth(CHAIN.format(steps=steps)) < 512


def test_memory_does_not_grow_with_importance_samples():
    """Counted, not measured: what a process holds varies by 60 MiB from run to run."""

    class Largest(TorchDispatchMode):
        mib = 0.0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.mib = max([self.mib, *(x.untyped_storage().nbytes() / 2**20 for x in made)])
            return out

    images = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8)
    vae = build_vae(Experiment("mnist", latent=20), (1, 28, 28))
    largest = []
    for samples in (500, 5000):
        with Largest() as tensors:
            iwae_nll(vae, images, samples=samples)
        largest.append(tensors.mib)
    assert largest[1] <= largest[0] < 32, "5,000 decoded samples of 50 images would be 750 MiB"


def test_an_epoch_asks_the_device_only_once():
    """.item() and its like make a GPU wait; they may not come with every step."""

    class Questions(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    images = torch.randint(0, 256, (256, 1, 28, 28), dtype=torch.uint8)
    counts = []
    for batch_size in (128, 8):
        vae = build_vae(Experiment("mnist", latent=5), (1, 28, 28))
        optimizer = torch.optim.Adam(vae.parameters(), fused=True)
        with Questions() as questions:
            train_epoch(vae, images, batch_loss(vae, negative_elbo), optimizer, batch_size)
        counts.append(questions.count)
    assert counts[0] == counts[1], "2 steps or 32"


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_training_is_training():
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except Exception as error:
        pytest.skip(f"no working compiler here: {type(error).__name__}")
    train = torch.randint(0, 64, (200, 8, 8)).to(torch.uint8)
    losses = []
    for compiled in (False, True):
        experiment = Experiment("noise", source="own", latent=3, epochs=3, batch_size=50,
                                compiled=compiled, pictures=False, iwae_samples=5)  # fmt: skip
        record = run_experiment(experiment, train=train, test=train, device="cpu", progress=False)
        losses.append(record["history"][-1]["test"]["loss"])
    # The draws are others; over 200 images their mean is nearly the same.
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
