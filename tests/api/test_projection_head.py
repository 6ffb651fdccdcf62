"""NeCo's projection head."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fmkernels.api import ProjectionHead


def test_is_the_published_head():
    torch.manual_seed(1)
    head = ProjectionHead(12, 20, 6)
    torch.manual_seed(1)
    published = nn.Sequential(
        nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 6)
    )
    tokens = torch.randn(3, 5, 12)
    assert head.state_dict().keys() == published.state_dict().keys()
    assert torch.equal(head(tokens), F.normalize(published(tokens), dim=-1))
    torch.testing.assert_close(head(tokens).norm(dim=-1), torch.ones(3, 5))


def test_sizes_of_the_paper():
    head = ProjectionHead(384)
    shapes = [tuple(parameter.shape) for parameter in head.parameters() if parameter.ndim == 2]
    assert shapes == [(2048, 384), (2048, 2048), (256, 2048)]


def test_one_layer_is_linear():
    assert [type(layer) for layer in ProjectionHead(4, out_dim=3, num_layers=1)] == [nn.Linear]
    with pytest.raises(ValueError, match="num_layers: expected an integer >= 1, got 0"):
        ProjectionHead(4, num_layers=0)


def test_refusals():
    for name, value in (("in_dim", 0), ("in_dim", 4.0), ("hidden_dim", -1), ("out_dim", 0)):
        with pytest.raises(ValueError, match=f"^ProjectionHead: {name}: expected an integer >= 1"):
            ProjectionHead(**({"in_dim": 4} | {name: value}))
    with pytest.raises(ValueError, match=r"tokens: expected shape \(…, 4\), got \(2, 5\); of maps"):
        ProjectionHead(4)(torch.zeros(2, 5))


def test_some_of_its_layers():
    head = ProjectionHead(4, 8, 3)
    assert type(head[:2]) is nn.Sequential
    assert head[:2][0] is head[0] is next(iter(head))
    assert head[-1].out_features == 3
