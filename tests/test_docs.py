"""Docstrings run, every public name has a page, links resolve. Pages run by --doctest-glob."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
from budgets import BUDGETS

import fmkernels
import fmkernels.api
import fmkernels.testing
from fmkernels import _library, info
from fmkernels.ops.soft_sort.networks import sorts

DOCS = Path(__file__).parent.parent / "docs"
MODULES = [
    name
    for package in (fmkernels, fmkernels.api)
    for _, name, _ in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not name.startswith(("fmkernels.demo", "fmkernels.__main__")) and not name.endswith("._C")
]


@pytest.mark.parametrize("name", sorted({"fmkernels.api", *MODULES}))
def test_docstrings(name):
    if "triton" in name or ".knn.gpu" in name:
        pytest.importorskip("triton")
    if name.endswith(".cuda"):
        pytest.importorskip("fmkernels._cuda")
    module = importlib.import_module(name)
    assert module.__doc__
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize(
    "package", [fmkernels, fmkernels.api, fmkernels.testing], ids=lambda p: p.__name__
)
def test_every_public_name_is_documented(package):
    pages = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    for name in package.__all__:
        assert re.search(rf"\b{re.escape(name)}\b", pages), name
        assert name.startswith("__") or getattr(package, name).__doc__, name


def test_links_resolve():
    """Outside of blocks of code, where an index may be called."""
    links = {
        (page, link)
        for page in DOCS.rglob("*.md")
        for text in page.read_text().split("```")[::2]
        for link in re.findall(r"\]\(([^)#:]+)\)", text)
    }
    missing = [(page.name, link) for page, link in links if not (page.parent / link).exists()]
    assert missing == []


def test_every_environment_variable_is_documented():
    root = DOCS.parent
    sources = [*root.glob("fmkernels/**/*.py"), *root.glob("csrc/cpu/*.cpp"), root / "setup.py"]
    read = r"(?:environ(?:\.get)?[\[(]|getenv\()\s*\"(\w+)\""
    used = {name for path in sources for name in re.findall(read, path.read_text())}
    assert "FMKERNELS_BACKEND" in used
    listed = set(re.findall(r"`([A-Z_]+)`", (DOCS / "environment.md").read_text()))
    assert used == listed


def test_gpu_kernels_are_unverified_until_a_result_says_otherwise():
    rows = [line.split("|")[1:-1] for line in (DOCS / "backends.md").read_text().splitlines()]
    cells = {
        row[0].strip(" `"): dict(zip(_library.BACKENDS[1:3], row[3:5], strict=True))
        for row in rows
        if len(row) == 5
    }
    dates = json.loads(info.VERIFIED.read_text()) if info.VERIFIED.exists() else {}
    for name, op in _library.OPS.items():
        for backend in op.gpu_kernels:
            assert dates.get(name, {}).get(backend, "unverified") in cells[name][backend]


def test_the_kernels_pages_state_their_budgets():
    for name, budget in BUDGETS.items():
        page = "cuda" if name.endswith("_cuda") else "triton"
        row = f"| `{name}` | {budget.registers} | {budget.shared_bytes} | 0 |"
        assert row in (DOCS / "kernels" / f"{page}.md").read_text()


def test_every_page_is_reached_from_the_index():
    index = (DOCS / "index.md").read_text()
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"index.md"}
    assert [page for page in sorted(pages) if f"]({page})" not in index] == []


def test_the_sizes_that_bitonic_does_not_sort():
    text = (DOCS / "networks.md").read_text().split("exactly these n:")[1].split("`sorts")[0]
    listed = set()
    for first, last in re.findall(r"(\d+)(?:–(\d+))?", text):
        listed.update(range(int(first), int(last or first) + 1))
    assert listed == {n for n in range(2, 257) if not sorts("bitonic", n)}
