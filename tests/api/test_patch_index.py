"""PatchIndex: exact and faiss, adding, removing, files, copies, threads, and what it refuses."""

import copy
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fmkernels
from fmkernels.api import PatchIndex, PatchMemory, open_bank
from fmkernels.ops.knn import bank as knn_bank

METRICS = ("cosine", "inner_product", "l2")


def filled(rows, dim=None, **settings):
    index = PatchIndex(dim or rows.shape[1], **settings)
    index.add(rows)
    return index


def same(found, expected):
    return all(torch.equal(torch.as_tensor(a), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_finds_what_knn_finds(metric, dtype):
    rows, queries = torch.randn(70, 12).to(dtype), torch.randn(2, 3, 12)
    index = PatchIndex(12, metric=metric, dtype=dtype)
    for block in rows.split((30, 0, 1, 39)):
        index.add(block)
    assert len(index) == 70
    assert torch.equal(index.features, rows)
    for k in (1, 8, 75):
        *expected, info = fmkernels.knn(queries, rows, k, metric=metric, return_info=True)
        *found, said = index.search(queries, k, return_info=True)
        assert same(found, expected)
        assert found[0].dtype == expected[0].dtype
        assert said.candidates.shape == info.candidates.shape == (2, 3)
    assert index.recall(queries, 5) == 1


def test_adding_after_a_search():
    rows = torch.randn(40, 4)
    index = filled(rows[:10])
    index.search(rows, 3)
    index.add(rows[10:])
    assert same(index.search(rows, 3), fmkernels.knn(rows, rows, 3))


def test_an_empty_index_finds_nothing():
    scores, indices = PatchIndex(4, metric="l2").search(torch.randn(2, 4), 3)
    assert (indices == -1).all()
    assert (scores == torch.inf).all()
    index = PatchIndex(4, engine="faiss", factory="IVF4,Flat")
    scores, indices = index.search(torch.randn(2, 4), 3)
    assert (indices == -1).all()
    assert (scores == -torch.inf).all()


@pytest.mark.parametrize("settings", [{}, {"engine": "faiss", "factory": "Flat"}], ids=str)
def test_no_queries(settings):
    index = filled(torch.eye(4), **settings)
    scores, indices = index.search(torch.empty(2, 0, 4), 3, progress=True)
    assert scores.shape == indices.shape == (2, 0, 3)
    assert index.search(np.empty((0, 4), np.float32), 3)[1].shape == (0, 3)


def test_one_array_is_not_copied():
    array = np.random.default_rng(0).standard_normal((20, 4), dtype=np.float32)
    index = filled(array)
    queries = array[:3]
    scores, indices = index.search(queries, 2)
    assert type(scores) is type(indices) is np.ndarray
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    assert np.shares_memory(index.features.numpy(), array)
    assert same((scores, indices), fmkernels.knn(*map(torch.from_numpy, (queries, array)), 2))
    tensor = torch.randn(20, 4)
    assert filled(tensor).features.data_ptr() == tensor.data_ptr()


def test_arrays_that_cannot_be_written_to(tmp_path):
    array = np.random.default_rng(0).standard_normal((20, 4), dtype=np.float32)
    np.save(tmp_path / "bank.npy", array)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    index = filled(mapped)
    found = index.search(mapped[:2], 3)
    assert np.shares_memory(index.features.numpy(), mapped)
    expected = filled(array).search(torch.from_numpy(array[:2]), 3)
    assert same(found, expected)


def test_arrays_of_any_strides():
    array = np.random.default_rng(0).standard_normal((20, 8), dtype=np.float32)
    fields = np.zeros(6, dtype=[("a", "i1"), ("x", "f4", 3)])
    fields["x"] = 1
    for strided in (array[::-2], array[:, ::2], array.T, array[:, ::-1], fields["x"]):
        index = filled(strided)
        assert torch.equal(index.features, torch.from_numpy(strided.copy()))
        expected = filled(strided.copy()).search(strided.copy(), 2)
        assert same(index.search(strided, 2), map(torch.from_numpy, expected))


def test_rows_of_another_dtype_are_converted():
    rows = torch.randn(9, 4, dtype=torch.float64)
    index = filled(rows, dtype=torch.bfloat16)
    index.add(rows.numpy().astype(np.float16))
    expected = torch.cat([rows.bfloat16(), rows.half().bfloat16()])
    assert torch.equal(index.features, expected)


def test_gradients_stay_outside():
    rows = torch.randn(9, 4, requires_grad=True)
    index = filled(rows)
    scores, _ = index.search(rows, 2)
    assert not index.features.requires_grad
    assert not scores.requires_grad


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_buffer_that_is_used_again_is_noticed(library):
    buffer = torch.randn(100, 4)
    index = PatchIndex(4)
    for batch in range(2):
        buffer.fill_(batch)
        index.add(buffer if library == "torch" else buffer.numpy())
    with pytest.raises(ValueError, match=r"not written to after it was added.*add a copy"):
        index.search(buffer, 1)


def test_blocks_are_set_free_as_they_are_copied(monkeypatch):
    """So that gathering 30 GB takes 30 GB and a block; and a row is not lost by an interrupt."""
    index, rows = PatchIndex(4), torch.randn(40, 4)
    for block in rows.split(10):
        index.add(block)
    left = []

    def slow(self, *args, write=torch.Tensor.__setitem__):
        left.append(len(index._blocks._blocks))
        if len(left) == 3:
            raise KeyboardInterrupt
        write(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "__setitem__", slow)
        with pytest.raises(KeyboardInterrupt):
            index.build()
    assert left == [4, 3, 2]
    assert torch.equal(index.features, rows)


def test_remove_moves_later_rows_down():
    rows = torch.randn(30, 4)
    for gone in (
        [3, 3, 7],
        (29,),
        np.array([0, 1]),
        torch.tensor([5]),
        rows[:, 0] > 0,
        [],
        range(30),
    ):
        index = filled(rows)
        index.search(rows, 2)
        kept = torch.ones(30, dtype=torch.bool)
        kept[gone if isinstance(gone, torch.Tensor) else list(gone)] = False
        assert index.remove(gone) == 30 - kept.sum()
        assert len(index) == kept.sum()
        assert torch.equal(index.features, rows[kept])
        assert same(index.search(rows, 5), fmkernels.knn(rows, rows[kept], 5))


def test_memory():
    index = filled(torch.randn(50, 4))
    assert index.memory() == (50 * 4 * 4, 0, 0)
    index.search(torch.randn(1, 4), 1)
    prepared = knn_bank.prepare(index.features)[1:]
    made = [part for part in prepared if part is not None]
    assert index.memory() == (50 * 4 * 4, sum(part.nbytes for part in made), 0)
    approximate = filled(torch.randn(50, 4), engine="faiss", factory="Flat")
    approximate.build()
    assert approximate.memory().faiss >= approximate.memory().features == 800


def test_progress(capsys):
    rows = torch.randn(2500, 4)
    exact, shown = filled(rows), filled(rows, engine="faiss", factory="Flat")
    assert same(exact.search(rows, 2, progress=True), exact.search(rows, 2))
    shown.build(progress=True)
    bars = capsys.readouterr().err
    assert "queries: 100%" in bars
    assert "faiss: rows: 100%" in bars


# files and copies


SETTINGS = [
    {"metric": "l2"},
    {"dtype": torch.bfloat16},
    {"engine": "faiss", "factory": "IVF4,Flat", "metric": "inner_product"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_save_load_pickle_deepcopy(tmp_path, settings):
    rows = torch.randn(300, 8)
    index = filled(rows, **settings)
    expected = index.search(rows[:9], 4)
    path = tmp_path / "index.safetensors"
    index.save(path)
    for twin in (
        PatchIndex.load(path),
        pickle.loads(pickle.dumps(index)),
        copy.deepcopy(index),
        PatchIndex.load(os.fspath(path), device="cpu"),
    ):
        assert repr(twin) == repr(index)
        assert same(twin.search(rows[:9], 4), expected)
        twin.add(rows[:5])
        assert (len(twin), len(index)) == (305, 300)
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_an_index_that_was_never_searched_and_an_empty_one(tmp_path):
    path = tmp_path / "index.safetensors"
    for index in (PatchIndex(4), filled(torch.randn(3, 4), engine="faiss", factory="IVF64,Flat")):
        index.save(path)
        twin = PatchIndex.load(path)
        assert repr(twin) == repr(index)
        assert torch.equal(twin.features, index.features)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, link = tmp_path / "index.safetensors", tmp_path / "link"
    old, new = filled(torch.randn(9, 4)), filled(torch.randn(5, 4))
    old.save(path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def interrupted(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            new.save(path)
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    assert torch.equal(PatchIndex.load(path).features, old.features)
    loaded = PatchIndex.load(path)
    link.symlink_to(path)
    new.save(link)
    assert link.is_symlink()
    assert torch.equal(PatchIndex.load(path).features, new.features)
    assert torch.equal(loaded.features, old.features)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def damaged(whole):
    """The bytes of a file, each with one thing wrong in them."""
    head = int.from_bytes(whole[:8], "little") + 8
    return {
        "truncated": whole[:-1],
        "truncated in its head": whole[:40],
        "longer": whole + b"\0",
        "empty": b"",
        "a bit of a row": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "a bit of its head": whole[:20] + bytes([whole[20] ^ 0x80]) + whole[21:],
        "another metric": whole.replace(b'"metric":"l2"', b'"metric":"l1"'),
        "another format": whole.replace(b"fmkernels.PatchIndex 1", b"fmkernels.PatchIndex 9"),
        "another dtype": whole.replace(b'"F32"', b'"I32"'),
        "another name": whole.replace(b'"features"', b'"featured"'),
        "of another kind": whole[head:],
    }


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "index.safetensors"
    filled(torch.randn(9, 4), metric="l2").save(path)
    whole = path.read_bytes()
    for how, wrong in damaged(whole).items():
        assert wrong != whole, how
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"PatchIndex.load: path: .*index\.safetensors"):
            PatchIndex.load(path)


def test_foreign_files_are_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "other.safetensors"
    safetensors.save_file({"features": torch.randn(3, 4)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors: its format is None.*open_bank"):
        PatchIndex.load(path)
    PatchMemory(torch.randn(3, 4), torch.ones(3, 2)).save(path)
    with pytest.raises(ValueError, match=r"not 'fmkernels.PatchIndex 1', and it holds features, l"):
        PatchIndex.load(path)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"load: path: expected a file that exists"):
            PatchIndex.load(missing)
    with pytest.raises(ValueError, match=r"save: path: expected a file in a folder that"):
        PatchIndex(4).save(tmp_path / "missing" / "index.safetensors")


def test_damaged_faiss_structures_are_refused(tmp_path):
    path = tmp_path / "index.safetensors"
    index = filled(torch.randn(9, 4), engine="faiss", factory="Flat")
    index.build()
    tensors, words = index._state()
    for wrong in (tensors["faiss"][:-3], torch.zeros(40, dtype=torch.uint8)):
        index._state = lambda wrong=wrong: (tensors | {"faiss": wrong}, words)
        index.save(path)
        with pytest.raises(ValueError, match=r"index\.safetensors: faiss cannot read its part"):
            PatchIndex.load(path)
    other = filled(torch.randn(20, 4), engine="faiss", factory="Flat")
    other.build()
    index._state = lambda: (tensors | {"faiss": other._state()[0]["faiss"]}, words)
    index.save(path)
    with pytest.raises(ValueError, match="faiss has 20 rows of 4 numbers"):
        PatchIndex.load(path)


def test_a_saved_index_is_a_bank(tmp_path):
    path, rows = tmp_path / "index.safetensors", torch.randn(40, 4)
    index = filled(rows, metric="l2")
    index.save(path)
    assert same(open_bank(path).search(rows, 3), index.search(rows, 3))


def test_threads_search_while_rows_are_added():
    rows = torch.randn(2000, 8)
    index = filled(rows[:1000])
    before, after = (fmkernels.knn(rows[:20], rows[:n], 3) for n in (1000, 2000))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(index.search, rows[:20], 3) for _ in range(8)]
        index.add(rows[1000:])
        jobs += [pool.submit(index.search, rows[:20], 3) for _ in range(8)]
        found = [job.result() for job in jobs]
    assert all(same(result, before) or same(result, after) for result in found)
    assert all(same(result, after) for result in found[8:])


def test_to_another_device():
    index = filled(torch.randn(9, 4))
    assert index.to("cpu") is index
    index.to("meta")
    assert index.features.device.type == index.device.type == "meta"
    assert index.features.shape == (9, 4)
    with pytest.raises(ValueError, match="queries: expected the device of the rows, meta, got cpu"):
        index.search(torch.randn(1, 4), 1)


# faiss


@pytest.mark.parametrize("metric", METRICS)
def test_flat_faiss_finds_what_the_exact_engine_finds(metric):
    rows, queries = 10 * torch.randn(200, 16), torch.randn(30, 16)
    index = filled(rows, engine="faiss", factory="Flat", metric=metric)
    scores, indices = index.search(queries, 5)
    expected = fmkernels.knn(queries, rows, 5, metric=metric)
    assert torch.equal(indices, expected[1])
    # float32: D roundings of the products, and for l2 of the norms, that are added up
    largest = (rows.norm(dim=-1).max() + queries.norm(dim=-1).max()) ** 2
    scale = 1 if metric == "cosine" else largest.item()
    torch.testing.assert_close(scores, expected[0], rtol=0, atol=16 * 2**-24 * scale)
    assert index.recall(queries, 5) == 1


@pytest.mark.parametrize("factory", ["IVF8,Flat", "HNSW16", "PQ4x4", "IDMap,Flat", "PCA8,IVF4,SQ8"])
def test_any_factory(factory):
    rows = torch.randn(600, 16)
    index = filled(rows[:400], engine="faiss", factory=factory)
    first = index.recall(rows[:50], 5)
    scores, indices = index.search(rows[:50].numpy(), 5)
    assert type(scores) is np.ndarray
    expected = fmkernels.knn(rows[:50], rows[:400], 5)[1]
    hits = [len(set(a) & set(b)) for a, b in zip(indices.tolist(), expected.tolist(), strict=True)]
    assert first == pytest.approx(sum(hits) / 250)
    assert 0.1 < first <= 1
    index.add(rows[400:])
    assert 400 <= index.search(rows[500:], 1)[1].max() < 600
    trained = index._faiss.index
    assert index.remove(range(100)) == 100
    assert 0.1 < index.recall(rows[100:150], 5) <= 1
    assert index._faiss.index is trained
    assert index.search(rows, 5)[1].max() < 500


def test_faiss_finds_fewer_than_asked():
    index = filled(torch.eye(4), engine="faiss", factory="Flat", metric="l2")
    scores, indices = index.search(torch.eye(4), 6)
    assert (indices[:, 4:] == -1).all()
    assert (scores[:, 4:] == torch.inf).all()
    assert (scores[:, :4].isfinite()).all()


def test_faiss_uses_the_gpu_of_the_rows(monkeypatch):
    """No GPU here: what faiss would be asked for."""
    faiss = pytest.importorskip("faiss")
    engine = filled(torch.eye(4), engine="faiss", factory="Flat")._faiss
    asked = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda *a: asked.append(a), raising=False)
    assert engine._on_device(torch.device("cpu")) is engine.index
    assert engine._on_device(torch.device("cuda:2")) is engine.index
    engine._on_device(torch.device("cuda:1"))
    assert asked == [("resources", 1, engine.index)]


# refusals


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: expected an integer >= 1, got 0"),
        ({"metric": "l1"}, ValueError, "metric: expected one of cosine, inner_product, l2"),
        ({"engine": "scann"}, ValueError, "engine: expected one of exact, faiss"),
        ({"engine": "faiss"}, ValueError, 'factory: expected a factory string such as "IVF4096'),
        ({"factory": "Flat"}, ValueError, "factory: expected None with engine='exact'"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected one of torch.float32"),
        ({"engine": "faiss", "factory": "Flut"}, ValueError, "could not parse index string Flut"),
        ({"engine": "faiss", "factory": "PQ3"}, ValueError, "got 'PQ3': .* multiple of the number"),
    ],
)
def test_settings_that_do_not_fit(settings, error, message):
    with pytest.raises(error, match="PatchIndex: .*" + message):
        PatchIndex(**({"dim": 4} | settings))


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, r"expected a floating-point dtype"),
        (np.zeros((3, 4), dtype=np.int32), TypeError, r"got int32; convert it with features\.as"),
        (np.zeros((3, 4), dtype=">f4"), TypeError, r"byte order, got >f4"),
        (np.zeros((3, 4), dtype=object), TypeError, r"got object"),
        ([[0.0] * 4], TypeError, r"expected a torch.Tensor or NumPy array, got list"),
        (torch.zeros(3, 5), ValueError, r"expected rows of 4 numbers, got shape \(3, 5\)"),
        (torch.zeros(4), ValueError, r"expected shape \(M, D\), got \(4,\)"),
    ],
)
def test_features_that_do_not_fit(features, error, message):
    index = PatchIndex(4)
    with pytest.raises(error, match=r"PatchIndex.add: features: .*" + message):
        index.add(features)
    assert len(index) == 0


