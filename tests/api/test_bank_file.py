"""Banks in files: the answers of a search in memory, in little memory; files that are no banks."""

import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import fmkernels
from fmkernels.api import bank_file, open_bank

safetensors = pytest.importorskip("safetensors.torch")
SUPPORT = Path(__file__).parent.parent / "support"
METRICS = ("cosine", "inner_product", "l2")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 1024 rows, the least, of any bank that is tested here."""
    monkeypatch.setattr(bank_file, "TILE_BYTES", 1)


def same(found, expected):
    return all(torch.equal(torch.as_tensor(a), b) for a, b in zip(found, expected, strict=True))


def written(folder, rows):
    """The rows in every format that has their dtype."""
    safetensors.save_file({"rows": rows, "labels": torch.arange(3)}, folder / "bank.safetensors")
    yield folder / "bank.safetensors"
    if rows.dtype != torch.bfloat16:
        np.save(folder / "bank.npy", rows.numpy())
        yield folder / "bank.npy"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_finds_what_a_search_in_memory_finds(tmp_path, small_tiles, metric, dtype):
    rows, queries = torch.randn(2500, 9).to(dtype), torch.randn(2, 3, 9)
    rows[2400:] = rows[:100]  # equal scores in tiles that are apart
    rows[7] = torch.nan
    for path in written(tmp_path, rows):
        bank = open_bank(path, metric=metric)
        assert (len(bank), bank.dim, bank.dtype) == (2500, 9, dtype)
        for k in (1, 20, 1500):
            *expected, info = fmkernels.knn(queries, rows, k, metric=metric, return_info=True)
            *found, said = bank.search(queries, k, return_info=True)
            assert same(found, expected)
            assert said.candidates.shape == info.candidates.shape == (2, 3)


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 2048, 5000])
def test_any_number_of_rows(tmp_path, small_tiles, count):
    rows, queries = torch.randn(count, 3), torch.randn(5, 3)
    for path in written(tmp_path, rows):
        assert same(open_bank(path).search(queries, 4), fmkernels.knn(queries, rows, 4))
        assert open_bank(path).search(queries[:0], 4)[1].shape == (0, 4)


def test_arrays_in_arrays_out_and_progress(tmp_path, small_tiles, capsys):
    rows = np.random.default_rng(0).standard_normal((3000, 4), dtype=np.float32)
    np.save(tmp_path / "bank.npy", rows)
    bank = open_bank(os.fspath(tmp_path / "bank.npy"))
    found = bank.search(rows[:2], 3, progress=True)
    assert all(type(part) is np.ndarray for part in found)
    assert same(found, fmkernels.knn(*map(torch.from_numpy, (rows[:2], rows)), 3))
    assert "rows: 100%" in capsys.readouterr().err
    twin = pickle.loads(pickle.dumps(bank))
    assert repr(twin) == repr(bank)
    assert np.array_equal(twin.search(rows[:2], 3)[1], found[1])


def test_memory_does_not_grow_with_the_bank(tmp_path):
    """400 MB searched in less than 200 MB: two tiles of 64 MB, and what one search needs."""
    paths, large = [], 100_000
    for rows in (1000, large):
        path = tmp_path / f"{rows}.npy"
        bank = np.lib.format.open_memmap(path, "w+", np.float32, (rows, 1024))  # a hole
        bank[[5, rows // 2, rows - 1]] = 1
        bank.flush()
        del bank
        paths.append(path)
    result = subprocess.run(
        [sys.executable, SUPPORT / "bank_memory.py", *paths],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    extra, _, indices = result.stdout.partition(" ")
    assert int(extra) < 200e6
    signs = torch.manual_seed(0) and torch.randn(4, 1024).sum(dim=-1)
    ones = [5, large // 2, large - 1]
    assert json.loads(indices) == [ones if sign > 0 else [0, 1, 2] for sign in signs]


def test_the_reader_is_ahead_of_the_search(tmp_path, small_tiles, monkeypatch):
    """While a tile is searched, the next one is read, and no more than that."""
    np.save(tmp_path / "bank.npy", np.ones((5000, 4), np.float32))
    began, read = [], bank_file.BankFile._read
    second = threading.Event()

    def reading(self, file, start, buffer):
        began.append(start)
        if start == 1024:
            second.set()
        return read(self, file, start, buffer)

    monkeypatch.setattr(bank_file.BankFile, "_read", reading)
    tiles = open_bank(tmp_path / "bank.npy")._tiles(torch.device("cpu"))
    assert next(tiles)[0] == 0
    assert second.wait(timeout=30)
    assert began == [0, 1024]
    tiles.close()
    assert began == [0, 1024]


@pytest.fixture
def no_reader():
    """Whether no thread of a pool has begun in this test and still runs; PyTorch's compiler has
    pools of its own."""
    before = set(threading.enumerate())
    return lambda: not [t for t in set(threading.enumerate()) - before if "ThreadPool" in t.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_search_ends_its_thread(
    tmp_path, small_tiles, monkeypatch, error, no_reader
):
    np.save(tmp_path / "bank.npy", np.ones((9000, 4), np.float32))
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error("in the search")
        return fmkernels.ops.knn.search(*args)

    monkeypatch.setattr(bank_file, "search", interrupted)
    with pytest.raises(error, match="in the search"):
        open_bank(tmp_path / "bank.npy").search(torch.ones(2, 4), 1)
    assert len(calls) == 3
    assert no_reader()


def test_an_error_of_the_reader_is_an_error_of_the_search(
    tmp_path, small_tiles, monkeypatch, no_reader
):
    np.save(tmp_path / "bank.npy", np.ones((9000, 4), np.float32))
    read = bank_file.BankFile._read

    def failing(self, file, start, buffer):
        if start == 2048:
            raise OSError("the disk is gone")
        return read(self, file, start, buffer)

    monkeypatch.setattr(bank_file.BankFile, "_read", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        open_bank(tmp_path / "bank.npy").search(torch.ones(2, 4), 1)
    assert no_reader()


@pytest.mark.parametrize("change", [-5000, -1, 1])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_file_that_changes_its_size(tmp_path, small_tiles, monkeypatch, change, when, no_reader):
    path = tmp_path / "bank.npy"
    np.save(path, np.ones((9000, 4), np.float32))
    bank = open_bank(path)
    size = path.stat().st_size

    def changing(*args):
        os.truncate(path, size + change)
        return fmkernels.ops.knn.search(*args)

    if when == "before":
        os.truncate(path, size + change)
    else:
        monkeypatch.setattr(bank_file, "search", changing)
    with pytest.raises(
        ValueError, match=rf"path: expected the {size} bytes .*, got {size + change} in .*bank\.npy"
    ):
        bank.search(torch.ones(2, 4), 1)
    assert no_reader()


# refusals


def test_truncated_and_corrupt_files_are_refused(tmp_path):
    for path in written(tmp_path, torch.randn(50, 4)):
        whole = path.read_bytes()
        for cut in (*range(0, 200, 7), len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=rf"open_bank: path: .* in .*{path.name}"):
                open_bank(path)
        path.write_bytes(whole + b"\0")
        with pytest.raises(ValueError, match=r"bytes that its head tells of, got"):
            open_bank(path)
        path.write_bytes(whole)
        open_bank(path)


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.ones((3, 4), np.int64), TypeError, r"got int64 in .*bank\.npy; convert them"),
        (np.ones((3, 4), ">f4"), TypeError, r"got >f4 in"),
        (np.ones((3, 4), np.complex64), TypeError, r"got complex64"),
        (np.ones((3, 4), object), TypeError, r"got object"),
        (np.ones(3, np.float32), ValueError, r"an array \(M, D\), got shape \(3,\)"),
        (np.ones((3, 0), np.float32), ValueError, r"an array \(M, D\), got shape \(3, 0\)"),
        (np.ones((4, 3), np.float32).T, ValueError, r"C order\), got Fortran order; save numpy\."),
    ],
)
def test_arrays_that_are_no_banks(tmp_path, array, error, message):
    np.save(tmp_path / "bank.npy", array)
    with pytest.raises(error, match="open_bank: path: .*" + message):
        open_bank(tmp_path / "bank.npy")


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_structured_arrays_in_any_alphabet(tmp_path):
    np.save(tmp_path / "bank.npy", np.ones((3, 4), [("η", "f4")]))
    with pytest.raises(TypeError, match=r"path: expected rows of little-endian float32"):
        open_bank(tmp_path / "bank.npy")


def test_a_row_in_either_order(tmp_path):
    np.save(tmp_path / "bank.npy", np.asfortranarray(np.ones((1, 4), np.float32)))
    assert len(open_bank(tmp_path / "bank.npy")) == 1


def head_of(path, **changes):
    """Change the head of a safetensors file whose only tensor is "rows"."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8 : 8 + length])
    head["rows"].update(changes)
    new = json.dumps(head).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + whole[8 + length :])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dtype": "I32"}, TypeError, "tensor: expected float32, .* got I32 for 'rows'"),
        ({"shape": [3, 5]}, ValueError, "path: expected 60 bytes of 'rows', got 48"),
        ({"shape": [3, -4]}, ValueError, "a corrupt head"),
        ({"shape": [3, "4"]}, ValueError, "a corrupt head"),
        ({"shape": 12}, ValueError, "a corrupt head"),
        ({"shape": [2, 0]}, ValueError, r"of shape \(M, D\), got shape \(2, 0\)"),
        ({"data_offsets": [48, 0]}, ValueError, "a corrupt head"),
        ({"data_offsets": [8, 56]}, ValueError, "bytes that its head tells of"),
        ({"data_offsets": None}, ValueError, "a corrupt head"),
        ({"more": 1}, ValueError, "a corrupt head"),
    ],
)
def test_heads_that_do_not_fit(tmp_path, changes, error, message):
    path = tmp_path / "bank.safetensors"
    safetensors.save_file({"rows": torch.randn(3, 4)}, path)
    head_of(path, **changes)
    with pytest.raises(error, match="open_bank: .*" + message):
        open_bank(path)


