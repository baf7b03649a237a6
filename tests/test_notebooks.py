"""The committed notebooks: executed, in normal form, and clean of what one machine left."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from rhovae.study.records import published_curves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import reproduce  # noqa: E402

import notebooks as tool  # noqa: E402

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


def test_there_are_notebooks():
    assert {"00_rho_vae_in_one_page", "05_train", "06_paper_figures"} <= {p.stem for p in PATHS}


@every_notebook
def test_is_in_normal_form(path):
    text = path.read_text()
    assert text == tool.as_text(tool.normalise(tool.read(path), path.name))
    nbformat.validate(tool.read(path))


@every_notebook
def test_was_executed_without_errors(path):
    cells = [c for c in tool.read(path).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    # The normaliser counts cells that never ran, so something they made must be there too.
    assert outputs


@every_notebook
def test_holds_nothing_of_the_machine_that_ran_it(path):
    traces = re.compile(r" at 0x|/(tmp|home|root)/|ipykernel_\d|site-packages")
    for cell in tool.read(path).cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not traces.search(text), text
            assert output.get("name") != "stderr", text


@every_notebook
def test_cells_are_short_and_have_no_magics(path):
    for cell in tool.read(path).cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            assert len(lines) <= 20, f"{len(lines)} lines: {lines[0]}"
            assert not re.search(r"^\s*[%!]", cell.source, flags=re.M), cell.source


@every_notebook
def test_reads_as_a_lesson(path):
    cells = tool.read(path).cells
    title, *rest = cells[0].source.splitlines()
    assert (
        title.startswith("# ")
        and rest[0].startswith("*")
        and "What you will learn" in cells[0].source
    )
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    assert re.search(r"what we learned", prose, flags=re.I)
    assert "Open in Colab" in cells[0].source
    for link in re.findall(r"\]\(([\w/.-]+\.ipynb)\)", prose):
        assert (path.parent / link).is_file(), f"broken link to {link}"


def test_the_normaliser_removes_what_changes_between_runs():
    cell = nbformat.v4.new_code_cell("1", execution_count=7, id="random")
    cell.metadata = nbformat.from_dict({"papermill": {"start_time": "now"}, "tags": ["parameters"]})
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="10%\r20%\rdone\n"),
        nbformat.v4.new_output("stream", name="stdout", text="more\n"),
        nbformat.v4.new_output(
            "display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
        ),
        nbformat.v4.new_output("execute_result", data={"text/plain": "1"}, execution_count=7),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"duration": 1}})
    clean = tool.normalise(notebook, "x.ipynb")
    assert "papermill" not in tool.as_text(clean)
    assert clean.cells[0].metadata.tags == ["hide-cell", "parameters"], "the set-up is folded"
    stream, result = clean.cells[0].outputs
    assert stream.text == "done\nmore\n" and result.execution_count == 1
    assert tool.as_text(clean) == tool.as_text(tool.normalise(clean, "x.ipynb"))


def test_unknown_parameters_are_refused():
    with pytest.raises(SystemExit, match=r"05_train.ipynb has no parameter latnt; it has dataset"):
        tool.check_parameters(ROOT / "notebooks" / "05_train.ipynb", {"latnt": 3, "latent": 3})


def notebook_of(path, *cells):
    cells = [nbformat.v4.new_code_cell(text) for text in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=tool.METADATA), path)
    return path


def test_a_failing_cell_is_named(tmp_path):
    path = notebook_of(tmp_path / "broken.ipynb", "x = 1", "1 / 0")
    message = r"broken.ipynb failed in code cell 2: ZeroDivisionError: division by zero"
    with pytest.raises(SystemExit, match=message):
        tool.run(path, tmp_path / "out" / "broken.ipynb", {})


def test_a_dead_kernel_is_named(tmp_path):
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    path = notebook_of(tmp_path / "dead.ipynb", "x = 1", kill, "y = 2")
    message = r"dead.ipynb failed in code cell 2: its kernel died, as when memory runs out"
    with pytest.raises(SystemExit, match=message):
        tool.run(path, tmp_path / "out" / "dead.ipynb", {})


def test_the_main_job_stops_at_the_first_failure(tmp_path, monkeypatch):
    notebook_of(tmp_path / "01_fine.ipynb", "x = 1")
    notebook_of(tmp_path / "02_broken.ipynb", "raise ValueError('no')")
    notebook_of(tmp_path / "03_never.ipynb", "open('seen', 'w')")
    monkeypatch.setattr(reproduce, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "AT_ONCE", 1)
    with pytest.raises(SystemExit, match=r"02_broken.ipynb failed in code cell 1: ValueError: no"):
        reproduce.main()
    made = tmp_path / "runs" / "embedded" / "notebooks"
    assert {path.name for path in made.iterdir()} == {"01_fine.ipynb", "02_broken.ipynb"}
    assert not (tmp_path / "seen").exists()


def test_a_failure_ends_what_runs_beside_it(tmp_path, monkeypatch):
    notebook_of(tmp_path / "01_slow.ipynb", "import time\ntime.sleep(300)")
    notebook_of(tmp_path / "02_broken.ipynb", "raise ValueError('no')")
    monkeypatch.setattr(reproduce, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "AT_ONCE", 2)
    start = time.monotonic()
    with pytest.raises(SystemExit, match=r"02_broken.ipynb failed in code cell 1: ValueError: no"):
        reproduce.main()
    assert time.monotonic() - start < 200
    assert not psutil.Process().children(recursive=True)


def test_figures_of_an_earlier_main_job_do_not_count(tmp_path, monkeypatch):
    old = tmp_path / "runs" / "embedded" / "figures" / "old.svg"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "run", lambda *_: None)
    with pytest.raises(SystemExit, match="No figure was drawn into runs/embedded/figures"):
        reproduce.main()
    assert not old.exists()


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_an_interrupted_notebook_leaves_no_process(
    tmp_path, how, code, in_a_session, signal_session
):
    started = tmp_path / "started"
    note = f"open({str(started)!r}, 'w').close()"
    path = notebook_of(tmp_path / "slow.ipynb", f"{note}\nimport time\ntime.sleep(300)")
    command = [sys.executable, tool.__file__, "run", tmp_path / "out.ipynb", path]
    head = in_a_session(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not started.is_file():
        assert head.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(head.pid).children(recursive=True)
    assert family, "the kernel"
    _, error = signal_session(head, how, family)
    assert head.returncode == code
    assert how != signal.SIGINT or "Interrupted in slow.ipynb" in error


@every_notebook
def test_no_cell_ends_with_a_semicolon(path):
    # nbval runs cells without history, where IPython does not see the semicolon and prints.
    for cell in tool.read(path).cells:
        assert cell.cell_type != "code" or not cell.source.endswith(";"), cell.source


def three_seeds_of_figure_1(folder):
    """Three seeds, no isotropic posterior, no d = 5: fewer runs than the committed records."""
    (folder / "audit").mkdir()
    for posterior in ("elbo-diagonal", "elbo-ar1", "as-published-published-script"):
        for seed in range(3):
            pattern = f"*-full-mlp-{posterior}-d10-e15-s{seed}-*.json"
            for path in (ROOT / "data" / "results" / "audit").glob(pattern):
                (folder / "audit" / path.name).write_bytes(path.read_bytes())
    assert len(list((folder / "audit").iterdir())) == 18
    return {"results": str(folder), "source": "full", "save_to": str(folder / "figures")}


def test_the_figures_can_be_drawn_from_what_make_paper_leaves(tmp_path):
    settings = three_seeds_of_figure_1(tmp_path)
    tool.run(ROOT / "notebooks" / "06_paper_figures.ipynb", tmp_path / "out.ipynb", settings)
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 3


def test_figure_5_rests_on_the_released_models_as_soon_as_they_are_there(tmp_path):
    """Made up from the committed runs of our networks: three seeds that lie on the dots."""
    settings = three_seeds_of_figure_1(tmp_path)
    source = ROOT / "data" / "results" / "convolutional"
    dots = published_curves(ROOT / "data" / "published_curves.csv", "figure5_info_vae")
    ours = {"diagonal": "released-info", "ar1": None, "published-script": "released-rho-info"}
    for name, released in ours.items():
        (path,) = source.glob(f"mnist-full-dcgan-*-{name}-*.json")
        record = json.loads(path.read_text())
        (tmp_path / "convolutional").mkdir(exist_ok=True)
        (tmp_path / "convolutional" / path.name).write_text(json.dumps(record))
        for seed in range(3) if released else ():
            more = record["experiment"] | {"posterior": released, "seed": seed, "epochs": 15}
            losses = [1.0112 * dots["mnist", name][epoch] + seed - 1 for epoch in range(1, 16)]
            history = [{"epoch": e, "train": {}, "test": record["test"] | {"loss": loss}}
                       for e, loss in enumerate(losses, 1)]  # fmt: skip
            made = record | {"name": f"{released}-{seed}", "experiment": more, "history": history}
            (tmp_path / "released").mkdir(exist_ok=True)
            (tmp_path / "released" / f"{released}-{seed}.json").write_text(json.dumps(made))
    tool.run(ROOT / "notebooks" / "06_paper_figures.ipynb", tmp_path / "out.ipynb", settings)
    assert (tmp_path / "figures" / "06_figure_5_full.svg").is_file()
    cells = tool.read(tmp_path / "out.ipynb").cells
    texts = [
        o.get("data", {}).get("text/markdown", "") for c in cells for o in c.get("outputs", [])
    ]
    (table,) = (text for text in texts if "| one more seed |" in text)
    assert table.count("| released model | 3 | 15 |") == 2 and "our network" not in table
