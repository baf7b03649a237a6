"""Where a record comes from: device, versions and commit."""

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def environment(device: torch.device) -> dict:
    """What the numbers may depend on beyond the experiment, and where they came from."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("rhovae", "torch", "torchvision", "numpy")},
        "commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    """Installed version; None for a clone on the path that was not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _git_commit() -> str | None:
    """HEAD of the clone this package runs from, with + where files differ; None outside one."""
    here = Path(__file__).resolve().parents[1]
    if not (here.parent / ".git").exists():
        return None  # an installed package may lie inside somebody else's repository
    commands = ["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--", "."]
    try:
        head, changes = (
            subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changes.strip() else "")
