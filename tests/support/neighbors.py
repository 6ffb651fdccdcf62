"""Nearest neighbours by NumPy in float64, and banks that make them hard to find."""

from __future__ import annotations

import itertools

import numpy as np
import torch

PAD = {"cosine": -np.inf, "inner_product": -np.inf, "l2": np.inf}


def all_scores(queries, bank, metric):
    """(Q, M) in float64, larger is nearer, and the size of what is added up in each."""
    q, b = (x.detach().double().numpy() for x in (queries, bank))
    with np.errstate(all="ignore"):
        if metric == "l2":
            scores = -np.stack([((row - b) ** 2).sum(axis=1) for row in q]) if len(q) else q @ b.T
            return scores, np.abs(scores)
        products = np.stack([(row * b).sum(axis=1) for row in q]) if len(q) else q @ b.T
        size = np.abs(q) @ np.abs(b).T
        if metric == "inner_product":
            return products, size
        norms = norm(q)[:, None] * norm(b)
        zero = (norms == 0) & ~np.isnan(products)
        return np.where(zero, 0, products / norms), np.where(zero, 0, size / norms)


def norm(rows):
    return np.sqrt((rows**2).sum(axis=1))


def check_exact(queries, bank, k, metric, scores, indices):
    """Fail unless the rows are the nearest in float64, best first, equal ones by the lower index.

    Two rows may change places only where float64's own rounding cannot tell them apart.
    """
    exact, size = all_scores(queries, bank, metric)
    indices, scores = indices.numpy(), scores.detach().double().numpy()
    for q in range(len(exact)):
        usable = np.flatnonzero(~np.isnan(exact[q]))
        order = usable[np.argsort(-exact[q, usable], kind="stable")][:k]
        found = indices[q]
        assert (found[len(order) :] == -1).all()
        assert (scores[q, len(order) :] == PAD[metric]).all()
        found = found[: len(order)]
        assert len(set(found)) == len(found), f"query {q}: a row twice"
        if (found == order).all():
            pass
        else:
            with np.errstate(invalid="ignore"):  # of two that are infinite
                gap = np.abs(exact[q, found] - exact[q, order])
            gap[exact[q, found] == exact[q, order]] = 0
            rounding = 2**-50 * len(bank[0]) * np.maximum(size[q, found], size[q, order])
            assert (gap <= rounding).all(), f"query {q}: {found} instead of {order}"
            same = exact[q, found[:-1]] == exact[q, found[1:]]
            exact_ties = same & (size[q, found[:-1]] == size[q, found[1:]])
            equal = [torch.equal(bank[a], bank[b]) for a, b in itertools.pairwise(found)]
            tied = exact_ties & np.array(equal, dtype=bool)
            assert (found[:-1] < found[1:])[tied].all(), f"query {q}: ties"
        sign = -1 if metric == "l2" else 1
        expected = sign * exact[q, found]
        # to float32, where the result is
        with np.errstate(all="ignore"):
            wanted = expected.astype(np.float32).astype(np.float64)
            near = np.isclose(
                scores[q, : len(found)], wanted, rtol=2**-22, atol=1e-44, equal_nan=True
            )
            slack = np.abs(scores[q, : len(found)] - expected) <= 2**-40 * size[q, found]
        assert (near | slack).all(), f"query {q}: scores {scores[q]} instead of {expected}"


