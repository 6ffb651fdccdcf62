"""The results of the suites as a short table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def render(folder: Path, outcomes: dict[str, str]) -> str:
    """A line per suite, and what it found below it."""
    lines = []
    for name, outcome in outcomes.items():
        path = folder / f"gpu-{name}.json"
        content = json.loads(path.read_text()) if path.exists() else {"results": {}}
        lines.append(f"{name:<18}{outcome}, {content.get('seconds', 0):.0f} s")
        lines += [f"  {line}" for line in LINES[name](content["results"])]
        if content.get("dry_run"):
            lines.append("  (a dry run: the times are those of an interpreter)")
    return "\n" + "\n".join(lines)


def tests(results: dict[str, Any]) -> Iterator[str]:
    outcomes = [test["outcome"] for test in results.values()]
    counts = (f"{outcomes.count(word)} {word}" for word in ("passed", "failed", "skipped"))
    yield ", ".join(counts)
    yield from (f"failed: {name}" for name, test in results.items() if test["outcome"] == "failed")


def sanitizer(results: dict[str, Any]) -> Iterator[str]:
    for backend, tools in results.items():
        found = (f"{tool} {facts['outcome']}" for tool, facts in tools.items())
        yield f"{backend}: {'; '.join(found)}"


PROVIDERS = ("cuda", "triton", "reference", "diffsort")

ASKED = {"neco-step": (1.5, 50.0)}
"""Of the kernel that is preferred: at most so many milliseconds, at least so many × diffsort."""


def sort(results: dict[str, Any]) -> Iterator[str]:
    for name, found in results.items():
        shown = [cell(who, found[who]) for who in PROVIDERS if who in found]
        floor = max(found["floor_ms"].values())
        verdict = "".join(f"; {text}" for text in verdicts(name, found))
        yield f"{name:<22}floor {floor:.3g} ms; {'; '.join(shown)}{verdict}"


SEARCHERS = ("triton", "triton-prepared", "torch-float32", "torch-bfloat16", "faiss")


def knn(results: dict[str, Any]) -> Iterator[str]:
    yield from beside_floors(results, SEARCHERS)


PROJECTORS = (
    "triton",
    "triton-seeded",
    "triton-packed",
    "triton-khatri-rao",
    "torch-float32",
    "torch-bfloat16",
)


def project_gradients(results: dict[str, Any]) -> Iterator[str]:
    yield from beside_floors(results, PROJECTORS)


def vera(results: dict[str, Any]) -> Iterator[str]:
    """What adapters cost, in microseconds: the layer's time less that of the base alone."""
    for name, found in results.items():
        of_base = found.get("base", {}).get("ms", {}).get("median")
        shown = []
        for who in ADAPTERS:
            facts = found.get(who, {})
            if of_base is None or "failed" in facts:
                shown.append(f"{who} {facts.get('failed', 'without base')}")
            elif facts:
                shown.append(f"{who} {1e3 * (facts['ms']['median'] - of_base):.3g}")
        verdict = ""
        if of_base is not None and "target_us" in found and "ms" in found.get("fmkernels", {}):
            cost = 1e3 * (found["fmkernels"]["ms"]["median"] - of_base)
            word = "met" if cost <= found["target_us"] else "missed"
            verdict = f"; ≤ {found['target_us']} µs: {word}"
        alone = "" if of_base is None else f"base {1e3 * of_base:.3g} µs; "
        yield f"{name:<22}{alone}adapter, µs: {', '.join(shown)}{verdict}"


ADAPTERS = (
    "fmkernels",
    "fmkernels-products",
    "fmkernels-merged",
    "stock",
    "stock-compiled",
    "peft",
    "peft-autocast",
    "lora",
)


def beside_floors(results: dict[str, Any], providers: Sequence[str]) -> Iterator[str]:
    for name, found in results.items():
        shown = (cell(who, facts) for who, facts in found.items() if who in providers)
        yield f"{name:<22}floor {max(found['floor_ms'].values()):.3g} ms; {'; '.join(shown)}"


def best(found: dict[str, Any]) -> float | None:
    """Milliseconds of the faster kernel."""
    times = [found[who]["ms"]["median"] for who in PROVIDERS[:2] if "ms" in found.get(who, {})]
    return min(times, default=None)


def speedup(found: dict[str, Any], peer: str) -> float | None:
    """How many times faster than the peer."""
    ours, theirs = best(found), found.get(peer, {}).get("ms")
    return None if ours is None or theirs is None else theirs["median"] / ours


def verdicts(name: str, found: dict[str, Any]) -> Iterator[str]:
    """What is asked of a workload, and whether it is met."""
    if name not in ASKED or best(found) is None:
        return
    most_ms, least_times = ASKED[name]
    yield f"≤ {most_ms} ms: {'met' if best(found) <= most_ms else 'missed'}"
    times = speedup(found, "diffsort")
    if times is not None:
        word = "met" if times >= least_times else "missed"
        yield f"≥ {least_times:g} × diffsort: {word}, {times:.3g} ×"


def markdown(content: dict[str, Any]) -> list[str]:
    """The benchmark's results as a section of the README."""
    roof = content["roofline"]
    lines = [
        f"**{content['device']}, torch {content['torch']}, Triton {content['triton']}**, revision "
        f"{content['revision']} of {content['date']}. Milliseconds of forward + backward between "
        "device events, with a cold cache; the floor is what bytes or operations take at this "
        f"device's own rates in the same run: {roof['bytes_per_s'] / 1e12:.3g} TB/s of a copy, "
        f"{roof['float32_operations_per_s'] / 1e12:.3g} TFLOP/s of a float32 product.",
        "",
        "| | floor | CUDA | Triton | our reference | diffsort | faster than diffsort | asked |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in content["results"].items():
        times = speedup(found, "diffsort")
        cells = [f"`{name}`", f"{max(found['floor_ms'].values()):.3g}"]
        cells += [milliseconds(found.get(who, {})) for who in PROVIDERS]
        cells += ["" if times is None else f"{times:.3g} ×", "; ".join(verdicts(name, found))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def milliseconds(facts: dict[str, Any]) -> str:
    return facts["failed"] if "failed" in facts else f"{facts['ms']['median']:.3g}" if facts else ""


def cell(who: str, facts: dict[str, Any]) -> str:
    return f"{who} {facts['failed']}" if "failed" in facts else f"{who} {facts['ms']['median']} ms"


def tune(results: dict[str, Any]) -> Iterator[str]:
    for backend, sizes in results.items():
        for wires, times in sizes.items():
            yield f"{backend} {wires} wires: {cell(str(times[0]['values']), times[0])}"


LINES = {
    "tests": tests,
    "sanitizer": sanitizer,
    "sort": sort,
    "knn": knn,
    "project_gradients": project_gradients,
    "vera": vera,
    "tune": tune,
    "compiled": lambda results: (
        f"{name}: {cell(who, facts)}"
        for name, found in results.items()
        for who, facts in found.items()
    ),
}
