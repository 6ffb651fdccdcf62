"""Learn what a digit is worth from sorted rows alone: nobody says which digit an image shows.

A network gives every handwritten digit (scikit-learn's, 8 × 8 pixels) a score. The only supervision
is the order of eight images at a time: the soft permutation of the scores must match it.
"""

import torch
from torch import nn

import fmkernels

ROW = 8


def rows(images: torch.Tensor, digits: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Random rows of images and of their digits: (count, ROW, 64), (count, ROW)."""
    chosen = torch.randint(len(images), (count, ROW))
    return images[chosen], digits[chosen].float()


def main(steps: int = 300) -> float:
    """Returns the share of unequal held-out pairs that the scores put in the right order."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    train = torch.rand(len(images)) < 0.8

    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        x, order = rows(images[train], digits[train], 64)
        # Only the order of the digits reaches the loss: any increasing function of them would do.
        loss = fmkernels.soft_sort_cross_entropy(
            model(x).squeeze(-1), order, steepness=5.0, teacher_steepness=50.0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0 or (step + 1) % 100 == 0:
            print(f"step {step + 1:3}  loss {loss.item():.3f}")

    with torch.no_grad():
        x, order = rows(images[~train], digits[~train], 1000)
        scores = model(x).squeeze(-1)
    wanted = torch.sign(order[:, :, None] - order[:, None, :])
    right = torch.sign(scores[:, :, None] - scores[:, None, :]) == wanted
    accuracy = right[wanted != 0].float().mean().item()
    print(f"held-out pairs in the right order: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
