"""The study: data, training, evaluation, records and figures that the notebooks run on.

pip install rhovae[study]
"""

from importlib.util import find_spec

# All are looked for at once: some are imported only where they are used, as they take seconds.
for _name in ("matplotlib", "numpy", "PIL", "safetensors", "scipy", "torchmetrics", "torchvision",
              "tqdm"):  # fmt: skip
    if find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"rhovae.study needs {_name}, which is not installed; install it with: "
            "pip install rhovae[study]",
            name=_name,
        )

from .data import as_images, load_images  # noqa: E402
from .experiments import Experiment, run_experiment  # noqa: E402

__all__ = ["Experiment", "as_images", "load_images", "run_experiment"]
