"""The committed notebooks: executed, in normal form, and clean of what one machine left."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
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
    assert "papermill" not in tool.as_text(clean) and clean.cells[0].metadata.tags == ["parameters"]
    stream, result = clean.cells[0].outputs
    assert stream.text == "done\nmore\n" and result.execution_count == 1
    assert tool.as_text(clean) == tool.as_text(tool.normalise(clean, "x.ipynb"))


def test_unknown_parameters_are_refused():
    with pytest.raises(SystemExit, match=r"05_train.ipynb has no parameter latnt; it has dataset"):
        tool.check_parameters(ROOT / "notebooks" / "05_train.ipynb", {"latnt": 3, "latent": 3})


def test_a_failing_cell_is_named(tmp_path):
    cells = [nbformat.v4.new_code_cell("x = 1"), nbformat.v4.new_code_cell("1 / 0")]
    path = tmp_path / "broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=tool.METADATA), path)
    message = r"broken.ipynb failed in code cell 2: ZeroDivisionError: division by zero"
    with pytest.raises(SystemExit, match=message):
        tool.run(path, tmp_path / "out" / "broken.ipynb", {})


@every_notebook
def test_no_cell_ends_with_a_semicolon(path):
    # nbval runs cells without history, where IPython does not see the semicolon and prints.
    for cell in tool.read(path).cells:
        assert cell.cell_type != "code" or not cell.source.endswith(";"), cell.source


def test_the_figures_can_be_drawn_from_what_make_paper_leaves(tmp_path):
    """Three seeds, no isotropic posterior, no d = 5: fewer runs than the committed records."""
    (tmp_path / "audit").mkdir()
    for posterior in ("elbo-diagonal", "elbo-ar1", "as-published-published-script"):
        for seed in range(3):
            pattern = f"*-full-mlp-{posterior}-d10-e15-s{seed}-*.json"
            for path in (ROOT / "data" / "results" / "audit").glob(pattern):
                (tmp_path / "audit" / path.name).write_bytes(path.read_bytes())
    assert len(list((tmp_path / "audit").iterdir())) == 18
    settings = {"results": str(tmp_path), "source": "full", "save_to": str(tmp_path / "figures")}
    tool.run(ROOT / "notebooks" / "06_paper_figures.ipynb", tmp_path / "out.ipynb", settings)
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 3
