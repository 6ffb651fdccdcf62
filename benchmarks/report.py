"""Writes the tables of README, docs/backends.md and docs/benchmarks, and the plots there."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import status
from gpu import table as gpu_table
from markdown import generated
from suites import DOCS, SUITES

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BACKENDS = ROOT / "docs" / "backends.md"
RESULTS = ROOT / "benchmarks" / "results"


def load(pattern: str) -> list[dict[str, Any]]:
    """Every committed result file of that name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def readme_body() -> str:
    """The README's generated part."""
    gpu = load("gpu-sort-*.json")
    parts = [
        "\n".join(suite.section(content))
        for name, suite in SUITES.items()
        for content in load(f"{name}-*.json")
    ]
    parts += ["\n".join(gpu_table.markdown(content)) for content in gpu]
    return "\n\n".join([*parts, status.sentence(status.verified(), gpu)])


def pages() -> dict[Path, str]:
    """What the pages with a generated part should be."""
    bodies = {README: readme_body(), BACKENDS: "\n".join(status.backends(status.verified()))}
    for name, suite in SUITES.items():
        if suite.details:
            parts = ["\n".join(suite.details(content)) for content in load(f"{name}-*.json")]
            bodies[DOCS / f"{name}.md"] = "\n\n".join(parts) or "Nothing has been measured yet."
    return {path: generated(path.read_text(), "report.py", body) for path, body in bodies.items()}


def draw_plots() -> list[Path]:
    """Of the suites that have results."""
    drawn = []
    for name, suite in SUITES.items():
        contents = load(f"{name}-*.json")
        if contents:
            drawn.append(DOCS / f"{name}.png")
            suite.plot(contents, drawn[-1])
    return drawn


def main() -> int:
    """Write, or with ``--check`` say whether anything would change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a page would change")
    options = parser.parse_args()
    changed = {path: text for path, text in pages().items() if path.read_text() != text}
    if options.check:
        for path in changed:
            print(f"{path.relative_to(ROOT)} is out of date: run `make readme`", file=sys.stderr)
        return int(bool(changed))
    for path, text in changed.items():
        path.write_text(text)
    print("wrote", *(path.relative_to(ROOT) for path in (*changed, *draw_plots())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
