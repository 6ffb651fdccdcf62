"""Writes the tables of docs/kernels: what the kernels of the sort do, counted."""

from __future__ import annotations

import argparse
import sys

import count_cpu
import count_cuda
import count_triton
from markdown import generated
from report import ROOT

PAGES = {"cpu": count_cpu.tables, "triton": count_triton.tables, "cuda": count_cuda.tables}


def main() -> int:
    """Write, or with ``--check`` say whether anything would change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a page would change")
    options = parser.parse_args()
    changed = []
    for name, tables in PAGES.items():
        page = ROOT / "docs" / "kernels" / f"{name}.md"
        current = page.read_text()
        wanted = generated(current, "counts.py", "\n".join(tables()).strip())
        if wanted != current:
            changed.append(page.relative_to(ROOT))
            if not options.check:
                page.write_text(wanted)
    if options.check and changed:
        print(f"out of date: {changed}; run `make readme`", file=sys.stderr)
    return int(options.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