def test_the_name_of_the_tensor(tmp_path):
    path = tmp_path / "bank.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(6, 2), "c": torch.randn(3)}
    safetensors.save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"tensor: expected the name .* got None; there are 'a' \("
    ):
        open_bank(path)
    with pytest.raises(ValueError, match=r"tensor: expected the name .* got 'd'"):
        open_bank(path, tensor="d")
    with pytest.raises(ValueError, match=r"'c' of shape \(M, D\), got shape \(3,\)"):
        open_bank(path, tensor="c")
    queries = torch.randn(2, 2)
    found = open_bank(path, tensor="b").search(queries, 2)
    assert same(found, fmkernels.knn(queries, tensors["b"], 2))
    np.save(tmp_path / "bank.npy", np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"tensor: expected None for a \.npy file"):
        open_bank(tmp_path / "bank.npy", tensor="a")


def test_other_refusals(tmp_path):
    np.save(tmp_path / "bank.npy", np.ones((3, 4)))
    with pytest.raises(FileNotFoundError):
        open_bank(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="open_bank: metric: expected one of cosine"):
        open_bank(tmp_path / "bank.npy", metric="l1")
    bank = open_bank(tmp_path / "bank.npy")
    with pytest.raises(
        ValueError, match=r"BankFile\.search: queries: expected 4 numbers per query"
    ):
        bank.search(torch.ones(2, 3), 1)
    with pytest.raises(ValueError, match=r"BankFile\.search: k: expected an integer >= 1, got 0"):
        bank.search(torch.ones(2, 4), 0)
