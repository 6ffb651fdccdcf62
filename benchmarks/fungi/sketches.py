"""Which projection of gradients to take: how much each varies, and what a nearest neighbour sees.

Prints the tables of docs/ops/project_gradients.md, in about half a minute: relative variances of
the squared norm beside the formulas, and the accuracy of nearest neighbours by the gradients of a
small network on scikit-learn's digits, exact and projected.
"""

import argparse
import math
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmkernels

LEFT, RIGHT = 6, 8
DIM = LEFT * RIGHT
KINDS = ("Rademacher", "CountSketch", "KhatriRao", "Kronecker")
CLASSES, TEMPERATURE, NOISE = 10, 15.0, 0.5


def make(kind: str, out: int, into: int, dim: int, seed: int) -> fmkernels.Projection:
    settings = {"dims": (LEFT, dim // LEFT)} if kind == "Kronecker" else {}
    return getattr(fmkernels, kind)(out, into, dim, bias=False, seed=seed, **settings)


def formula(kind: str, rank: int) -> float:
    """Of docs/ops/project_gradients.md."""
    if kind == "KhatriRao":
        return (2 + 6 / rank) / DIM
    if kind == "Kronecker":
        return 2 / DIM + (2 / LEFT + 2 / RIGHT + 2 / DIM) / rank
    return 2 / DIM


def variances(seeds: int, ranks: tuple[int, ...], size: int = 256) -> None:
    """Rows that are random and orthogonal: a gradient of exactly that effective rank."""
    print(f"| variance · K / 2, K = {DIM} | " + " | ".join(f"rank {r}" for r in ranks) + " |")
    print("| --- |" + " --- |" * len(ranks))
    torch.manual_seed(0)
    deltas = [torch.linalg.qr(torch.randn(size, r)).Q.mT[None] / math.sqrt(r) for r in ranks]
    inputs = [torch.linalg.qr(torch.randn(size, r)).Q.mT[None] for r in ranks]
    for kind in KINDS:
        norms = []
        for seed in range(seeds):
            projection = make(kind, size, size, DIM, seed)
            found = fmkernels.project_gradients(deltas, inputs, projection)
            norms.append([p.square().sum().item() for p in found])
        cells = [
            f"{statistics.variance(each) * DIM / 2:.2f} ({formula(kind, rank) * DIM / 2:.2f})"
            for each, rank in zip(zip(*norms, strict=True), ranks, strict=True)
        ]
        print(f"| `{kind}` | {' | '.join(cells)} |", flush=True)


def network(images: Tensor, labels: Tensor) -> nn.Sequential:
    """A small classifier; its last hidden layer is the one whose gradients are taken."""
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU())
    head = nn.Linear(64, CLASSES)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(head(model(images)), labels).backward()
        optimizer.step()
    return model


def gradients(model: nn.Sequential, images: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """(B, views, 64), (B, views, 96): δ and a of the loss KL at the last hidden layer."""
    head = nn.Linear(64, 256)
    seen = images.unsqueeze(1).repeat(1, views, 1)
    seen[:, 1:] += NOISE * torch.randn_like(seen[:, 1:])
    a = model[1](model[0](seen))
    output = model[2](a).detach().requires_grad_()
    scores = head(F.normalize(model[3](output), dim=-1)) / TEMPERATURE
    (-scores.log_softmax(dim=-1).mean()).backward()  # KL, and a constant
    return output.grad, a.detach()


def nearest(similarity: Tensor, norms: Tensor, bank: Tensor, truth: Tensor, of: Tensor) -> float:
    """Accuracy in % of the label of the most similar by cosine."""
    found = of[(similarity / bank[None, :] / norms[:, None]).argmax(dim=1)]
    return 100 * (found == truth).double().mean().item()


def accuracies(seed: int, views: int) -> dict[str, float]:
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = (torch.from_numpy(digits.data).float() / 16)[order]
    labels = torch.from_numpy(digits.target)[order]
    half = len(images) // 2
    model = network(images[:half], labels[:half])
    delta, a = gradients(model, images, views)
    bank, queries = (delta[:half], a[:half]), (delta[half:], a[half:])
    truth, of = labels[half:], labels[:half]

    def norms(pair: tuple[Tensor, Tensor]) -> Tensor:
        deltas, inputs = (x @ x.mT for x in pair)
        return (deltas * inputs).sum(dim=(1, 2)).sqrt()

    exact = fmkernels.gradient_similarity(*queries, *bank, bias=False)
    found = {"exact": nearest(exact, norms(queries), norms(bank), truth, of)}
    embedding = F.normalize(model(images), dim=1).detach()
    ones = torch.ones(len(images))
    found["embeddings"] = nearest(
        embedding[half:] @ embedding[:half].mT, ones[half:], ones[:half], truth, of
    )
    for kind in KINDS:
        projection = make(kind, 64, 96, DIM, seed)
        p, q = (fmkernels.project_gradients(*pair, projection) for pair in (queries, bank))
        found[kind] = nearest(p @ q.mT, p.norm(dim=1), q.norm(dim=1), truth, of)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="of a variance")
    parser.add_argument("--networks", type=int, default=5, help="that are trained")
    options = parser.parse_args()
    variances(options.seeds, (1, 12, 43))
    print(f"\n| accuracy in %, K = {DIM} | one row | 12 rows |\n| --- | --- | --- |")
    runs = [[accuracies(seed, views) for seed in range(options.networks)] for views in (1, 12)]
    for name in ("embeddings", "exact", *KINDS):
        cells = []
        for of_views in runs:
            values = [found[name] for found in of_views]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
