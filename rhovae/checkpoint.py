"""A run on disk after its latest epoch, so that it can be interrupted, resumed and extended.

One file holds weights, optimiser and history, and replaces its predecessor in one step: whatever
happens, the file is that of a whole epoch. Random numbers need no place in it, as each epoch has a
stream of its own (`training.set_seed`).
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from .records import write_whole


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is kept.

    Args:
        path: the file.
        run: what decides the numbers of each epoch; a file with another description is not ours.
    """

    path: Path
    run: dict

    def save(self, history: list[dict], vae: nn.Module, optimizer: Optimizer) -> None:
        """Write the state after the last epoch of `history`, whole or not at all."""
        state = {
            "run": self.run,
            "history": history,
            "vae": vae.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.path, buffer.getbuffer())

    def restore(self, epochs: int, vae: nn.Module, optimizer: Optimizer) -> list[dict] | None:
        """Bring the model and its optimiser to where the file stands, and return its history.

        Nothing is changed where there is no file or that of another run (the history is empty), and
        where it is past the wanted number of epochs (None: it is worth more than what is wanted,
        and not to be written over).

        Raises:
            ValueError: a file that cannot be read.
        """
        if not self.path.is_file():
            return []
        state = read_checkpoint(self.path, next(vae.parameters()).device)
        if state["run"] != self.run:
            return []
        if len(state["history"]) > epochs:
            return None
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        return state["history"]


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """The contents of a checkpoint: run, history, vae, optimizer. Code in it is never run.

    Raises:
        ValueError: a file that is not a whole checkpoint.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        missing = {"run", "history", "vae", "optimizer"} - set(state)
        problem = f"it lacks {', '.join(sorted(missing))}" if missing else ""
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError) as error:
        problem = str(error).partition("\n")[0] or type(error).__name__
    if problem:
        raise ValueError(f"{path} is not a checkpoint ({problem}); delete it to start over.")
    return state