@pytest.mark.parametrize(
    ("queries", "k", "error", "message"),
    [
        (torch.zeros(3, 5), 1, ValueError, r"queries: expected 4 numbers per query.*\(3, 5\)"),
        (torch.zeros(3, 4), 0, ValueError, "k: expected an integer >= 1, got 0"),
        (torch.zeros(3, 4), -2, ValueError, "k: expected an integer >= 1, got -2"),
        (torch.zeros(3, 4), 1.5, ValueError, "k: expected an integer >= 1, got 1.5"),
        (torch.zeros(3, 4).int(), 1, TypeError, "queries: expected a floating-point dtype"),
        (torch.tensor(1.0), 1, ValueError, "queries: expected at least one dimension"),
    ],
)
@pytest.mark.parametrize("method", ["search", "recall"])
def test_questions_that_do_not_fit(method, queries, k, error, message):
    index = filled(torch.eye(4))
    with pytest.raises(error, match=f"PatchIndex.{method}: {message}"):
        getattr(index, method)(queries, k)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([4], ValueError, "expected positions from 0 to 3, got 4"),
        ([-1], ValueError, "expected positions from 0 to 3, got -1"),
        ([0.5], TypeError, "expected integers or bool, got float64"),
        (torch.tensor([0.5]), TypeError, r"expected integers or bool, got torch\.float32"),
        (["a"], TypeError, "expected integers or bool"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"a mask of shape \(4,\), got shape \(3,\)"),
    ],
)
def test_positions_that_do_not_fit(indices, error, message):
    index = filled(torch.eye(4))
    with pytest.raises(error, match=r"PatchIndex.remove: indices: .*" + message):
        index.remove(indices)
    assert len(index) == 4


def test_other_refusals(monkeypatch):
    approximate = filled(torch.eye(4), engine="faiss", factory="Flat")
    with pytest.raises(ValueError, match="return_info: expected False with engine='faiss'"):
        approximate.search(torch.eye(4), 1, return_info=True)
    few = filled(torch.randn(10, 4), engine="faiss", factory="IVF64,Flat")
    with pytest.raises(ValueError, match=r"rows to train 'IVF64,Flat' .*, got 10: add more"):
        few.search(torch.zeros(1, 4), 1)
    with pytest.raises(ValueError, match="at least one row and one query, got 0 rows and 1"):
        PatchIndex(4).recall(torch.zeros(1, 4), 1)
    for module, call in (
        ("faiss", lambda: PatchIndex(4, engine="faiss", factory="Flat")),
        ("safetensors.torch", lambda: PatchIndex(4).save("never")),
        ("safetensors", lambda: PatchIndex.load("never")),
        ("tqdm", lambda: filled(torch.eye(4)).search(torch.eye(4), 1, progress=True)),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(__import__("sys").modules, module, None)
            with pytest.raises(ImportError, match=f"pip install {module.partition('.')[0]}"):
                call()
