"""The check of the built site sees what it is for; `make book` runs it on the site itself."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import book  # noqa: E402
import browser  # noqa: E402


def test_the_sources_of_the_book_lie_as_in_the_repository(tmp_path):
    book.assemble(tmp_path / "source")
    found = {str(p.relative_to(tmp_path / "source")) for p in tmp_path.rglob("*") if p.is_file()}
    names = [path.name for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert {f"notebooks/{name}" for name in names} <= found
    assert {
        "index.md",
        "conf.py",
        "api.md",
        "play.md",
        "play.js",
        "spectra.js",
        "data/README.md",
        "CONTRIBUTING.md",
    } <= found
    index = (tmp_path / "source" / "index.md").read_text()
    assert index.startswith((ROOT / "README.md").read_text()[:500])
    assert all(f"\nnotebooks/{Path(name).stem}\n" in index for name in names)
    assert book.SLIDERS in index and "\nplay\n" in index
    pages = [page.read_text() for page in (tmp_path / "source" / "notebooks").glob("*.ipynb")]
    assert not any(book.BADGE in page or "../docs/" in page for page in pages)
    assert any("](../play.md)" in page for page in pages)


def test_the_contents_follow_the_reading_order_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    numbers = [int(name.removeprefix("notebooks/")[:2]) for name in book.reading_order(readme)]
    assert len(numbers) == len(set(numbers))
    assert numbers[numbers.index(7) :][:4] == [7, 12, 13, 8], "they go on with its questions"
    with pytest.raises(SystemExit, match="does not list each notebook"):
        book.reading_order(readme.replace("(notebooks/08_speed.ipynb)", "(notebooks/08.ipynb)"))


def test_previous_and_next_follow_the_reading_order():
    names = [Path(n).name for n in book.reading_order((ROOT / "README.md").read_text())]
    stated = set()
    for place, name in enumerate(names):
        cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        for word, other in re.findall(r"(Next|Previous): \[[^\]]+\]\(([\w.]+)\.ipynb\)", prose):
            assert names[place + (1 if word == "Next" else -1)] == other, f"{name}: {word}"
            stated.add((name, word))
    assert {(name, word) for name in names[1:-1] for word in ("Next", "Previous")} <= stated


def test_cited_equations_become_links(tmp_path):
    pages = {
        "01_a": [
            "## 1.1 By (1.2)\n\nFirst\n\n$$x, (1.2)\\tag{1.1}$$\n\nand `(1.1)`, $(1.1)$, (1.1)"
        ],
        "02_b": ["By (1.1), [see (1.1)](01_a.ipynb) and (9.9).", "> So\n>\n> $$y\\tag{2.1}$$"],
    }
    for name, sources in pages.items():
        cells = [nbformat.v4.new_markdown_cell(source) for source in sources]
        cells.append(nbformat.v4.new_code_cell("f(1.1)"))
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    book.link_equations(sorted(tmp_path.iterdir()))
    first, second = (nbformat.read(p, as_version=4).cells for p in sorted(tmp_path.iterdir()))
    link = '<a href="01_a.html#eq-1.1">(1.1)</a>'
    assert first[0].source == (
        '## 1.1 By (1.2)\n\nFirst\n\n<div id="eq-1.1"></div>\n\n$$x, (1.2)\\tag{1.1}$$\n\n'
        f"and `(1.1)`, $(1.1)$, {link}"
    )
    assert second[0].source == f"By {link}, [see (1.1)](01_a.ipynb) and (9.9)."
    quoted = '> So\n>\n> <div id="eq-2.1"></div>\n> \n> $$y\\tag{2.1}$$'
    assert second[1].source == quoted
    assert first[1].source == second[2].source == "f(1.1)"


def test_every_module_is_in_the_reference():
    package = ROOT / "rhovae"
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts)
               for path in package.rglob("*.py") if path.stem != "__init__"}  # fmt: skip
    text = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^\.\. automodule:: (\S+)$", text, flags=re.M)
    assert len(listed) == len(set(listed)) and set(listed) <= modules
    never_called = {f"rhovae.study.{name}" for name in ("checkpoint", "pictures", "provenance")}
    never_called |= {"rhovae.gpu", "rhovae.loops"}  # which need Triton and numba
    assert modules - set(listed) == never_called


def test_problems_of_a_site_are_found(tmp_path):
    (tmp_path / "there.html").write_text('<h1 id="place">There</h1>')
    (tmp_path / "index.html").write_text(
        '<p><a href="there.html#place">fine</a> <a href="https://example.org/x">fine</a>'
        r'<span class="math notranslate">\(\rho\)</span> <code>\rho</code> 10 $ and 20 $'
        '<a href="nowhere.html">1</a> <a href="there.html#elsewhere">2</a> <img src="no.png">'
        r"a formula $\rho_1$ and another \frac 1 2, $-$ELBO | a | b | |—|—| | 1 | 2 |"
        '<script src="https://cdn.example.org/mathjax.js"></script></p>'
    )
    found = book.problems(tmp_path)
    assert len(found) == 8, found
    links, shown = ("nowhere.html", "#elsewhere", "no.png", "mathjax.js"), (r"$\rho", r"\frac")
    for part in (*links, *shown, "$-$", "|—|—|"):
        assert sum(part in problem for problem in found) == 1, (part, found)


def test_faults_of_a_page_are_seen_in_chromium(tmp_path):
    if reason := browser.missing():
        pytest.skip(reason)
    folded = "<details><summary>Answer</summary><p>Yes.</p></details>"
    page = "<!doctype html><title>x</title><style>pre { overflow: auto }</style><article>"
    fine = page + f"<p>fine</p><pre>{'wide ' * 500}</pre>{folded}{folded}</article>"
    (tmp_path / "fine.html").write_text(fine)
    (tmp_path / "broken.html").write_text(
        page + "<table><tr><td style='min-width: 2000px'>too wide</td></tr></table>"
        "<details><summary>Question</summary></details>"
        f"<div style='position: relative'>{folded}<div style='position: absolute; inset: 0'></div>"
        "</div><script>console.error('a sentence'); undefinedName()</script>"
        "<input type='range' id='dead'><img src='https://example.org/picture.png' alt=''></article>"
    )
    with browser.Browser() as tab:
        for width in browser.WIDTHS:
            assert browser.faults(tab, tmp_path / "fine.html", width) == []
            found = browser.faults(tab, tmp_path / "broken.html", width)
            folds, console = ("click: 'Answer", "click: 'Question"), ("a sentence", "undefinedName")
            for part in (
                *folds,
                *console,
                "too wide",
                "the page, to",
                "asks the network for https",
            ):
                assert any(part in fault for fault in found), (part, found)
