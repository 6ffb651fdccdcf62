"""Run as a program: torchvision's roi_align on the tensors of a file.

torchvision lies in .peers/, apart from .venv: beside this torch its binary does not load, and it
does not import without stubs of two operators. It then falls back to its pure Python version.
"""

import sys

import torch


def main(folder, file):
    sys.path.insert(0, folder)
    stubs = torch.library.Library("torchvision", "DEF")
    stubs.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    stubs.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision.ops import roi_align

    cases = torch.load(file, weights_only=True)
    for case in cases:
        maps = case["maps"].requires_grad_()
        aligned = roi_align(maps, list(case["boxes"]), case["grid_size"], aligned=True)
        case["aligned"] = aligned.detach()
        (case["grad"],) = torch.autograd.grad(aligned, maps, case["grad_aligned"])
        maps.requires_grad_(False)
    torch.save(cases, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
