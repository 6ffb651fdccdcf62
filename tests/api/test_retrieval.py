"""Retrieval: an example by hand, and the published loops beside it."""

import numpy as np
import pytest
import torch

from fmkernels.api import rank_database, retrieval, retrieval_map

SETUPS = {
    "easy": lambda g: (g["easy"], [*g["junk"], *g["hard"]]),
    "medium": lambda g: ([*g["easy"], *g["hard"]], g["junk"]),
    "hard": lambda g: (g["hard"], [*g["junk"], *g["easy"]]),
}


def published(ranking, ground_truth, setup, ks):
    """mAP, mP@k and AP per query, by walking down each ranking as revisitop's code defines them."""
    aps, precisions = [], []
    for order, truth in zip(ranking, ground_truth, strict=True):
        wanted, junk = SETUPS[setup](truth)
        if not len(wanted):
            aps.append(np.nan)
            continue
        clean = [image for image in order if image not in junk]
        ap, found, places = 0.0, 0, []
        for rank, image in enumerate(clean):
            if image not in wanted:
                continue
            before = 1.0 if rank == 0 else found / rank
            found += 1
            ap += (before + found / (rank + 1)) / 2 / len(wanted)
            places.append(rank + 1)
        aps.append(ap)
        row = []
        for k in ks:
            kq = min(max(places), k) if places else 1
            row.append(sum(place <= kq for place in places) / kq)
        precisions.append(row)
    return np.nanmean(aps), np.mean(precisions, axis=0), aps


def random_problem(queries=12, database=60, seed=0):
    generator = np.random.default_rng(seed)
    truths = []
    for query in range(queries):
        order = generator.permutation(database)
        sizes = generator.integers(0, 6, 3)
        if query % 4 == 0:
            sizes[query // 4 % 2] = 0  # no easy ones, or no hard ones
        if query == 0:
            sizes[:2] = 0
        easy, hard, junk, _ = np.split(order, np.cumsum(sizes))
        truths.append({"easy": easy, "hard": hard, "junk": junk, "bbx": [0, 0, 1, 1]})
    ranking = np.stack([generator.permutation(database) for _ in range(queries)])
    return ranking, truths


def test_by_hand():
    """Nine images. Easy 4 and 1, hard 7, junk 0 and 5.

    Medium: without 0 and 5 the ranking is 4, 3, 1, 8, 2, 7, 6; found at 0, 2 and 5.
    AP = ((1 + 1/1) + (1/2 + 2/3) + (2/5 + 3/6)) / 2 / 3 = 61/90.
    Easy: 7 is taken out, too: found at 0 and 2: AP = ((1 + 1) + (1/2 + 2/3)) / 2 / 2 = 19/24.
    Hard: 4 and 1 are taken out: 3, 8, 2, 7, 6; found at 3: AP = (0/3 + 1/4) / 2 = 1/8.
    """
    ranking = torch.tensor([[0, 4, 3, 5, 1, 8, 2, 7, 6]])
    scores = retrieval_map(ranking, [{"easy": [4, 1], "hard": [7], "junk": [0, 5]}])
    assert scores["medium"].mean_ap == pytest.approx(61 / 90, abs=1e-15)
    assert scores["easy"].mean_ap == pytest.approx(19 / 24, abs=1e-15)
    assert scores["hard"].mean_ap == pytest.approx(1 / 8, abs=1e-15)
    # the quirk: the last one is found at the 6th place, so P@10 divides by 6
    assert scores["medium"].mean_precision == {1: 1, 5: 2 / 5, 10: 3 / 6}
    assert scores["easy"].mean_precision == {1: 1, 5: 2 / 3, 10: 2 / 3}
    assert scores["hard"].mean_precision == {1: 0, 5: 1 / 4, 10: 1 / 4}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray, np.ndarray.tolist])
def test_agrees_with_the_published_walk(kind, seed):
    ranking, truths = random_problem(seed=seed)
    ks = (1, 3, 5, 10, 60)
    scores = retrieval_map(kind(ranking), truths, ks)
    assert list(scores) == ["easy", "medium", "hard"]
    for setup, score in scores.items():
        mean_ap, precision, aps = published(ranking, truths, setup, ks)
        assert score.mean_ap == pytest.approx(mean_ap, abs=1e-14)
        assert list(score.mean_precision.values()) == pytest.approx(precision, abs=1e-14)
        assert score.aps.tolist() == pytest.approx(aps, abs=1e-14, nan_ok=True)
        assert score.aps.isnan()[0]  # nothing to be found, in no mean
        assert score.precision.isnan().any(dim=1).equal(score.aps.isnan())


