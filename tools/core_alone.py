"""The core as its users have it: the wheel and torch alone, in an environment of its own.

    python tools/core_alone.py [--torch 'torch==2.1.2']

Builds the wheel, installs it in a new environment outside the clone, runs the README's example and
the core's tests there. Nothing of the study is installed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "mpmath")  # what the tests themselves need


def example() -> str:
    """The README's first Python example."""
    return re.search(r"```python\n(import torch.*?)```", (ROOT / "README.md").read_text(), re.S)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch", help="what to install, e.g. torch==2.1.2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        wheels = ["wheel", "-q", "--no-deps", "-w", folder / "wheel", ROOT]
        subprocess.run([*pip, *wheels], check=True)
        (wheel,) = (folder / "wheel").glob("*.whl")
        subprocess.run([*pip, "install", "-q", wheel, arguments.torch, *TOOLS], check=True)
        shutil.copytree(ROOT / "tests" / "core", folder / "tests")
        shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
        # Not the clone's: a package on the path would hide what the wheel lacks.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        run = dict(cwd=folder, env=environment, check=True)
        shown = "import rhovae, torch; print('torch', torch.__version__, 'in', rhovae.__file__)"
        subprocess.run([python, "-c", f"{example()}\nassert kl.shape == (128,)\n{shown}"], **run)
        # Without -W error: old versions of torch warn, of a missing NumPy and of themselves.
        tests = [python, "-m", "pytest", "-q", "-n", "2", "tests"]
        subprocess.run(tests, **run)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"{' '.join(map(str, error.cmd[:4]))} ... failed with exit code {error.returncode}."
        )
