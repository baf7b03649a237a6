"""Build what a release publishes into dist/, and refuse what should not be published.

    python tools/dist.py [TAG]

The wheel is code alone. A tag must be v and the version, which CHANGELOG.md must describe.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 100_000  # bytes


def build(folder: Path) -> Path:
    """Build sdist and wheel into a folder; the wheel, if it is what it should be."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    code = [name for name in names if name.parts[0] == "rhovae"]
    other = [str(name) for name in code if name.suffix != ".py" and name.name != "py.typed"]
    if other:
        raise SystemExit(f"The wheel holds {', '.join(other)}; it should be code alone.")
    if wheel.stat().st_size > LARGEST:
        raise SystemExit(
            f"The wheel has {wheel.stat().st_size:,} bytes; it should have at most {LARGEST:,}."
        )
    return wheel


def check_tag(tag: str) -> None:
    """A release is called by its version, and CHANGELOG.md says what is new in it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if tag != f"v{version}":
        raise SystemExit(f"The tag is {tag}, but pyproject.toml has version {version}.")
    if f"\n## {version}" not in (ROOT / "CHANGELOG.md").read_text():
        raise SystemExit(f"CHANGELOG.md has no section for {version}; write one.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check_tag(sys.argv[1])
    wheel = build(ROOT / "dist")
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size:,} bytes")