def test_shorter_rankings_find_less():
    ranking, truths = random_problem()
    short = ranking[:, :20].copy()
    scores = retrieval_map(short, truths)
    for setup, score in scores.items():
        assert score.mean_ap == pytest.approx(published(short, truths, setup, (1,))[0], abs=1e-14)
        assert score.mean_ap < retrieval_map(ranking, truths)[setup].mean_ap
    short[:, 10:] = -1  # no image
    padded, cut = retrieval_map(short, truths), retrieval_map(short[:, :10], truths)
    assert all(
        torch.equal(padded[s].precision.nan_to_num(9), cut[s].precision.nan_to_num(9)) for s in cut
    )
    nothing = retrieval_map(short[:1], [{"easy": [99], "hard": []}])["easy"]
    assert nothing.mean_ap == 0
    assert nothing.mean_precision == {1: 0, 5: 0, 10: 0}


def test_nothing_to_be_found_at_all():
    scores = retrieval_map(np.array([[0, 1]]), [{"easy": [1], "hard": [], "junk": []}])
    assert np.isnan(scores["hard"].mean_ap)
    assert np.isnan(scores["hard"].mean_precision[5])
    assert scores["medium"].mean_ap == 0.25
    assert np.isnan(retrieval_map(np.empty((0, 4), dtype=int), [])["easy"].mean_ap)


@pytest.mark.parametrize("searched", [7, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_features_are_ranked_by_cosine_exactly(dtype, searched, monkeypatch):
    monkeypatch.setattr(retrieval, "SEARCHED", searched)
    queries, database = torch.randn(9, 16).to(dtype), torch.randn(40, 16).to(dtype)
    database[30] = database[3]  # a tie, to the lower index
    a, b = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (queries, database))
    expected = (a @ b.T).argsort(dim=1, descending=True)
    ranking = rank_database(queries, database)
    places = ranking.argsort(dim=1)
    assert torch.equal(places[:, 30], places[:, 3] + 1)
    same = ranking.masked_fill(ranking == 30, 3)
    assert torch.equal(same, expected.masked_fill(expected == 30, 3))
    if dtype != torch.bfloat16:
        frozen = database.numpy().copy()
        frozen.flags.writeable = False
        assert torch.equal(rank_database(queries.numpy(), frozen), ranking)


def test_near_ties_are_ranked_in_float64():
    direction = torch.randn(16, dtype=torch.float64)
    orthogonal = torch.randn(16, dtype=torch.float64)
    orthogonal -= direction * (orthogonal @ direction) / (direction @ direction)
    angles = 1e-5 * torch.randperm(30).double()  # cosines differ by 5e-11 and more
    database = direction + angles[:, None] * orthogonal
    assert torch.equal(rank_database(direction[None], database)[0], angles.argsort())
    scores = retrieval_map(
        rank_database(direction[None], database),
        [{"easy": angles.argsort()[:4], "hard": angles.argsort()[4:9]}],
    )
    assert scores["medium"].mean_ap == 1


def test_empty_features():
    assert rank_database(torch.ones(0, 3), torch.ones(2, 3)).shape == (0, 2)
    assert rank_database(torch.ones(2, 3), torch.ones(0, 3)).shape == (2, 0)


def test_refusals():
    truth = {"easy": [0], "hard": [1], "junk": []}
    good = torch.tensor([[0, 1, 2], [2, 1, 0]])
    cases = (
        (good.float(), [truth] * 2, TypeError, "ranking: expected integers, got torch.float32"),
        ([["a", "b"]] * 2, [truth] * 2, TypeError, "ranking: expected integers, got <U1"),
        (good, [truth] * 4, ValueError, r"ranking: expected shape \(4, R\), .*got \(2, 3\)$"),
        (good, [truth] * 3, ValueError, r"ranking: .* pass its ranks transposed"),
        (good[0], [truth] * 2, ValueError, r"ranking: expected shape \(2, R\)"),
        (good % 2, [truth] * 2, ValueError, "ranking: .* at most once, got one twice in row 0"),
        (good, [truth, {"ok": [0]}], ValueError, r"ground_truth\[1\]: .* got ok"),
        (good, [truth, {**truth, "hard": [0.5]}], TypeError, r"ground_truth\[1\]\['hard'\]: "),
        (good, [truth, {**truth, "junk": [-1]}], ValueError, r"\['junk'\]: .* >= 0, got -1"),
    )
    for ranking, truths, error, words in cases:
        with pytest.raises(error, match="retrieval_map: .*" + words):
            retrieval_map(ranking, truths)
    with pytest.raises(ValueError, match="ks: expected an integer >= 1, got 0"):
        retrieval_map(good, [truth] * 2, (0,))
    for queries, database, error, words in (
        (torch.ones(2, 3), torch.ones(4, 5), ValueError, "database: expected rows of 3 numbers"),
        (torch.ones(2, 3), torch.ones(4, 3).long(), TypeError, "database: expected a floating"),
        (torch.full((2, 3), np.nan), torch.ones(4, 3), ValueError, "queries: expected finite"),
    ):
        with pytest.raises(error, match="rank_database: " + words):
            rank_database(queries, database)
