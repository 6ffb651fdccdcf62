"""Run as a program: fungivision's per-sample gradients of a layer, its matrix and its product.

fungivision lies in .peers/ beside torchvision, which does not import without stubs of two operators.
"""

import sys

import torch


def main(folder, file, bias):
    sys.path.insert(0, folder)
    stubs = torch.library.Library("torchvision", "DEF")
    stubs.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    stubs.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from fungivision.gradients.base_extractor import BaseGradientExtractor
    from fungivision.utils import autograd_hacks, compression

    torch.manual_seed(0)
    samples, rows = 5, 3
    model = torch.nn.Sequential(torch.nn.Linear(40, 24, bias=bias == "1"), torch.nn.Tanh())
    layer = model[0]
    autograd_hacks.add_hooks(model, layer_paths=["0"])
    model(torch.randn(samples, rows, 40)).square().sum(dim=(1, 2)).mean().backward()
    autograd_hacks.compute_grad1(model, layer_paths=["0"])
    gradients = BaseGradientExtractor.extract_gradients(None, layer, samples, 1).view(samples, -1)
    matrix = compression.generate_projection_matrix((32, gradients.shape[1]))
    scaling = compression.suggested_scaling_factor(matrix.shape[1])
    projected = scaling * (matrix @ gradients.T).permute(1, 0)  # as BaseGradientExtractor.backprop
    found = {
        "activation": layer.activations,
        "grad_output": layer.backprops_list[0] * samples,  # of a mean over the samples
        "gradients": gradients,
        "matrix": matrix,
        "scaling": scaling,
        "projected": projected,
    }
    torch.save({name: value.detach().clone() for name, value in found.items()}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
