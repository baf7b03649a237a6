"""Studies of many small runs: one line of JSON per run, in one file per study.

Where a run takes seconds, hundreds of files would be in the way. A study is a file of lines,
each whole before the next begins, so it can be stopped at any point and goes on where it was.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .provenance import environment
from .records import write_whole


def read_lines(path: str | Path) -> list[dict]:
    """The runs of a study in the order in which they were made, none if there is no such file.

    Returns:
        Dictionaries with settings, result, seconds and environment.
    Raises:
        ValueError: a line that is not JSON, but for a last one that was cut short by a kill.
    """
    path = Path(path)
    text = path.read_text() if path.is_file() else ""
    *whole, _ = text.split("\n")  # what follows the last line break was never finished
    runs = []
    for number, line in enumerate(whole, 1):
        try:
            runs.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"Line {number} of {path} is not JSON ({error}); delete that line to have its run "
                "made again."
            ) from None
    return runs


def run_missing(
    path: str | Path, settings: Iterable[dict], run: Callable[..., dict], progress: bool = True
) -> list[dict]:
    """Make the runs of a study that its file does not have yet, and append each as it ends.

    Args:
        path: the file, made if it is missing.
        settings: what to run, each a dictionary of plain values that names one run.
        run: called with one of them as keyword arguments; returns plain numbers, strings, lists.
        progress: show a progress bar.
    Returns:
        All runs of the file, as `read_lines`.
    Raises:
        ValueError: a result with NaN or infinity; nothing is written of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = read_lines(path)
    text = "".join(json.dumps(r) + "\n" for r in runs)
    if path.is_file() and path.read_text() != text:  # a line that a kill has cut short
        write_whole(path, text.encode())
    done = [r["settings"] for r in runs]
    missing = [s for s in settings if s not in done]
    for chosen in tqdm(missing, desc=path.stem, disable=None if progress else True):
        start = time.perf_counter()
        result = run(**chosen)
        entry = {
            "settings": chosen,
            "result": result,
            "seconds": round(time.perf_counter() - start, 2),
            "environment": environment(torch.device("cpu")),
        }
        line = json.dumps(entry, allow_nan=False) + "\n"
        with path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    return read_lines(path)
