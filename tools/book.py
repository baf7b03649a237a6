"""Render README, notebooks and docstrings into a static site: python tools/book.py [--out FOLDER]

Works without a network. Warnings are errors; so are broken links inside the site, missing
pictures, and formulas and tables that the site would show as text.
"""

import argparse
import json
import re
import shutil
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Snakefile",
    "pyproject.toml",
    "data/README.md",
)
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"  # would need the network
RAW_TEX = r"\$[^$\n]*\\[a-zA-Z]+|\$[^$\s]{1,20}\$|\\(?:frac|mathcal|begin|rho)\b"
# What is left as it is (a formula, code, a heading, a link), or else a cited equation.
CITED = re.compile(
    r"(\$\$.*?\$\$|```.*?```|`[^`\n]*`|\$[^$]*\$|^#[^\n]*|\[[^\]\n]*\]\([^)\n]*\))|\((\d+\.\d+)\)",
    re.DOTALL | re.MULTILINE,
)
SLIDERS = "To get a feeling first, [play with ρ](play.md): a page with sliders.\n"
CONTENTS = """

```{{toctree}}
:hidden:
:caption: Notebooks

{notebooks}
```

```{{toctree}}
:hidden:
:caption: Without a kernel

play
```

```{{toctree}}
:hidden:
:caption: Reference

api
data/README
CONTRIBUTING
```
"""


def assemble(source: Path) -> None:
    """Lay out what the site is made of as it lies in the repository, so that links hold."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in COPIED:
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for folder in ("notebooks", "figures"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns(".*"))
    for path in (ROOT / "docs").iterdir():
        shutil.copy(path, source / path.name)
    (source / "spectra.js").write_text(spectra())
    for path in (source / "notebooks").glob("*.ipynb"):
        text = path.read_text().replace(BADGE, "../colab.svg")
        path.write_text(text.replace("](../docs/", "](../"))  # docs lie at the top of the site
    link_equations(sorted((source / "notebooks").glob("*.ipynb")))
    readme = (ROOT / "README.md").read_text()
    contents = CONTENTS.format(notebooks="\n".join(reading_order(readme)))
    readme = (
        readme.replace("](rhovae)", "](api.md)")
        .replace("](rhovae/study)", "](api.md)")
        .replace("\n## Reading order\n", f"\n## Reading order\n{SLIDERS}\n")
    )
    (source / "index.md").write_text(readme + contents)


def reading_order(readme: str) -> list[str]:
    """The notebooks as the table of README lists them, which is not the order of their numbers."""
    names = re.findall(r"^\| \[[^\]]+\]\((notebooks/\w+)\.ipynb\)", readme, flags=re.M)
    if set(names) != {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}:
        sys.exit("The reading order in README.md does not list each notebook, and only those.")
    return names


def spectra() -> str:
    """The largest eigenvalues of the image sets, for the script of docs/play.md."""
    entries = json.loads((ROOT / "data" / "spectra.json").read_text())
    largest = {name: entry["eigenvalues"][:50] for name, entry in entries.items()}
    return f"globalThis.rhoSpectra = {json.dumps(largest)};\n"


def link_equations(paths: list[Path]) -> None:
    """Give every tagged equation of the notebooks an anchor, and link to it where it is cited."""
    notebooks = {path: json.loads(path.read_text()) for path in paths}
    places = {}  # of tag (1.2): the page it is on
    for path, notebook in notebooks.items():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                for tag in re.findall(r"\\tag\{([\d.]+)\}", "".join(cell["source"])):
                    places[tag] = f"{path.stem}.html"

    def linked(match: re.Match) -> str:
        kept, tag = match.groups()
        if kept:  # a formula, code, a heading, or a link: not ours to change
            tagged = re.search(r"\\tag\{([\d.]+)\}", kept) if kept.startswith("$$") else None
            margin = match.string[: match.start()].rpartition("\n")[2]  # of a quotation or a list
            anchor = '<div id="eq-{}"></div>\n{}\n{}'
            return anchor.format(tagged[1], margin, margin) + kept if tagged else kept
        if tag not in places:
            return match[0]
        return f'<a href="{places[tag]}#eq-{tag}">({tag})</a>'

    for path, notebook in notebooks.items():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = re.sub(CITED, linked, "".join(cell["source"]))
        path.write_text(json.dumps(notebook))


class Page(HTMLParser):
    """What a built page points to, what can be pointed to, and its text outside of code."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors, self.text, self._quiet = [], set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[key] for key in ("id", "name") if key in attributes}
        self.links += [attributes[key] for key in ("href", "src") if attributes.get(key)]
        if tag in ("script", "style", "pre", "code", "title") or (
            tag in ("span", "div") and "math" in (attributes.get("class") or "").split()
        ):
            self._quiet.append(tag)
        elif self._quiet and tag == self._quiet[-1]:
            self._quiet.append(tag)

    def handle_endtag(self, tag):
        if self._quiet and tag == self._quiet[-1]:
            self._quiet.pop()

    def handle_data(self, data):
        if not self._quiet:
            self.text.append(data)


def problems(site: Path) -> list[str]:
    """Broken links inside the site, missing files, and TeX or tables shown as text."""
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    found = []
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = urllib.parse.unquote(link).partition("#")
            if re.match(r"[a-z][a-z+.-]*:", target) or target.startswith("//"):
                if re.search(r"\.(js|css|woff2?|svg|png)$", target):
                    found.append(f"{path.relative_to(site)} needs the network for {target}")
                continue
            there = (path.parent / target.partition("?")[0]).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file():
                found.append(f"{path.relative_to(site)} points to {link}, which is not there")
            elif anchor and there in pages and anchor not in pages[there].anchors:
                found.append(f"{path.relative_to(site)} points to {link}; no such place")
        for raw in re.findall(RAW_TEX, " ".join(page.text)):
            found.append(f"{path.relative_to(site)} shows raw TeX: {raw[:60]}")
        # The marks between dashes of |---|---| may have been made typographic.
        if table := re.search(r"\|(?:\s*:?[-–—]+:?\s*\|){2,}", " ".join(page.text)):
            found.append(f"{path.relative_to(site)} shows the text of a table: {table[0][:60]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "book")
    out = parser.parse_args().out.resolve()
    from sphinx.cmd.build import build_main  # here, so that the rest needs no Sphinx

    source, site = out / "source", out / "site"
    assemble(source)
    shutil.rmtree(site, ignore_errors=True)
    if build_main(["-q", "-W", "--keep-going", "-b", "html", str(source), str(site)]):
        sys.exit("The book has warnings; see above.")
    if found := problems(site):
        sys.exit("\n".join(found))
    print(f"The book is in {site / 'index.html'}: {len(list(site.rglob('*.html')))} pages.")


if __name__ == "__main__":
    main()
