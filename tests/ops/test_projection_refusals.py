"""What projections and project_gradients refuse, and in which words."""

import pytest
import torch

import fmkernels

LAYER = (6, 5, 8)
DELTA, A = torch.zeros(4, 3, 6), torch.zeros(4, 3, 5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fmkernels.CountSketch(6, 5, 0), ValueError, r"CountSketch: dim: expected an integer >= 1, got 0"),
        (lambda: fmkernels.CountSketch(6, 5, 8.0), ValueError, r"dim: expected an integer >= 1, got 8.0"),
        (lambda: fmkernels.KhatriRao(0, 5, 8), ValueError, r"KhatriRao: out_features: expected"),
        (lambda: fmkernels.CountSketch(6, 5, 8, repeats=0), ValueError, r"repeats: expected"),
        (lambda: fmkernels.Rademacher(6, 5, 8, seed=-1), ValueError, r"seed: expected an integer from 0 to 2\*\*63 - 1, got -1"),
        (lambda: fmkernels.Rademacher(6, 5, 8, seed=None), ValueError, r"seed: expected an integer"),
        (lambda: fmkernels.Rademacher(6, 5, 8, layer=2**24), ValueError, r"layer: expected an integer from 0 to 2\*\*24 - 1"),
        (lambda: fmkernels.Rademacher(6, 5, 8, bias=1), TypeError, r"bias: expected True or False, got 1"),
        (lambda: fmkernels.Rademacher(6, 5, 8, signs=torch.zeros(2)), ValueError, r"signs: expected int32 of shape \(1, 7, 16\)"),
        (lambda: fmkernels.Kronecker(6, 5, 8, dims=(2, 3)), ValueError, r"dims: expected two integers whose product is dim, 8, got 2 \* 3 = 6"),
        (lambda: fmkernels.Kronecker(6, 5, 8, dims=8), ValueError, r"dims: expected two integers whose product is 8, got 8"),
        (lambda: fmkernels.Rademacher.from_matrix(torch.ones(8, 35), *LAYER[:2]), ValueError, r"from_matrix: matrix: expected shape \(K, 36\)"),
        (lambda: fmkernels.Rademacher.from_matrix(0.5 * torch.ones(8, 36), *LAYER[:2]), ValueError, r"entries 1 and -1, got 0.5 and -0.5; divide the matrix by 0.5"),
        (lambda: fmkernels.Rademacher.from_matrix(torch.zeros(8, 36), *LAYER[:2]), ValueError, r"entries 1 and -1, got 0$"),
        (lambda: fmkernels.Rademacher.from_matrix(torch.full((8, 36), torch.nan), *LAYER[:2]), ValueError, r"entries 1 and -1, got nan"),
        (lambda: fmkernels.Rademacher.from_matrix(torch.ones(8, 36).bool(), *LAYER[:2]), TypeError, r"expected real numbers, .* got torch.bool; .* 2 \* matrix.int"),
        (lambda: fmkernels.Rademacher.from_matrix(torch.ones(8, 36).to(torch.float8_e4m3fn), *LAYER[:2]), TypeError, r"got torch.float8_e4m3fn; convert it with matrix.float"),
        (lambda: fmkernels.Rademacher.from_matrix([[1.0]], *LAYER[:2]), TypeError, r"expected a torch.Tensor, got list"),
        (lambda: fmkernels.CountSketch.from_state_dict(fmkernels.KhatriRao(*LAYER).state_dict()), ValueError, r"CountSketch: state: expected .* kind of count_sketch, got 'khatri_rao'"),
        (lambda: fmkernels.CountSketch.from_state_dict({"kind": "count_sketch", "dim": 3}), ValueError, r"state: expected bias, dim, in_features"),
        (lambda: fmkernels.Projection.from_state_dict([]), ValueError, r"Projection: state: expected a state_dict"),
    ],
)  # fmt: skip
def test_refusals_of_projections(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"projection": torch.ones(8, 36)}, TypeError, r"project_gradients: projection: expected a CountSketch.*got Tensor; of a matrix of ±1 make one with Rademacher.from_matrix"),
        ({"projection": fmkernels.CountSketch(5, 6, 8)}, ValueError, r"projection: expected one for a layer of 6 outputs and 5 inputs.*got one for 5 outputs and 6 inputs"),
        ({"grad_output": torch.zeros(4, 6)}, ValueError, r"activation: expected shape \(4, features\)"),
        ({"activation": torch.zeros(4, 5)}, ValueError, r"activation: expected shape \(4, 3, features\)"),
        ({"activation": torch.zeros(4, 2, 5)}, ValueError, r"activation: expected shape \(4, 3, features\).*got \(4, 2, 5\)"),
        ({"grad_output": torch.zeros(6)}, ValueError, r"grad_output: expected shape \(B, S, features\)"),
        ({"grad_output": torch.zeros(1, 4, 3, 6)}, ValueError, r"grad_output: expected shape \(B, S, features\)"),
        ({"grad_output": torch.zeros(4, 3, 6).int()}, TypeError, r"grad_output: expected a floating-point dtype"),
        ({"activation": A.numpy()}, TypeError, r"activation: expected a torch.Tensor, got ndarray; convert it with torch.from_numpy\(activation\)"),
        ({"grad_output": DELTA.numpy(), "activation": A.numpy()}, TypeError, r"grad_output: expected a torch.Tensor, got ndarray; convert it with torch.from_numpy"),
        ({"activation": [A]}, TypeError, r"grad_output: expected a list of tensors, as activation is, got Tensor; for one pair pass two tensors"),
        ({"grad_output": [DELTA, DELTA]}, TypeError, r"activation: expected a list of tensors, as grad_output is, got Tensor"),
        ({"activation": A.to("meta")}, ValueError, r"activation: expected the device of grad_output, cpu, got meta"),
        ({"grad_output": [DELTA], "activation": [A, A]}, ValueError, r"activation: expected as many tensors as grad_output has, 1, got 2"),
        ({"grad_output": [DELTA, DELTA], "activation": [A, A[:2]]}, ValueError, r"activation\[1\]: expected shape \(4, 3, features\)"),
        ({"grad_output": [DELTA, DELTA.to("meta")], "activation": [A, A.to("meta")]}, ValueError, r"grad_output\[1\]: expected the device of grad_output\[0\]"),
        ({"grad_output": DELTA.to("meta"), "activation": A.to("meta"), "projection": fmkernels.Rademacher.from_matrix(torch.ones(8, 36), 6, 5)}, ValueError, r"projection: expected its bits on the device of grad_output, meta, got cpu; use projection.to\('meta'\)"),
    ],
)  # fmt: skip
def test_refusals(change, error, message):
    arguments = {
        "grad_output": DELTA,
        "activation": A,
        "projection": fmkernels.CountSketch(*LAYER),
    }
    with pytest.raises(error, match=message):
        fmkernels.project_gradients(**(arguments | change))
