"""The benchmark from pictures to features: what it checks, and how its figures are shown."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
needs_fungivision = pytest.mark.skipif(
    not (ROOT / ".peers" / "fungivision").exists(), reason="needs fungivision in .peers/"
)

CHECKS = """
import json, sys, warnings
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from fungi import e2e, e2e_providers
tiny = e2e.WORKLOADS["fungi-e2e-all"].tiny()
found = [
    tiny.check(peer, ours=ours)
    for ours in ("fmkernels", "fmkernels-bfloat16")
    for peer in ("fungivision", "forwards")
]
right = e2e_providers.PROVIDERS["forwards"]
e2e_providers.PROVIDERS["forwards"] = lambda problem: lambda pictures: -right(problem)(pictures)
try:
    tiny.check("forwards")
except AssertionError as error:
    found.append(str(error))
names = ("fmkernels", "fmkernels-bfloat16", "fungivision", "forwards")
found.append([list(tiny.step(name)().shape) for name in names])
print(json.dumps(found))
"""


@needs_fungivision
def test_features_are_checked_before_they_are_timed():
    """In a process: fungivision needs a torchvision that is not installed here."""
    output = subprocess.run(
        [sys.executable, "-c", CHECKS],
        cwd=BENCHMARKS,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS)},
        capture_output=True,
        text=True,
    )
    assert output.returncode == 0, output.stderr
    *facts, refused, shapes = json.loads(output.stdout.splitlines()[-1])
    assert [round(each["cosine"], 2) for each in facts] == [1, 1, 1, 1]
    assert refused.startswith("embeddings: cosine -0.99")
    assert shapes == [[1, 96], [1, 96], [1, 96], [1, 24]]


def ratio(median, **facts):
    return {"median": median, "low": median, "high": median} | facts


def test_what_is_asked_and_what_is_shown(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from fungi.e2e import WORKLOADS, measurement
    from fungi.limits import END_TO_END
    from fungi.report import end_to_end

    half = measurement("fungivision", "fmkernels-bfloat16")
    found = {
        measurement("forwards"): ratio(0.9),
        measurement("fungivision"): ratio(1.2),
        half: ratio(2.3, native_bfloat16=True, cosine=0.98),
    }
    results = {"fungi-e2e-kl": found}
    limits = [limit for limit in END_TO_END if limit.measured(results)]
    assert [limit.verdict(limit.measured(results)) for limit in limits] == [
        "missed",
        "met",
        "met",
        "missed",
    ]
    found[half]["native_bfloat16"] = False
    assert sum(limit.measured(results) is not None for limit in END_TO_END) == 2
    table = "\n".join(end_to_end(results))
    assert "| `fungi-e2e-kl`, 16 views | 1.2 ×  | 2.3 ×  | 0.9 ×  |" in table
    assert [problem.views for problem in WORKLOADS.values()] == [16, 52, 100, 124]
