"""The command line: ``python -m fmkernels {info, demo, bench}``.

Exit codes: 0 for success, 1 for a failure that was said in words, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fmkernels

NONE_COLLECTED = 5
"""What pytest exits with."""

BENCHMARKS = Path(fmkernels.__file__).resolve().parent.parent / "benchmarks"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fmkernels", description=fmkernels.__doc__.split(".")[0].replace("*", "")
    )
    parser.add_argument("--version", action="version", version=fmkernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info|demo|bench")

    info = commands.add_parser(
        "info", help="environment, instruction set, and which backend runs which op (or why not)"
    )
    info.add_argument("--json", action="store_true", help="the same as JSON, for bug reports")

    demo = commands.add_parser(
        "demo", help="NeCo's loss, segmentation, search, FUNGI and VeRA on real data, beside peers"
    )
    demo.add_argument(
        "--pictures",
        type=Path,
        default=Path(),
        help="the folder for the three PNG files that it draws (default: here)",
    )
    demo.add_argument("--no-pictures", action="store_true", help="numbers only")
    demo.add_argument(
        "--steps", type=int, default=150, help="gradient steps of part 1 (default: 150)"
    )
    demo.add_argument(
        "--parts",
        type=int,
        nargs="+",
        choices=(1, 2, 3, 4, 5, 6),
        default=(1, 2, 3, 4, 5, 6),
        help="only these: 1 NeCo, 2 beside diffsort, 3 segmentation, 4 beside faiss, 5 FUNGI, "
        "6 VeRA",
    )

    bench = commands.add_parser(
        "bench", help="the benchmarks of a source checkout, each beside the package it replaces"
    )
    bench.add_argument("filter", nargs="?", default="", help="only benchmarks whose name has this")
    bench.add_argument("--list", action="store_true", help="only name them, as pytest does")
    bench.add_argument("--save", action="store_true", help="write benchmarks/results/*.json")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "info":
        from fmkernels import info

        print(info.as_json() if options.json else info.as_text())
        return 0
    if options.command == "demo":
        return _demo(options)
    return _bench(options)


def _demo(options: argparse.Namespace) -> int:
    try:
        from fmkernels.demo import run
    except ModuleNotFoundError as error:
        extras = "'fmkernels[demo,faiss,peers]'"
        print(f"demo: {error.name} is missing: pip install {extras}", file=sys.stderr)
        return 1
    if options.steps < 1:
        print(f"demo: --steps: expected at least 1, got {options.steps}", file=sys.stderr)
        return 2
    if not options.no_pictures and not options.pictures.is_dir():
        print(
            f"demo: --pictures: expected a folder that exists, got {str(options.pictures)!r}",
            file=sys.stderr,
        )
        return 2
    pictures = None if options.no_pictures else options.pictures
    return run(pictures, options.steps, set(options.parts))


def _bench(options: argparse.Namespace) -> int:
    if not (BENCHMARKS / "conftest.py").exists():
        print(
            "bench: the benchmarks are part of the source checkout, not of the installed package: "
            "clone the repository and run `make bench` there",
            file=sys.stderr,
        )
        return 1
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-q", "-o", "addopts="]
    command += ["--rootdir", str(BENCHMARKS), "-c", str(BENCHMARKS / "pytest.ini")]
    if options.filter:
        command += ["-k", options.filter]
    if options.list:
        command += ["--collect-only"]
    if options.save:
        command += ["--save-results"]
    code = subprocess.run(command, check=False).returncode
    if code == NONE_COLLECTED:
        print(f"bench: no benchmark's name has {options.filter!r}; see --list", file=sys.stderr)
    return 1 if code else 0
