"""Change one import, keep the numbers: DiffSortNet beside the one it replaces."""

import importlib.util
import time

import torch

from fmkernels.api import DiffSortNet  # was: from diffsort import DiffSortNet


def step(sorter: torch.nn.Module, scores: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The gradient of a loss on the permutation matrix, and the seconds it took."""
    scores = scores.detach().requires_grad_()
    start = time.perf_counter()
    values, permutation = sorter(scores)
    loss = permutation.square().mean() + values[:, -1].mean()
    loss.backward()
    return scores.grad, time.perf_counter() - start


def main() -> float:
    """Returns the largest difference of the gradients, relative to the largest gradient."""
    scores = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sorter = DiffSortNet("bitonic", 32, steepness=20.0, distribution="cauchy")
    ours, seconds = step(sorter, scores)
    print(f"fmkernels  {seconds * 1e3:7.1f} ms")
    if importlib.util.find_spec("diffsort") is None:
        print("diffsort is not installed: pip install diffsort")
        return 0.0

    import diffsort

    original = diffsort.DiffSortNet("bitonic", 32, steepness=20.0, distribution="cauchy")
    theirs, seconds = step(original, scores)
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"diffsort   {seconds * 1e3:7.1f} ms")
    print(f"largest difference of the gradients: {difference:.0e} of the largest gradient")
    return difference


if __name__ == "__main__":
    main()