def near_ties(rng, queries, rows, dim):
    """Rows that differ from a few by 1e-7 of themselves."""
    base = rng.standard_normal((max(1, rows // 8), dim))
    bank = np.concatenate(
        [base * (1 + 1e-7 * rng.standard_normal((len(base), 1))) for _ in range(9)]
    )
    bank = bank[:rows] + 1e-7 * rng.standard_normal((min(rows, len(bank)), dim))
    return rng.standard_normal((queries, dim)), bank


def huge_norm_differences(rng, queries, rows, dim):
    bank = rng.standard_normal((rows, dim)) * 10.0 ** rng.integers(-15, 15, (rows, 1))
    return rng.standard_normal((queries, dim)) * 10.0 ** rng.integers(-15, 15, (queries, 1)), bank


def outlier_channel(rng, queries, rows, dim):
    """One channel a hundred times as large as the others, as in vision transformers."""
    scale = np.ones(dim)
    scale[dim // 2] = 100
    shift = np.zeros(dim)
    shift[dim // 2] = 500
    return (
        rng.standard_normal((queries, dim)) * scale + shift,
        rng.standard_normal((rows, dim)) * scale + shift,
    )


def duplicated_rows(rng, queries, rows, dim):
    bank = rng.standard_normal((max(1, rows // 10), dim))
    return bank[rng.integers(0, len(bank), queries)], bank[rng.integers(0, len(bank), rows)]


def all_the_same(rng, queries, rows, dim):
    return np.ones((queries, dim)), np.ones((rows, dim))


def denormals(rng, queries, rows, dim):
    return rng.standard_normal((queries, dim)) * 1e-40, rng.standard_normal((rows, dim)) * 1e-41


def huge(rng, queries, rows, dim):
    return rng.standard_normal((queries, dim)) * 1e30, rng.standard_normal((rows, dim)) * 1e30


def near_the_end_of_float32(rng, queries, rows, dim):
    return rng.standard_normal((queries, dim)) * 1e37, rng.standard_normal((rows, dim)) * 1e37


def zeros_among_them(rng, queries, rows, dim):
    q, b = rng.standard_normal((queries, dim)), rng.standard_normal((rows, dim))
    q[::2], b[::3] = 0, 0
    return q, b


def not_finite(rng, queries, rows, dim):
    q, b = rng.standard_normal((queries, dim)), rng.standard_normal((rows, dim))
    for array, step in ((q, 3), (b, 5)):
        for start, value in ((0, np.nan), (1, np.inf), (2, -np.inf)):
            array[start :: step * 3, rng.integers(dim)] = value
    return q, b


def far_from_the_origin(rng, queries, rows, dim):
    """Small distances between rows of large norm."""
    centre = 1e4 * rng.standard_normal(dim)
    return centre + rng.standard_normal((queries, dim)), centre + rng.standard_normal((rows, dim))


def plain(rng, queries, rows, dim):
    return rng.standard_normal((queries, dim)), rng.standard_normal((rows, dim))


HARD = (
    plain,
    near_ties,
    huge_norm_differences,
    outlier_channel,
    duplicated_rows,
    all_the_same,
    denormals,
    huge,
    near_the_end_of_float32,
    zeros_among_them,
    not_finite,
    far_from_the_origin,
)


def problem(kind, seed, queries, rows, dim, dtype=torch.float32):
    """Queries and a bank of exactly so many rows."""
    q, b = kind(np.random.default_rng(seed), queries, rows, dim)
    b = np.resize(b, (rows, dim)) if len(b) else np.zeros((rows, dim))
    with np.errstate(all="ignore"):
        return torch.from_numpy(q).to(dtype), torch.from_numpy(b).to(dtype)


BF16_STEP = 2.0**-7
"""Of bfloat16, relative to the power of two below."""


def losing_what_the_query_sees(dim=64):
    """Rows of norm 1 whose rounding to bfloat16 turns their order round, as far as it can.

    The nearest row loses 0.495 steps in every one of ``dim`` entries, all of which the query adds
    up; another gains as much. The rest of a row makes its score nearly 0, where rounding of the
    score itself helps nobody, and its norm 1, where the query does not look.
    """
    entry = 2.0**-5
    nearest = np.full(dim, entry * (1 + 0.495 * BF16_STEP))
    other = np.full(dim, entry * (1 + 0.501 * BF16_STEP))
    other[: dim // 32] = entry * (1 - 0.3 * BF16_STEP)
    query = np.concatenate([np.full(2 * dim, 1 / np.sqrt(2 * dim)), [0.0]])
    rows = []
    for seen in (nearest, other):
        row = np.concatenate([seen, np.full(dim, -entry)])
        rows.append(np.concatenate([row, [np.sqrt(1 - (row**2).sum())]]))
    return query[None], np.array(rows)


def losing_what_tells_rows_apart(dim=128):
    """A query whose rounding loses what the nearest row is made of, and rows that lose nothing."""
    sign = np.where(np.arange(dim) % 2, 1.0, -1.0)
    query = (1 + 0.49 * BF16_STEP * sign) / 16
    rest = 1 - (query**2).sum()
    query = np.concatenate([query, [0.25, np.sqrt(rest - 0.25**2)]])
    lost = 0.49 * BF16_STEP * dim / 256
    ahead = np.float32(0.9 * 2 * lost / 0.25)
    ahead = float(np.frombuffer(np.uint32(np.array(ahead).view(np.uint32) & 0xFFFF0000), "f4")[0])
    nearest = np.concatenate([sign / 16, [0.0, 0.0]])
    other = np.concatenate([-sign / 16, [ahead, 0.0]])
    return query[None], np.array([nearest, other])


CODE = 1 / 127
"""A step of int8 where the largest entry is 1."""


def losing_the_row_in_int8(dim=64):
    """A row that loses 0.495 steps in every entry that the query adds up, and one that gains them.

    Half of what it loses would put it below the other one.
    """
    sees = np.concatenate([np.ones(dim), [0.0]])
    nearest, other = np.full(dim + 1, 2.495 * CODE), np.full(dim + 1, 2.0 * CODE)
    other[: 6 * dim // 10] = 2.505 * CODE
    nearest[-1] = other[-1] = 1
    return sees[None], np.array([nearest, other])


def losing_the_query_in_int8(dim=64):
    """A query that loses 0.495 steps in every entry of its nearest row, and none in another's."""
    query = np.concatenate([np.full(dim, 2.495 * CODE), [19 * CODE, 1.0]])
    nearest = np.concatenate([np.full(dim, dim**-0.5), [0.0, 0.0]])
    other = np.concatenate([np.zeros(dim), [1.0, 0.0]])
    return query[None], np.array([nearest, other])


def rounded_scores(rng, rows=300, dim=64):
    """Factors that bfloat16 has, and scores that differ by less than it has at their size."""
    query = np.full(dim, 1 / 8)
    bank = np.full((rows, dim), 1 / 8)
    bank *= 1 - BF16_STEP / 2 * rng.integers(0, 2, bank.shape)
    return query[None], bank
