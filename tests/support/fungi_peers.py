"""Run as a program: fungivision's features of given views, with given heads and matrix.

fungivision, torchvision and timm lie in .peers/, apart from .venv; torchvision does not import
beside this torch without stubs of two operators.
"""

import sys

import torch
from fungi_models import LAST, small_vit


def make_importable(folder):
    sys.path.append(folder)
    stubs = torch.library.Library("torchvision", "DEF")
    stubs.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    stubs.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return stubs


def fill(linear, head):
    linear.weight.data.copy_(head["weight"])
    linear.bias.data.copy_(head["bias"])


def fungivision_features(case):
    """(B, K) of one objective, before normalisation."""
    from fungivision.config import DINOConfig, KLConfig, SimCLRConfig
    from fungivision.wrapper import FUNGIWrapper

    latents = {"latent_dim": case["latent_dim"]}
    config = {"KL": KLConfig, "DINO": DINOConfig, "SimCLR": SimCLRConfig}[case["name"]](**latents)
    wrapper = FUNGIWrapper(
        small_vit(), LAST, torch.device("cpu"), input_dim=16, extractor_configs=[config]
    )
    (extractor,) = wrapper.extractors
    extractor.projection = case["matrix"]
    heads = case["heads"]
    fill(extractor.projection_head, heads["student" if case["name"] == "DINO" else "head"])
    if case["name"] == "DINO":
        fill(extractor.teacher_projection, heads["teacher"])
    extractor.comparison_batch = case.get("negatives")
    extractor.transform = lambda views: views[0] if len(views) == 1 else views
    return wrapper(list(case["views"])).detach()


def timm_gradients(case):
    """Ours and the written-out loss's gradients of a small ViT of timm."""
    import timm
    from fungi_losses import materialised, whole_gradients

    from fmkernels.api import DINO, KL, FungiExtractor, ImageViews, SimCLR

    torch.manual_seed(3)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, num_heads=2, depth=2,
        num_classes=0,
    ).eval()  # fmt: skip
    views = ImageViews(size=16, local_crops=3, stride_scale=2)
    objectives = [KL(32), DINO(48), SimCLR(20)]
    extractor = FungiExtractor(model, LAST, objectives, views=views)
    extractor.fit_negatives(list(case["images"]))
    found = extractor.gradients(case["images"])
    state, pairs = extractor.state_dict(), {}
    for objective in objectives:
        made = extractor._views(objective.view, case["images"], range(len(case["images"])))
        expected = whole_gradients(
            model,
            LAST,
            made.unflatten(0, (len(case["images"]), -1)),
            objective.name,
            "paper",
            state["heads"][objective.name],
            state["negatives"].get(objective.name),
        )
        pairs[objective.name] = (materialised(found[objective.name]), expected)
    return {"pairs": pairs, "rows": {name: own[0].shape[1] for name, own in found.items()}}


def main(folder, what, file):
    stubs = make_importable(folder)
    case = torch.load(file, weights_only=True)
    work = {"fungivision": fungivision_features, "timm": timm_gradients}[what]
    torch.save(work(case), file)
    del stubs


if __name__ == "__main__":
    main(*sys.argv[1:])
