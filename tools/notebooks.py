"""Keep the committed notebooks clean, and run them.

    python tools/notebooks.py normalise [NOTEBOOK ...]    rewrite in the one normal form
    python tools/notebooks.py execute [NOTEBOOK ...]      run with the default parameters, in place
    python tools/notebooks.py run OUT NOTEBOOK [-p NAME VALUE ...]    run a copy

In the normal form a rerun with the same results changes no byte: fixed metadata, code cells counted
1..n, joined streams, no widget states, stable ids; and the first code cell, which finds or installs
the package, and the badge at the top both carry the address that stands in pyproject.toml. That
cell is tagged so that the book folds it.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import papermill
import tomllib
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SETUP = """\
# Use the clone this notebook lies in; elsewhere (Colab) clone it, and install what is missing.
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

here = Path.cwd()
places = (here, *here.parents, here / "rho-vae")
clone = next((p for p in places if (p / "rhovae" / "ar1.py").is_file()), None)
if clone is None:
    clone = here / "rho-vae"
    address = os.environ.get("RHOVAE_ADDRESS", "{address}")
    subprocess.run(["git", "clone", "-q", "--depth", "1", address, clone], check=True)
sys.path.insert(0, str(clone))
needed = ("matplotlib", "safetensors", "scipy", "torch", "torchmetrics", "torchvision", "tqdm")
if not all(map(find_spec, needed)):
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, f"{clone}[study]"], check=True)"""
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name})"
)


def repository_address() -> str:
    """The one place where the repository's address stands."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["urls"]["Repository"]


def normalise(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The normal form of a notebook called `name`."""
    address = repository_address()
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    for index, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell.id = f"cell-{index:02d}"
        cell.source = cell.source.strip("\n")
        if index == 0:
            repository = address.removeprefix("https://github.com/")
            badge = BADGE.format(repository=repository, name=name)
            cell.source = re.sub(r"^\[!\[Open in Colab\].*$", badge, cell.source, flags=re.M)
        if cell.cell_type == "code":
            count += 1
            if count == 1:
                cell.source = SETUP.replace("{address}", address)
                cell.metadata = nbformat.from_dict({"tags": sorted({"hide-cell", *(tags or [])})})
            cell.execution_count = count
            cell.outputs = _outputs(cell.outputs, count)
    return notebook


def _outputs(outputs: list, count: int) -> list:
    kept = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if output.output_type == "execute_result":
            output.execution_count = count
        output.pop("metadata", None)
        if output.output_type in ("display_data", "execute_result"):
            output.metadata = {}
        same = kept and output.output_type == "stream" == kept[-1].output_type
        if same and kept[-1].name == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n]*\r", "", output.text)
    return kept


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def as_text(notebook: nbformat.NotebookNode) -> str:
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"


def check_parameters(path: Path, parameters: dict) -> None:
    """Refuse names the notebook does not know: papermill itself would only warn."""
    known = papermill.inspect_notebook(path)
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise SystemExit(
            f"{path.name} has no parameter {', '.join(unknown)}; it has "
            f"{', '.join(known) or 'none'}."
        )


def value_of(text: str):
    """A parameter's value as JSON (YAML takes 1e-5 for a word), else as YAML (no quotes needed)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise ValueError(f'{text!r} is not a value; write JSON: 0.001, "ar1", [1, 2].') from None


def run(path: Path, out: Path, parameters: dict) -> None:
    """Execute a copy of a notebook in `out`; a failure names notebook, cell and error."""
    check_parameters(path, parameters)
    out.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars in stored outputs
    print(f"running {path.name} {parameters or ''}", flush=True)
    try:
        papermill.execute_notebook(
            path,
            out,
            parameters,
            progress_bar=False,
            cwd=path.parent,
            kernel_name="python3",
            # The kernel warns of its unencrypted loopback port, and complains when it is shut down.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
    except PapermillExecutionError as error:
        raise SystemExit(
            f"{path.name} failed in code cell {error.exec_count}: {error.ename}: {error.evalue}\n"
            f"The notebook up to there is {out}."
        ) from None
    except DeadKernelError:
        cells = [cell for cell in read(out).cells if cell.cell_type == "code"]
        begun = sum(bool(cell.metadata["papermill"]["start_time"]) for cell in cells)
        raise SystemExit(
            f"{path.name} failed in code cell {begun}: its kernel died, as when memory runs out or "
            f"somebody kills it.\nThe notebook up to there is {out}."
        ) from None
    except KeyboardInterrupt:
        print(f"\nInterrupted in {path.name}; its kernel has been stopped.", file=sys.stderr)
        raise SystemExit(130) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("normalise", "execute"):
        command = commands.add_parser(name)
        command.add_argument("notebooks", nargs="*", type=Path)
    command = commands.add_parser("run")
    command.add_argument("out", type=Path)
    command.add_argument("notebook", type=Path)
    command.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    arguments = parser.parse_args()
    if arguments.command == "run":
        parameters = {name: value_of(text) for name, text in arguments.p}
        run(arguments.notebook, arguments.out, parameters)
        return
    for path in arguments.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        if arguments.command == "execute":
            temporary = ROOT / "runs" / "executed" / path.name
            run(path.resolve(), temporary, {})
            notebook = read(temporary)
        else:
            notebook = read(path)
        path.write_text(as_text(normalise(notebook, path.name)))


if __name__ == "__main__":
    sys.exit(main())
