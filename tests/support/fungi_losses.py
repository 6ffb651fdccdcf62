"""FUNGI's gradients by another way: losses written out with loops, torch.func, whole gradients."""

import math

import torch
from torch.func import functional_call, grad

PAPER, LIBRARY = "paper", "library"


def linear(head, x):
    return x @ head["weight"].to(x).T + head["bias"].to(x)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def kl_loss(embeddings, heads, preset, negatives=None):
    """Of one view (1, E)."""
    temperature = {PAPER: 15.0, LIBRARY: 1.0}[preset]
    z = linear(heads["head"], unit(embeddings[0])) / temperature
    log_p = z - torch.log(torch.exp(z).sum())
    uniform = 1 / len(z)
    return sum(uniform * (math.log(uniform) - value) for value in log_p) / len(z)


def dino_loss(embeddings, heads, preset, negatives=None):
    """Of twelve crops (12, E)."""
    total = 0.0
    embeddings = unit(embeddings)
    for i in range(2):
        teacher = torch.softmax(linear(heads["teacher"], embeddings[i].detach()) / 0.07, dim=-1)
        for crop in embeddings:
            student = linear(heads["student"], crop) / 0.1
            total = total - (teacher * torch.log(torch.softmax(student, dim=-1))).sum()
    return total


def simclr_loss(embeddings, heads, preset, negatives):
    """Of V patches (V, E) and negatives (M, L)."""
    latents = unit(linear(heads["head"], embeddings))
    everything = torch.cat([unit(negatives.to(latents)), latents])
    views, others, total = len(latents), len(negatives), 0.0
    for i in range(views):
        cosines = everything @ latents[i]
        pulled = sum(cosines[others + j] for j in range(views) if j != i) / 0.07 / (views - 1)
        kept = torch.cat([cosines[: others + i], cosines[others + i + 1 :]])
        scale = 0.07 if preset == PAPER else 1.0
        total = total - pulled + torch.log(torch.exp(kept / scale).sum())
    return total / views


LOSSES = {"KL": kl_loss, "DINO": dino_loss, "SimCLR": simclr_loss}


def whole_gradients(
    model, target_layer, views, name, preset, heads, negatives=None, pool=lambda output: output
):
    """Gradients (B, out, in + 1) of the loss of each image, from its views (B, V, …)."""
    weight, bias = f"{target_layer}.weight", f"{target_layer}.bias"
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(trained, own):
        result = functional_call(model, {**parameters, **trained}, (own,))
        return LOSSES[name](pool(result), heads, preset, negatives)

    gradients = []
    for own in views:
        found = grad(loss)({weight: parameters[weight], bias: parameters[bias]}, own)
        gradients.append(torch.cat([found[weight], found[bias].unsqueeze(1)], dim=1))
    return torch.stack(gradients)


def materialised(factors):
    """δ (B, S, out) and a (B, S, in) -> gradients (B, out, in + 1)."""
    delta, activation = factors
    ones = torch.ones_like(activation[..., :1])
    return torch.einsum("bso,bsi->boi", delta, torch.cat([activation, ones], dim=-1))
