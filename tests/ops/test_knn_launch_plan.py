"""Launches of knn's GPU kernels are values that need no GPU."""

import itertools

import pytest
import torch

from fmkernels.ops.knn.gpu_config import (
    BUFFER_BYTES,
    CANDIDATE_BYTES,
    COPY_BYTES,
    GROWTH,
    MAX_K,
    MAX_QUERIES,
    MAX_ROWS,
    Plan,
    head,
    limits,
    low_dtype,
    product,
    product_grid,
    score_programs,
    search_plan,
    segments,
)

H200 = 132
"""Multiprocessors."""
HALF = (torch.float16, torch.bfloat16)


def test_the_canonical_search():
    plan = search_plan(16_384, 384, 30, torch.float16)
    assert plan == Plan(capacity=512, queries=16_384, rows=349_525)
    first = head(1_024_000, plan.capacity)
    assert (first.count, first.stride) == (250, 4096)
    counts = [segment.count for segment in segments(1_024_000, plan)]
    assert counts == [750, 3000, 12_000, 48_000, 192_000, 349_524, 349_524, 68_952]
    tile = product(16_384, torch.float16, "9.0")
    grid = product_grid(16_384, 349_524, H200, tile)
    assert grid.programs == 128 * 5
    assert grid.programs * grid.tiles >= 128 * -(-349_524 // 256)


@pytest.mark.parametrize("k", [1, 30, 63, 64, 65, 1000, MAX_K])
@pytest.mark.parametrize("dim", [1, 384, 100_000])
def test_buffers_are_bounded_whatever_the_sizes(k, dim):
    for queries, low in itertools.product((1, 1000, 2**40), (*HALF, torch.float32)):
        plan = search_plan(queries, dim, k, low)
        assert 8 * k <= plan.capacity <= max(512, 16 * k)
        assert 1 <= plan.queries <= min(queries, MAX_QUERIES)
        assert plan.queries * plan.capacity * CANDIDATE_BYTES <= BUFFER_BYTES
        assert 1 <= plan.rows <= MAX_ROWS
        width = torch.finfo(low).bits // 8 * max(64, dim)
        assert plan.rows * width <= max(COPY_BYTES, 1024 * width)


@pytest.mark.parametrize("rows", [1, 512, 513, 10**6, 2**31 + 3, 2**40])
def test_segments_are_all_rows_in_few_launches(rows):
    plan = search_plan(16_384, 384, 30, torch.float16)
    first = head(rows, plan.capacity)
    assert min(rows, plan.capacity // GROWTH) <= first.count <= plan.capacity
    found, highest = first.count, first.row(first.count - 1)
    for segment in itertools.islice(segments(rows, plan), 10**6):
        assert 0 < segment.count <= plan.rows
        found += segment.count
        highest = max(highest, segment.row(segment.count - 1))
        assert highest < rows
    if rows < 2**40:
        assert found == rows
        assert highest == rows - 1


def test_levels_grow():
    """What was seen before a level is a GROWTH-th of what has been seen after it."""
    plan = Plan(capacity=512, queries=1, rows=2**40)
    seen = head(10**7, 512).count
    for segment in segments(10**7, plan):
        assert segment.count <= (GROWTH - 1) * seen
        seen += segment.count


@pytest.mark.parametrize("capability", [None, "8.0", "8.9", "9.0", "10.0", "12.0"])
@pytest.mark.parametrize("low", [*HALF, torch.float32])
def test_every_number_of_queries_has_a_tile(low, capability):
    for queries in (1, 16, 17, 64, 65, MAX_QUERIES):
        tile = product(queries, low, capability)
        assert tile.rows % 32 == 0
        assert 64 % tile.dim == 0
        for rows in (1, 1000, MAX_ROWS):
            grid = product_grid(queries, rows, H200, tile)
            query_tiles = -(-queries // tile.queries)
            assert grid.programs % query_tiles == 0
            chunks = grid.programs // query_tiles
            row_tiles = -(-rows // tile.rows)
            assert (chunks - 1) * grid.tiles < row_tiles <= chunks * grid.tiles
            assert grid.programs < 2**31


def test_few_queries_have_more_programs_each():
    assert score_programs(1, 512, H200) == 64
    assert score_programs(264, 512, H200) == 4
    assert score_programs(16_384, 512, H200) == 1


def test_half_types_are_multiplied_as_they_are():
    assert [low_dtype(dtype) for dtype in HALF] == [*HALF]
    assert low_dtype(torch.float32) == low_dtype(torch.float64) == torch.float16


def test_what_the_kernels_do_not_take():
    queries, bank = torch.zeros(3, 8), torch.zeros(5, 8)
    assert limits(queries, bank, MAX_K) is None
    assert limits(queries, bank, MAX_K + 1, "l2") == "k of 2049 exceeds 2048"
    assert limits(queries[:, :0], bank[:, :0], 1) == "rows without numbers"
    assert limits(queries, bank, 1, "cosine", "exact", None, None) is None
