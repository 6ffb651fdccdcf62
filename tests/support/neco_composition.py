"""NeCo's published training step, composed from diffsort and loops, as slow as it reads."""

import math

import peers
import torch
from torch.nn import functional as F


def roi_align(tokens, box, grid_size):
    """(D, H, W), (4,) -> (grid_size², D): every sampling point of every bin on its own."""
    _, height, width = tokens.shape
    x1, y1, x2, y2 = box.tolist()
    bin_h, bin_w = (y2 - y1) / grid_size, (x2 - x1) / grid_size
    points_h, points_w = max(1, math.ceil(bin_h)), max(1, math.ceil(bin_w))

    def interpolate(y, x):
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        v, u = y - top, x - left
        upper = (1 - u) * tokens[:, top, left] + u * tokens[:, top, right]
        lower = (1 - u) * tokens[:, bottom, left] + u * tokens[:, bottom, right]
        return (1 - v) * upper + v * lower

    bins = []
    for p in range(grid_size):
        for q in range(grid_size):
            samples = [
                interpolate(
                    y1 - 0.5 + p * bin_h + (i + 0.5) * bin_h / points_h,
                    x1 - 0.5 + q * bin_w + (j + 0.5) * bin_w / points_w,
                )
                for i in range(points_h)
                for j in range(points_w)
            ]
            bins.append(torch.stack(samples).mean(dim=0))
    return torch.stack(bins)


def neco_loss(
    student_maps,
    teacher_maps,
    boxes,
    references,
    *,
    mask=None,
    grid_size=7,
    metric="cosine",
    steepness=100.0,
    teacher_steepness=None,
    network="bitonic",
):
    """Mean over global crops g and other crops v; references (pairs, B, R, D)."""
    batch, crops, globals_ = len(student_maps[0]), len(student_maps), len(teacher_maps)

    def scores(patches, chosen):
        if metric == "euclidean":
            return (patches[:, None] - chosen[None]).norm(dim=-1)
        return F.normalize(patches, dim=-1) @ F.normalize(chosen, dim=-1).T

    total, pair = 0.0, 0
    for g in range(globals_):
        for v in range(crops):
            if v == g:
                continue
            values, weights = [], []
            for b in range(batch):
                student = roi_align(student_maps[v][b], boxes[1][b, v, g], grid_size)
                with torch.no_grad():
                    teacher = roi_align(teacher_maps[g][b], boxes[0][b, g, v], grid_size)
                    _, q = peers.soft_sort(
                        scores(teacher, references[pair, b]),
                        steepness=teacher_steepness or steepness,
                        network=network,
                    )
                _, p = peers.soft_sort(
                    scores(student, references[pair, b]), steepness=steepness, network=network
                )
                values.append(-(q * p.log()).sum(dim=-1).mean(dim=-1))
                inside = torch.ones(grid_size**2, dtype=student.dtype)
                if mask is not None:
                    tokens = mask[b, g].to(student.dtype)[None]
                    aligned = roi_align(tokens, boxes[0][b, g, v], grid_size).flatten()
                    inside = (aligned >= 1 - 1e-6).to(student.dtype)
                weights.append(inside)
            values, weights = torch.cat(values), torch.cat(weights)
            if weights.sum() > 0:
                total = total + (values * weights).sum() / weights.sum()
            pair += 1
    return total / pair
