"""Write the result table of README.md from the committed records: python tools/readme.py"""

import re
from pathlib import Path

from rhovae.records import load_records, result_table

ROOT = Path(__file__).resolve().parent.parent


def updated(readme: str) -> str:
    """README text with the table between its two marks made from data/results."""
    records = load_records(ROOT / "data" / "results", source="full")
    table = result_table(records)
    marks = r"(<!-- results: [^\n]*-->\n).*(<!-- end of results -->)"
    return re.sub(marks, lambda m: m[1] + table + "\n" + m[2], readme, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
