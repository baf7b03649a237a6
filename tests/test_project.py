"""Files that must agree with one another."""

import re
import subprocess
import sys
from pathlib import Path

import tomllib
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch"}


def requirements():
    optional = PROJECT["optional-dependencies"]
    return [*PROJECT["dependencies"], *optional["notebooks"], *optional["test"]]


def test_environment_yml_has_the_dependencies_of_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    expected = set()
    for requirement in requirements():
        name, rest = re.match(r"([\w-]+)(.*)", requirement).groups()
        expected.add(CONDA_NAMES.get(name, name) + rest)
    assert set(conda) - {"python>=3.11", "pip"} == expected


def test_constraints_pin_every_dependency():
    text = (ROOT / "constraints.txt").read_text()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in text.splitlines()}
    missing = {re.match(r"[\w-]+", r).group() for r in requirements()} - pinned
    assert not missing
    assert "://" not in text and "@" not in text


def test_nothing_is_capped():
    assert PROJECT["requires-python"].startswith(">=") and "<" not in PROJECT["requires-python"]
    assert not [r for r in requirements() if "<" in r or "==" in r]


def test_the_address_agrees_everywhere():
    address = PROJECT["urls"]["Repository"]
    assert f"repository-code: {address}\n" in (ROOT / "CITATION.cff").read_text()
    assert address in (ROOT / "README.md").read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"git+{address}" in path.read_text(), path.name


def test_the_version_agrees_everywhere():
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_importing_the_package_changes_nothing_global():
    code = (
        "import matplotlib, torch; before = dict(matplotlib.rcParams), torch.initial_seed();"
        "import rhovae, rhovae.figures;"
        "assert (dict(matplotlib.rcParams), torch.initial_seed()) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_figures_and_records_need_no_model_code():
    for module in ("figures", "records"):
        source = (ROOT / "rhovae" / f"{module}.py").read_text()
        assert not re.search(r"^(import|from) torch", source, flags=re.M)
        imports = set(re.findall(r"^from \.(\w+) import", source, flags=re.M))
        assert imports <= {"records"}


def test_the_results_in_the_readme_are_those_of_the_records():
    sys.path.insert(0, str(ROOT / "tools"))
    import readme

    text = (ROOT / "README.md").read_text()
    assert readme.updated(text) == text, "run: python tools/readme.py"


def test_the_recipe_in_the_readme_runs():
    code = re.search(r"```python\n(import torch.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    subprocess.run([sys.executable, "-c", code + "\nassert kl.shape == (128,)"], check=True)
