"""README and docs/kernels say what the committed results and the counts say, and links resolve."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("generator", ["report.py", "counts.py"])
def test_is_what_the_generator_writes(generator):
    script = ROOT / "benchmarks" / generator
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_its_links_resolve():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
