"""The study: data, training, evaluation, records and figures that the notebooks run on.

pip install rhovae[study]
"""

try:
    from .data import as_images, load_images
    from .experiments import Experiment, run_experiment
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"rhovae.study needs {error.name}, which is not installed; install it with: "
        "pip install rhovae[study]",
        name=error.name,
    ) from error

__all__ = ["Experiment", "as_images", "load_images", "run_experiment"]
