"""The check of the built site sees what it is for; `make book` runs it on the site itself."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import book  # noqa: E402


def test_the_sources_of_the_book_lie_as_in_the_repository(tmp_path):
    book.assemble(tmp_path / "source")
    found = {str(p.relative_to(tmp_path / "source")) for p in tmp_path.rglob("*") if p.is_file()}
    names = [path.name for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert {f"notebooks/{name}" for name in names} <= found
    assert {"index.md", "conf.py", "api.md", "data/README.md", "CONTRIBUTING.md"} <= found
    index = (tmp_path / "source" / "index.md").read_text()
    assert index.startswith((ROOT / "README.md").read_text()[:500])
    assert all(f"\nnotebooks/{Path(name).stem}\n" in index for name in names)
    pages = (tmp_path / "source" / "notebooks").glob("*.ipynb")
    assert not any(book.BADGE in page.read_text() for page in pages)


def test_every_module_is_in_the_reference():
    package = ROOT / "rhovae"
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts)
               for path in package.rglob("*.py") if path.stem != "__init__"}  # fmt: skip
    text = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^\.\. automodule:: (\S+)$", text, flags=re.M)
    assert len(listed) == len(set(listed)) and set(listed) <= modules
    never_called = {f"rhovae.study.{name}" for name in ("checkpoint", "pictures", "provenance")}
    never_called |= {"rhovae.loops"}  # which needs numba
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
