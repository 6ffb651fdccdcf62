"""Which sketch of gradients to take: variances and nearest neighbours on digits (docs/sketches.md).

A small vision transformer learns digits without labels, as in fungi_digits.py. Its gradients are
compared exactly and by sketches of 16, 64 and 256 numbers.
"""

import argparse

import torch

from fmkernels.demo import digits, gradient_features, gradient_similarities
from fmkernels.demo.gradient_features import OBJECTIVES, spread
from fmkernels.demo.gradient_similarities import KINDS, SKETCHES, accuracies

DIMS = (16, 64, 256)
IMAGES = 50
"""Of which variances are taken, with random matrices of their own for each seed."""


def table(headings, *rows):
    for row in (headings, ["---"] * len(headings), *rows):
        print("|", " | ".join(row), "|")
    print(flush=True)


def variances(factors, seeds):
    """At K = 64, times K / 2, and what the formula says of the same gradients."""
    ranks = {name: gradient_similarities.effective_ranks(*own) for name, own in factors.items()}
    rows = [["variance · K / 2", *(f"{n}: rank {r.mean():.1f}" for n, r in ranks.items())]]
    for kind in SKETCHES:
        measured = gradient_similarities.variances(factors, kind, digits.DIM, seeds)
        expected = {
            name: gradient_similarities.variance_formula(kind, digits.DIM, rank).mean().item()
            for name, rank in ranks.items()
        }
        half = digits.DIM / 2
        rows.append(
            [kind, *(f"{measured[n] * half:.2f} ({expected[n] * half:.2f})" for n in ranks)]
        )
    return rows


def main(networks: int = 5, steps: int = gradient_features.STEPS, seeds: int = 500):
    found = {(name, kind): {dim: [] for dim in DIMS} for name in OBJECTIVES for kind in KINDS}
    for network in range(networks):
        model, data = digits.start(network)
        digits.pretrain(model, data.train, steps)
        fungi = gradient_features.extractor(model, network).fit_negatives(data.train)
        train, test = gradient_features.gradients(fungi, data)
        if not network:
            few = {name: (delta[:IMAGES], a[:IMAGES]) for name, (delta, a) in test.items()}
            table(*variances(few, seeds))
        embeddings = gradient_features.embeddings(model, data)
        scores = accuracies(train, test, embeddings, data, network, kinds=["exact"])
        for dim in DIMS:
            scores |= accuracies(train, test, embeddings, data, network, kinds=SKETCHES, dim=dim)
            for (name, kind), by_dim in found.items():
                by_dim[dim].append(scores[kind][name])
    rows = [
        [f"{name}, {kind}", *map(spread, by_dim.values())] for (name, kind), by_dim in found.items()
    ]
    table(["accuracy in %", *(f"K = {dim}" for dim in DIMS)], *rows)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=500, help="random matrices of a variance")
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.networks, seeds=arguments.seeds)
