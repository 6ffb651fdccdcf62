"""VeRA: every bad argument, in words."""

import pytest
import torch
from vera_layers import (
    layer,
)

import fmkernels

PROBLEM = layer(4, 5, 6, 3).to(torch.float32)
MANY = layer(4, 5, 6, 3, 2).to(torch.float32)
IDS = torch.tensor([0, 1, -1, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 7)}, ValueError, r"vera_linear: weight: expected shape \(n, 7\), the inputs of x, got \(6, 5\)"),
        ({"x": torch.zeros(4, 5).int()}, TypeError, r"x: expected a floating-point dtype"),
        ({"x": PROBLEM.x.detach().numpy()}, TypeError, r"x: expected a torch.Tensor, got ndarray"),
        ({"A": torch.zeros(3, 4)}, ValueError, r"A: expected shape \(r, >= 5\) with r >= 1, got \(3, 4\)"),
        ({"A": torch.zeros(0, 5)}, ValueError, r"A: expected shape \(r, >= 5\) with r >= 1, got \(0, 5\)"),
        ({"B": torch.zeros(5, 3)}, ValueError, r"B: expected shape \(>= 6, r\) with r >= 1, got \(5, 3\)"),
        ({"B": torch.zeros(6, 4)}, ValueError, r"B: expected 3 columns, the rank of A, got 4"),
        ({"A": torch.zeros(3, 5).requires_grad_()}, ValueError, r"A: expected a frozen matrix.*A.detach\(\)"),
        ({"B": torch.zeros(6, 3).requires_grad_()}, ValueError, r"B: expected a frozen matrix"),
        ({"lambda_d": torch.zeros(4)}, ValueError, r"lambda_d: expected shape \(3,\), or \(N, 3\) for N >= 1 adapters, got \(4,\)"),
        ({"lambda_b": torch.zeros(5)}, ValueError, r"lambda_b: expected shape \(6,\)"),
        ({"lambda_b": torch.zeros(6).long()}, TypeError, r"lambda_b: expected a floating-point dtype"),
        ({"lambda_d": MANY.lambda_d}, ValueError, r"adapter_ids: expected the adapter of each row, because lambda_d holds 2, got None; for one adapter lambda_d has shape \(3,\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \(6,\), got \(5,\)"),
        ({"weight": PROBLEM.weight.to("meta")}, ValueError, r"weight: expected the device of x, cpu, got meta"),
        ({"lambda_d": PROBLEM.lambda_d.to("meta")}, ValueError, r"lambda_d: expected the device of the input, cpu, got meta"),
        ({"training": "yes"}, TypeError, r"training: expected True or False, got 'yes'"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p: expected a share from 0 to 1, got 1.5"),
        ({"dropout_p": -0.5}, ValueError, r"dropout_p: expected a finite number >= 0"),
        ({"seed": -1, "dropout_p": 0.5, "training": True}, ValueError, r"seed: expected an integer from 0 to 2\*\*63 - 1, got -1"),
    ],
)  # fmt: skip
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        fmkernels.vera_linear(**(PROBLEM._asdict() | change))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (IDS.float(), TypeError, r"adapter_ids: expected integers with a sign, got torch.float32"),
        (IDS.clamp(min=0).to(torch.uint8), TypeError, r"adapter_ids: expected integers with a sign, got torch.uint8"),
        (IDS.tolist(), TypeError, r"adapter_ids: expected a torch.Tensor, got list"),
        (IDS[:3], ValueError, r"adapter_ids: expected one per row, shape \(4,\), got \(3,\)"),
        (IDS + 1, ValueError, r"adapter_ids: expected integers from -1 to 1, got 0 to 2"),
        (IDS - 1, ValueError, r"adapter_ids: expected integers from -1 to 1, got -2 to 0"),
        (IDS.to("meta"), ValueError, r"adapter_ids: expected the device of the input, cpu, got meta"),
    ],
)  # fmt: skip
def test_refusals_of_ids(ids, error, message):
    with pytest.raises(error, match=f"vera_linear: {message}"):
        fmkernels.vera_linear(*MANY, adapter_ids=ids)
    base = torch.zeros(4, 6)
    with pytest.raises(error, match=f"vera_expand: {message}"):
        fmkernels.vera_expand(base, torch.zeros(4, 3), *MANY[5:], MANY.B, adapter_ids=ids)


def test_more_refusals():
    with pytest.raises(
        ValueError,
        match=r"lambda_b: expected as many adapters as lambda_d \(2, 3\) holds, got shape \(3, 6\)",
    ):
        fmkernels.vera_linear(*MANY[:6], torch.zeros(3, 6), adapter_ids=IDS)
    with pytest.raises(
        ValueError, match="merge: expected None or False with adapter_ids, got True"
    ):
        fmkernels.vera_linear(*MANY, adapter_ids=IDS, merge=True)
    with pytest.raises(ValueError, match=r"lambda_d: expected shape .* got \(0, 3\)"):
        fmkernels.vera_linear(*MANY[:5], torch.zeros(0, 3), torch.zeros(0, 6), adapter_ids=IDS)
    with pytest.raises(ValueError, match="merge: expected None or False with dropout, got True"):
        fmkernels.vera_linear(*PROBLEM, merge=True, dropout_p=0.5, training=True)
    with pytest.raises(TypeError, match="merge: expected None, True or False, got 'yes'"):
        fmkernels.vera_linear(*PROBLEM, merge="yes")
    u, base = torch.zeros(4, 3), torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"u: expected shape \(4, 3\), got \(4, 2\)"):
        fmkernels.vera_linear(*PROBLEM, u=u[:, :2])
    with pytest.raises(TypeError, match=r"u: expected a torch.Tensor, got int"):
        fmkernels.vera_linear(*PROBLEM, u=3)
    with pytest.raises(ValueError, match="u: expected None with dropout, got a tensor"):
        fmkernels.vera_linear(*PROBLEM, u=u, dropout_p=0.5, training=True)
    vectors = (PROBLEM.lambda_d, PROBLEM.lambda_b, PROBLEM.B)
    with pytest.raises(
        ValueError, match=r"u: expected shape \(4, r\), the rows of base, got \(3, 3\)"
    ):
        fmkernels.vera_expand(base, u[:3], *vectors)
    with pytest.raises(ValueError, match=r"B: expected 4 columns, the rank of u, got 3"):
        fmkernels.vera_expand(base, torch.zeros(4, 4), *vectors)
    with pytest.raises(ValueError, match=r"vera_shrink: A: expected shape \(r, >= 9\)"):
        fmkernels.vera_shrink(torch.zeros(2, 9), PROBLEM.A)
    with pytest.raises(ValueError, match=r"vera_delta_weight: lambda_d: expected shape \(3,\)"):
        fmkernels.vera_delta_weight(PROBLEM.A, PROBLEM.B, torch.zeros(4), torch.zeros(6))
    with pytest.raises(
        ValueError, match=r"vera_delta_weight: B: expected 3 columns, the rank of A"
    ):
        fmkernels.vera_delta_weight(PROBLEM.A, PROBLEM.B[:, :2], torch.zeros(3), torch.zeros(6))
    with pytest.raises(
        ValueError, match=r"vera_delta_weight: lambda_d: expected shape \(3,\), got \(1, 3\)"
    ):
        fmkernels.vera_delta_weight(PROBLEM.A, PROBLEM.B, torch.zeros(1, 3), torch.zeros(6))
