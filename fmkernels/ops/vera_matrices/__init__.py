"""The matrices A and B that all layers of a VeRA model share."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels._library import GpuKernel, Op
from fmkernels.ops.vera_matrices import cpp, reference
from fmkernels.ops.vera_matrices.config import LARGEST_SIZE, limits

NAME = "vera_matrices"

INITS = ("kaiming_uniform", "kaiming_normal", "position")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def vera_matrices(
    rank: int,
    in_features: int,
    out_features: int,
    *,
    init: str = "kaiming_uniform",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Make VeRA's frozen random matrices A (r, m) and B (n, r), the same for the same seed.

    A layer of m inputs and n outputs takes ``A[:, :m]`` and ``B[:n]``, so make them for the most
    inputs and outputs of all layers. The entries are independent, of mean 0:

        init                entries                         variance of A's, of B's    drawn
        "kaiming_uniform"   uniform, |A| < √(6/m)           2/m, 2/r                   in order
        "kaiming_normal"    normal                          2/m, 2/r                   in order
        "position"          uniform, |A| and |B| < √3       1, 1                       by position

    *In order*: one generator on the CPU, A row by row and then B. With ``"kaiming_uniform"`` these
    are PEFT's matrices for ``projection_prng_key=seed``. Another rank or width gives others.

    *By position*: an entry is a function of the seed, the matrix, the row and the column. So the
    matrices of rank r and width m are the corner of those of any larger rank and width, and
    adapters of different models and ranks can share one pair.

    With ``"position"`` PEFT's scale belongs into ``lambda_d``: multiplied by

        s = √(2/m) · √(2/r) = 2/√(m r)

    it gives products of the variance that they have with ``"kaiming_uniform"`` of width m. So start
    with ``lambda_d = 0.1 · s`` where PEFT starts with 0.1, and multiply its learning rate by s (by
    s² for SGD) to take the same steps.

    Args:
        rank: r, the rows of A and the columns of B.
        in_features: m, the columns of A: the most inputs of any layer.
        out_features: n, the rows of B: the most outputs of any layer.
        init: one of the above. Of these, ``torch.compile`` takes ``"position"``.
        seed: from 0 to 2**63 − 1.
        dtype: float64, float32, float16 or bfloat16.
        device: where the matrices go. Their entries do not depend on it.

    Returns:
        A (r, m) and B (n, r). They are constants: no gradient flows through them.

    Raises:
        TypeError: ``dtype`` is none of these four.
        ValueError: another argument does not fit; the message names it.

    Numerics:
        Drawn in float32 and then rounded once to ``dtype``, as PEFT rounds to the dtype of the base
        layers (over a half-precision base it then holds the rounded numbers in float32). In float32
        the entries of ``"position"`` are the same, bit for bit, on every device and for any number
        of threads: an odd integer below 2²⁴ times √3/2²⁴, rounded once. Their variance differs from
        1 by less than 2⁻²⁴. ``"kaiming_uniform"`` is what PyTorch's CPU generator gives;
        ``"kaiming_normal"`` takes its logarithms and cosines too, whose last bits may depend on the
        processor.

    Source:
        Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, ICLR 2024. He,
        Zhang, Ren, Sun, *Delving Deep into Rectifiers*, ICCV 2015. Salmon, Moraes, Dror, Shaw,
        *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011.

    Example:
        >>> import torch, fmkernels
        >>> A, B = fmkernels.vera_matrices(16, 768, 3072, init="position", seed=7)
        >>> small_A, small_B = fmkernels.vera_matrices(4, 384, 384, init="position", seed=7)
        >>> torch.equal(small_A, A[:4, :384]), torch.equal(small_B, B[:384, :4])
        (True, True)
    """
    rank = _size("rank", rank)
    in_features, out_features = (
        _size("in_features", in_features),
        _size("out_features", out_features),
    )
    _checks.choice(NAME, "init", init, INITS)
    seed = _checks.integer_below(NAME, "seed", seed, power=63)
    if dtype not in DTYPES:
        names = ", ".join(str(known) for known in DTYPES)
        raise TypeError(f"{NAME}: dtype: expected one of {names}, got {dtype!r}")
    device = _checks.device(NAME, "device", device)
    if init == "position":
        key = torch.full((), seed, dtype=torch.int64, device=device)
        A, B = VERA_MATRICES(key, rank, in_features, out_features, dtype)
    else:
        A, B = reference.in_order(rank, in_features, out_features, init, seed)
    return A.to(device, dtype), B.to(device, dtype)


def _size(argument: str, value: int) -> int:
    checked = _checks.positive_integer(NAME, argument, value)
    if checked > LARGEST_SIZE:
        raise ValueError(
            f"{NAME}: {argument}: expected an integer from 1 to {LARGEST_SIZE:,}, got {value!r}"
        )
    return checked


def _fake(
    seed: Tensor, rank: int, in_features: int, out_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    A = seed.new_empty((rank, in_features), dtype=dtype)
    return A, seed.new_empty((out_features, rank), dtype=dtype)


VERA_MATRICES = Op(
    NAME,
    "(Tensor seed, SymInt rank, SymInt in_features, SymInt out_features, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    reference=reference.vera_matrices,
    cpu=cpp.vera_matrices,
    fake=_fake,
    gpu=(GpuKernel("triton", "fmkernels.ops.vera_matrices.triton", limits),),
)
"""The matrices by position: seed is () int64, on the device that they go to."""
