"""A run on disk after its latest epoch, so that it can be interrupted, resumed and extended.

One file holds weights, optimiser and history, and replaces its predecessor in one step: whatever
happens, the file is that of a whole epoch. Random numbers need no place in it, as each epoch has a
stream of its own (`training.set_seed`).
"""

import io
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from .records import write_whole


@dataclass
class Checkpoint:
    """Where a run is kept.

    Args:
        path: the file.
        run: what decides the numbers of each epoch.
        environment: versions, device and commit of this process.
        defaults: what the fields of `run` are in a file that was written before they existed.
    Attributes:
        environments: those that trained a part of the run, in order, as far as they differ.
        best: of a run with validation images the weights after the epoch that was best on them
            (`training.judged_epoch`); None before there is one.
    """

    path: Path
    run: dict
    environment: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)

    def __post_init__(self):
        self.environments = [self.environment]
        self.best: dict | None = None
        self._known = None

    def _stamp(self) -> tuple | None:
        """What tells that nobody else has written the file since."""
        if not self.path.is_file():
            return None
        found = self.path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size

    def save(self, history: list[dict], vae: nn.Module, optimizer: Optimizer) -> None:
        """Write the state after the last epoch of `history`, whole or not at all.

        Where another process that trains the same run is further, its file is left alone.
        """
        changed = self._stamp() not in (None, self._known)
        if changed and len(read_checkpoint(self.path)["history"]) > len(history):
            return
        state = {
            "run": self.run,
            "environments": self.environments,
            "history": history,
            "vae": vae.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        if self.best:
            state["best"] = self.best
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.path, buffer.getbuffer())
        self._known = self._stamp()

    def restore(self, epochs: int, vae: nn.Module, optimizer: Optimizer) -> list[dict] | None:
        """Bring the model and its optimiser to where the file stands, and return its history.

        Nothing is changed where there is no file (the history is empty), and where it is past the
        wanted number of epochs (None: it is worth more than what is wanted, and is not written
        over; so a shorter run after a longer one starts from the beginning and is not saved).

        Raises:
            ValueError: a file that cannot be read, or that of another run.
        """
        if not self.path.is_file():
            return []
        state = read_checkpoint(self.path)
        found = self.defaults | state["run"]
        differing = [key for key in found | self.run if found.get(key) != self.run.get(key)]
        if differing:
            raise ValueError(
                f"{self.path} is the checkpoint of another run: it differs in "
                f"{', '.join(differing)}; delete it, or choose another folder for checkpoints."
            )
        if len(state["history"]) > epochs:
            return None
        self.environments = state.get("environments", [])
        if len(state["history"]) < epochs and self.environment not in self.environments:
            self.environments.append(self.environment)
        try:
            vae.load_state_dict(state["vae"])
            optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch's words for weights of another network
            raise ValueError(
                f"{self.path} does not fit this model ({str(error).splitlines()[0]}); delete it to "
                "start over."
            ) from None
        self.best = state.get("best")
        self._known = self._stamp()
        return state["history"]


def read_checkpoint(path: str | Path) -> dict:
    """The contents of a checkpoint, on the CPU: run, history, vae, optimizer. No code is run.

    Raises:
        ValueError: a file that is not a whole checkpoint.
    """
    content = Path(path).read_bytes()  # what goes wrong here is not the content's fault
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        missing = {"run", "history", "vae", "optimizer"} - set(state)
        problem = f"it lacks {', '.join(sorted(missing))}" if missing else ""
        kinds = {"run": dict, "history": list}
        if not problem and any(not isinstance(state[key], kinds[key]) for key in kinds):
            problem = "its run or its history is of another type"
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive fails in more ways than can be listed
        problem = str(error).partition("\n")[0] or type(error).__name__
    if problem:
        raise ValueError(f"{path} is not a checkpoint ({problem}); delete it to start over.")
    return state
