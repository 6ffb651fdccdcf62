"""Thousands of adapters in bounded memory: what each row gets, who is evicted, and threads."""

from __future__ import annotations

import copy
import gc
import threading
import time

import pytest
import torch
from torch import nn

from fmkernels.api import (
    AdapterPool,
    UnknownAdapterError,
    VeraConfig,
    VeraModel,
    adapter_tables,
    get_vera_model,
)

LAYERS = {"0": (12, 20), "2": (20, 8)}
RANK = 6


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).to(dtype)


def config(**changes) -> VeraConfig:
    return VeraConfig(**{"r": RANK, "target_modules": ["0", "2"], **changes})


def vectors(seed: int, dora: bool = False, layers=LAYERS) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path, (_, outputs) in layers.items():
        sizes = {"lambda_d": RANK, "lambda_b": outputs}
        made[path] = {
            key: torch.randn(size, generator=generator, dtype=torch.float64)
            for key, size in sizes.items()
        }
        if dora:
            made[path]["magnitude"] = torch.rand(outputs, generator=generator).double() + 0.5
    return made


def alone(own: dict[str, dict[str, torch.Tensor]], dora: bool = False) -> VeraModel:
    """A model with one adapter of these vectors."""
    model = get_vera_model(mlp(), config(use_dora=dora))
    for path, values in own.items():
        for key, value in values.items():
            getattr(model.model.get_submodule(path), key)["default"].data.copy_(value)
    return model


def pool_of(count: int, capacity: int, **changes) -> AdapterPool:
    pool = AdapterPool(mlp(), config(**changes), capacity=capacity, dtype=torch.float64)
    for i in range(count):
        pool.put(f"a{i}", vectors(i, changes.get("use_dora", False)))
    return pool


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("dora", [False, True])
def test_every_row_is_that_of_a_model_with_its_adapter_alone(dora):
    pool = pool_of(30, 40, use_dora=dora)
    names = ["a3", "__base__", "a29", "a0", "a3"]
    with torch.no_grad():
        y = pool(X, adapter_names=names)
        assert torch.equal(y[1], mlp()(X)[1]) or dora
        for i, name in enumerate(names):
            expected = mlp()(X[i : i + 1])
            if name != "__base__":
                expected = alone(vectors(int(name[1:]), dora), dora)(X[i : i + 1])
            torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-12, atol=1e-12)
            assert name == "__base__" or not torch.allclose(expected, mlp()(X[i : i + 1]))


def test_a_pool_of_dvora_takes_vera_too():
    pool = pool_of(0, 3, use_dora=True)
    pool.put("plain", vectors(1))
    pool.put("scaled", vectors(2, dora=True))
    with torch.no_grad():
        y = pool(X[:2], adapter_names=["plain", "scaled"])
        torch.testing.assert_close(y[:1], alone(vectors(1))(X[:1]), rtol=1e-12, atol=1e-12)
        expected = alone(vectors(2, True), True)(X[1:2])
        torch.testing.assert_close(y[1:], expected, rtol=1e-12, atol=1e-12)


def test_layers_without_vectors_get_no_update():
    pool = pool_of(0, 2)
    pool.put("first", vectors(4))
    pool.put("first", vectors(5, layers={"0": LAYERS["0"]}))  # nothing of the one before is left
    only = vectors(5, layers={"0": LAYERS["0"]})
    only["2"] = {"lambda_d": torch.zeros(RANK), "lambda_b": torch.zeros(8)}
    with torch.no_grad():
        y = pool(X, adapter_names=["first"] * 5)
        torch.testing.assert_close(y, alone(only)(X), rtol=1e-12, atol=1e-12)


def test_without_names_the_model_is_what_it_was():
    model = mlp()
    before = model(X)
    pool = AdapterPool(model, config(), capacity=2)
    assert torch.equal(pool.model(X), before)


def test_a_merged_model_is_refused():
    model = alone(vectors(1))
    pool = AdapterPool(model, config(), capacity=2, dtype=torch.float64)
    pool.put("a", vectors(2))
    before = pool(X, adapter_names=["a"] * 5)
    model.merge()
    with pytest.raises(ValueError, match="expected adapters that are not merged, got 'default'"):
        pool(X, adapter_names=["a"] * 5)
    model.unmerge()
    assert torch.equal(pool(X, adapter_names=["a"] * 5), before)


@pytest.mark.parametrize("unload", [False, True])
def test_no_pool_is_made_nor_filled_over_merged_weights(tmp_path, unload):
    """Its layers would be lost when the adapter is taken out, and its norms another weight's."""
    model = alone(vectors(1))
    alone(vectors(2)).save_pretrained(tmp_path)
    pool = AdapterPool(model, config(use_dora=True), capacity=2, dtype=torch.float64)
    model.merge_and_unload() if unload else model.merge()
    for op, call in (
        ("AdapterPool", lambda: AdapterPool(model, config(), capacity=2)),
        ("AdapterPool.put", lambda: pool.put("a", vectors(2, dora=True))),
        ("AdapterPool.load", lambda: pool.load("a", tmp_path)),
    ):
        with pytest.raises(ValueError, match=f"^{op}: expected adapters that are not merged"):
            call()
    assert pool.names == []
    model.unmerge()
    pool.put("a", vectors(2, dora=True))
    with torch.no_grad():
        y = pool(X, adapter_names=["a"] * 5)
        torch.testing.assert_close(y, alone(vectors(2, True), True)(X), rtol=1e-12, atol=1e-12)


def test_without_memory_for_the_tables_the_model_is_what_it_was():
    model = mlp()
    with pytest.raises(RuntimeError):
        AdapterPool(model, config(), capacity=10**14)
    assert [type(module) for module in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert len(AdapterPool(model, config(), capacity=1).model.shared) == 1


def test_where_the_model_was_moved_to_the_pool_refuses_to_work():
    pool = pool_of(1, 2)
    pool.model.to("meta")
    for call in (
        lambda: pool(X, adapter_names=["a0"] * 5),
        lambda: pool.put("a1", vectors(1)),
    ):
        with pytest.raises(ValueError, match=r"expected the model on cpu, .*got one on meta"):
            call()
    assert pool.names == ["a0"]


def test_adapters_of_the_model_that_go_leave_a_pool_its_matrices():
    model = alone(vectors(1))
    model.add_adapter("other", config(projection_prng_key=1, init="position"))
    pool = AdapterPool(model, config(), capacity=2, dtype=torch.float64)
    pool.put("a", vectors(2))
    before = pool(X, adapter_names=["a"] * 5)
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert len(model.shared) == 1  # the pool's, not the other's
    assert torch.equal(pool(X, adapter_names=["a"] * 5), before)
    assert {f"shared.r6_kaiming_uniform_0_20x20.{k}" for k in "AB"} <= model.state_dict().keys()
    model.to(torch.float32)
    assert pool(X.float(), adapter_names=["a"] * 5).dtype == torch.float32
    assert pool._matrices.A.dtype == torch.float32
    copied = copy.deepcopy(model)  # no pool is of this one
    model.add_adapter("again", config())
    assert len(model.shared) == 1
    copied.add_adapter("again", config())
    copied.delete_adapter("again")
    assert len(copied.shared) == 0
    del pool
    gc.collect()
    model.delete_adapter("again")
    assert len(model.shared) == 0


def test_the_one_asked_for_longest_ago_is_evicted():
    pool = pool_of(3, 3)
    pool(X[:1], adapter_names=["a0"])
    pool.put("new", vectors(7))
    assert pool.names == ["a2", "a0", "new"]
    pool.put("a2", vectors(8))  # replaced: asked for now
    pool.put("newer", vectors(9))
    assert pool.names == ["new", "a2", "newer"]
    assert len(pool) == 3
    assert "a0" not in pool


def test_memory_does_not_grow():
    pool = pool_of(4, 4)
    sizes = RANK * 2 + 20 + 8
    assert pool.bytes_per_adapter == sizes * 8
    tables = [t.data_ptr() for each in pool._tables.values() for t in each if t is not None]
    for i in range(200):
        pool.put(f"more{i}", vectors(i))
    assert tables == [t.data_ptr() for each in pool._tables.values() for t in each if t is not None]
    assert len(pool) == 4
    assert sorted({pool._slots[name] for name in pool.names}) == [0, 1, 2, 3]


def test_an_unknown_name_is_refused_and_changes_nothing():
    pool = pool_of(3, 3)
    names = pool.names
    with pytest.raises(
        UnknownAdapterError,
        match=r"adapter_names: expected names in the pool, got 'x', 'y' in rows \[1, 3, 4\]",
    ) as caught:
        pool(X, adapter_names=["a0", "x", "a1", "y", "x"])
    assert caught.value.rows == [1, 3, 4]
    assert caught.value.names == ["x", "y"]
    assert pool.names == names  # asking for a0 and a1 did not count
    assert not any(pool._pins)
    rest = [i for i in range(5) if i not in caught.value.rows]
    served = pool(X[rest], adapter_names=["a0", "a1"])
    torch.testing.assert_close(served[:1], alone(vectors(0))(X[:1]), rtol=1e-12, atol=1e-12)


def test_a_full_pool_whose_adapters_are_all_in_a_batch_takes_no_other():
    pool = pool_of(2, 2)
    errors = []

    def put(*_):
        for name in ("new", "a0"):
            with pytest.raises(RuntimeError, match="make capacity larger") as caught:
                pool.put(name, vectors(50))
            errors.append(caught.value)

    pool.model.model[1].register_forward_hook(put)
    with torch.no_grad():
        y = pool(X[:2], adapter_names=["a0", "a1"])
    for i in range(2):
        expected = alone(vectors(i))(X[i : i + 1])
        torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-12, atol=1e-12)
    assert len(errors) == 2
    assert pool.names == ["a0", "a1"]
    assert not any(pool._pins)


def test_a_batch_that_fails_lets_go_of_its_adapters():
    pool = pool_of(2, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pool(torch.rand(2, 5, dtype=torch.float64), adapter_names=["a0", "a1"])
    assert not any(pool._pins)
    assert pool.model._adapters.state.rows is None
    pool.put("new", vectors(3))


def test_a_running_batch_keeps_the_adapter_that_it_began_with():
    pool = pool_of(2, 4)

    def swap(*_):
        pool.put("a0", vectors(50))
        pool.evict("a1")

    handle = pool.model.model[1].register_forward_hook(swap)
    with torch.no_grad():
        y = pool(X[:2], adapter_names=["a0", "a1"])
        handle.remove()
        for i in range(2):
            expected = alone(vectors(i))(X[i : i + 1])
            torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-12, atol=1e-12)
        swapped = pool(X[:1], adapter_names=["a0"])
        torch.testing.assert_close(swapped, alone(vectors(50))(X[:1]), rtol=1e-12, atol=1e-12)
    assert "a1" not in pool
    assert len(pool._free) == 3


def test_threads_that_call_load_and_evict_at_once():
    pool = pool_of(6, 24)  # more than six: what batches hold is replaced elsewhere
    expected = {i: alone(vectors(i))(X).detach() for i in range(6)}
    wrong: list[str] = []

    def serve(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(40):
            picks = torch.randint(0, 6, (5,), generator=generator).tolist()
            with torch.no_grad():
                y = pool(X, adapter_names=[f"a{i}" for i in picks])
            for row, i in enumerate(picks):
                if not torch.allclose(y[row], expected[i][row], rtol=1e-10, atol=1e-12):
                    wrong.append(f"row {row} of a{i}")

    def churn() -> None:
        for i in range(300):
            pool.put(f"a{i % 6}", vectors(i % 6))  # the same numbers in another place
            pool.put("other", vectors(100 + i))
            pool.evict("other")

    threads = [threading.Thread(target=serve, args=(s,)) for s in range(3)]
    threads.append(threading.Thread(target=churn))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(pool._pins)
    assert len(pool) == 6


def test_pools_of_one_model_and_direct_calls_take_turns():
    model = alone(vectors(1))
    pools = [
        AdapterPool(model, config(projection_prng_key=seed), capacity=2, dtype=torch.float64)
        for seed in (0, 1)
    ]
    for seed, pool in enumerate(pools):
        pool.put("a", vectors(seed + 2))
    calls = [
        lambda: pools[0](X, adapter_names=["a"] * 5),
        lambda: pools[1](X, adapter_names=["a", "a", "__base__", "a", "__base__"]),
        lambda: pools[0].model(X),
    ]
    model.model[1].register_forward_hook(lambda *_: time.sleep(0.002))  # others go on then
    with torch.no_grad():
        expected = [call() for call in calls]
    assert not any(torch.allclose(expected[i], expected[i - 1]) for i in range(3))
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(25):
            with torch.no_grad():
                y = calls[number]()
            if not torch.allclose(y, expected[number], rtol=1e-10, atol=1e-12):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model._adapters.state.rows is None


class Stop(BaseException):
    """As an interruption from the keyboard."""


@pytest.mark.parametrize("name", ["new", "a0", "a1"])
@pytest.mark.parametrize("free", [0, 1])
def test_an_adapter_that_cannot_be_written_leaves_the_pool_as_it_was(monkeypatch, name, free):
    pool = pool_of(2, 2 + free)
    names = ["a0", "a1"] * 2
    with torch.no_grad():
        before = pool(X[:4], adapter_names=names)
        write, calls = adapter_tables.Tables.write, []

        def failing(self, slot, row):
            calls.append(slot)
            if len(calls) == 2:  # the first layer is written
                self.lambda_d[slot] = 7
                raise Stop
            write(self, slot, row)

        with monkeypatch.context() as patch:
            patch.setattr(adapter_tables.Tables, "write", failing)
            with pytest.raises(Stop):
                pool.put(name, vectors(9))
        assert pool.names == ["a0", "a1"]
        assert len(pool._free) == free
        assert torch.equal(pool(X[:4], adapter_names=names), before)
        pool.put("more", vectors(5))
        pool.put("most", vectors(6))
        assert len(pool) == 2 + free
        y = pool(X, adapter_names=["most"] * 5)
        torch.testing.assert_close(y, alone(vectors(6))(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key", ["lambda_d", "lambda_b", "magnitude"])
def test_what_is_not_finite_in_the_dtype_of_the_pool_is_refused(key):
    pool = AdapterPool(mlp(), config(use_dora=True), capacity=2, dtype=torch.float16)
    own = vectors(1, dora=True)
    pool.put("a", own)
    own["2"][key][3] = 1e6
    with pytest.raises(ValueError, match=rf"put: vectors: .*finite in .*float16, got {key}.* of 2"):
        pool.put("b", own)
    assert pool.names == ["a"]
    wide = AdapterPool(mlp(), config(use_dora=True), capacity=2, dtype=torch.bfloat16)
    wide.put("b", own)
    own["2"][key][3] = torch.nan
    with pytest.raises(ValueError, match=rf"finite in .*bfloat16, got {key}"):
        wide.put("b", own)


def saved(folder, path, **changes):
    """A model with an adapter in the files of a folder."""
    model = get_vera_model(mlp(), config(**changes), "a")
    generator = torch.Generator().manual_seed(4)
    for parameter in model.adapter_parameters("a"):
        parameter.data.normal_(generator=generator)
    model.save_pretrained(folder / path, "a")
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("save_projection", [False, True])
@pytest.mark.parametrize("changes", [{"target_modules": ["0"]}, {"r": 3}], ids=["smaller", "rank"])
def test_positional_matrices_that_are_a_corner_of_the_pools(
    tmp_path, dora, save_projection, changes
):
    own = {"init": "position", "save_projection": save_projection, "use_dora": dora}
    model = saved(tmp_path, "a", **own, **changes)
    pool = pool_of(0, 2, init="position", use_dora=dora)
    pool.load("a", tmp_path / "a")
    with torch.no_grad():
        y = pool(X, adapter_names=["a"] * 5)
        torch.testing.assert_close(y, model(X), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(y, mlp()(X))


@pytest.mark.parametrize(
    "changes",
    [{"r": 7}, {"projection_prng_key": 1}, {"init": "kaiming_uniform"}],
    ids=["rank", "seed", "init"],
)
@pytest.mark.parametrize("save_projection", [False, True])
def test_positional_matrices_that_are_no_corner_are_refused(tmp_path, changes, save_projection):
    saved(tmp_path, "a", **{"init": "position", "save_projection": save_projection, **changes})
    pool = pool_of(0, 2, init="position")
    with pytest.raises(ValueError, match="load: path: expected the matrices of the pool"):
        pool.load("a", tmp_path / "a")
    assert len(pool) == 0


def test_files_of_a_wider_model_are_loaded_for_layers_of_the_pool(tmp_path):
    """The matrices in a file may be larger: what no layer takes of them does not matter."""
    model = saved(tmp_path, "a", init="position", target_modules=["0"])
    wider = get_vera_model(mlp(), config(init="position"), "a")
    (pair,), (wide,) = model._adapters.pairs(), wider._adapters.pairs()
    pair.A, pair.B = wide.A, wide.B
    model.save_pretrained(tmp_path / "wide", "a")
    pool = AdapterPool(
        mlp(), config(init="position", target_modules=["0"]), capacity=1, dtype=torch.float64
    )
    pool.load("a", tmp_path / "wide")
    with torch.no_grad():
        y = pool(X, adapter_names=["a"] * 5)
        torch.testing.assert_close(y, model(X), rtol=1e-12, atol=1e-12)


def test_a_file_for_other_layers_is_refused(tmp_path):
    saved(tmp_path, "a", init="position")
    pool = AdapterPool(
        mlp(), config(init="position", target_modules=["0"]), capacity=1, dtype=torch.float64
    )
    with pytest.raises(
        ValueError, match=r"^AdapterPool\.load: path: expected layers of the pool, got 2"
    ):
        pool.load("a", tmp_path / "a")


def test_what_peft_and_save_pretrained_wrote_is_loaded(tmp_path):
    model = alone(vectors(3))
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "seed", save_projection=False)
    pool = pool_of(0, 2)
    pool.load("a", tmp_path / "a")
    pool.load("seed", tmp_path / "seed")
    with torch.no_grad():
        for name in ("a", "seed"):
            y = pool(X, adapter_names=[name] * 5)
            torch.testing.assert_close(y, model(X), rtol=1e-12, atol=1e-12)


def test_dvora_is_loaded(tmp_path):
    model = alone(vectors(3, dora=True), dora=True)
    model.save_pretrained(tmp_path)
    pool = pool_of(0, 2, use_dora=True)
    pool.load("a", tmp_path)
    with torch.no_grad():
        y = pool(X, adapter_names=["a"] * 5)
    torch.testing.assert_close(y, model(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, r"expected the matrices of the pool \(r=6.*got others \(r=4"),
        ({"projection_prng_key": 3}, "expected the matrices of the pool"),
        ({"target_modules": ["0"]}, "expected the matrices of the pool"),
        (
            {"use_dora": True},
            r"load: path: expected a VeRA adapter in .*, got a DVoRA one; .*use_dora=True takes it",
        ),
        ({"bias": "all"}, "expected an adapter of vectors alone"),
        (
            {"modules_to_save": ["2"], "target_modules": ["0"]},
            "expected an adapter of vectors alone",
        ),
    ],
)
def test_another_kind_of_adapter_is_refused(tmp_path, changes, message):
    get_vera_model(mlp(), config(**changes)).save_pretrained(tmp_path)
    pool = pool_of(2, 2)
    with pytest.raises(ValueError, match=message):
        pool.load("other", tmp_path)
    assert pool.names == ["a0", "a1"]


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        (None, TypeError, r"AdapterPool\.put: vectors: expected a mapping .*, got NoneType"),
        ([1], TypeError, "vectors: expected a mapping from paths of layers .*, got list"),
        ({"0": None}, TypeError, r"vectors\['0'\]: expected a mapping .*, got NoneType"),
        ({"0": [1, 2]}, TypeError, r"vectors\['0'\]: expected a mapping .*, got list"),
        (
            {"0": {"lambda_d": [1] * RANK, "lambda_b": torch.rand(20)}},
            TypeError,
            r"vectors\['0'\]\['lambda_d'\]: expected a torch.Tensor, got list",
        ),
        (vectors(1, dora=True), ValueError, "got lambda_d, .*magnitude; .*use_dora=True takes it"),
        ({"1": {}}, ValueError, "vectors: expected layers of the pool, got 1"),
        ({1: {}}, ValueError, "vectors: expected layers of the pool, got 1"),
        ({"0": {"lambda_d": torch.rand(RANK)}}, ValueError, "expected lambda_d, lambda_b for 0"),
        (
            {"0": {"lambda_d": torch.rand(5), "lambda_b": torch.rand(20)}},
            ValueError,
            r"vectors\['0'\]\['lambda_d'\]: expected shape \(6,\), got \(5,\)",
        ),
        (
            {"0": {"lambda_d": torch.arange(RANK), "lambda_b": torch.rand(20)}},
            TypeError,
            "expected a floating-point dtype",
        ),
    ],
)
def test_vectors_that_do_not_fit_are_refused(own, error, message):
    pool = pool_of(2, 2)
    tables = copy.deepcopy([t for each in pool._tables.values() for t in each if t is not None])
    with pytest.raises(error, match=message):
        pool.put("a0", own)
    after = [t for each in pool._tables.values() for t in each if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(tables, after, strict=True))
    assert pool.names == ["a0", "a1"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AdapterPool(mlp(), config(), capacity=0), ValueError, "capacity: expected"),
        (lambda: AdapterPool(mlp(), config(), dtype=torch.int8), TypeError, "dtype: expected"),
        (lambda: AdapterPool(mlp(), config(target_modules=["9"])), ValueError, "target_modules"),
        (lambda: AdapterPool(mlp(), config(bias="all")), ValueError, "vectors alone"),
        (lambda: AdapterPool("model", config()), TypeError, "expected a torch.nn.Module"),
        (lambda: pool_of(1, 1).put("__base__", {}), ValueError, "expected a name other than"),
        (lambda: pool_of(1, 1).evict("b"), ValueError, "expected the name of one of 1"),
        (lambda: pool_of(1, 1)(X, adapter_names=["a0"]), ValueError, "a name for every row, 5"),
        (lambda: pool_of(1, 1)(X, adapter_names="a0"), TypeError, "a name for every row"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_every_sequence_is_generated_by_its_own_adapter():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads)).eval()
    own = VeraConfig(r=8, target_modules="all-linear")
    prompts = torch.randint(0, 64, (3, 5))
    singles, pool = [], AdapterPool(copy.deepcopy(llama), own, capacity=10)
    for i in range(2):
        torch.manual_seed(i + 1)
        single = get_vera_model(copy.deepcopy(llama), own)
        for parameter in single.adapter_parameters("default"):
            parameter.data.uniform_(-3, 3)
        singles.append(single)
        layers = single._adapters.targets("default")
        pool.put(f"a{i}", {path: layer.vectors("default") for path, layer in layers.items()})
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    got = pool.generate(prompts, adapter_names=["a1", "__base__", "a0"], **options)
    models = [singles[1], llama, singles[0]]
    for i, model in enumerate(models):
        assert torch.equal(got[i], model.generate(prompts[i : i + 1], **options)[0])
    assert len({tuple(row[5:].tolist()) for row in got}) == 3
    beams = pool.generate(prompts, adapter_names=["a1", "__base__", "a0"], num_beams=3, **options)
    for i, model in enumerate(models):
        expected = model.generate(prompts[i : i + 1], num_beams=3, **options)[0]
        assert torch.equal(beams[i], expected)


def test_an_adapter_of_llama_7b_takes_2_8_megabytes_in_bfloat16():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig())  # the sizes of LLaMA-7B
    own = VeraConfig(r=256, target_modules="all-linear")
    pool = AdapterPool(llama, own, capacity=1000, dtype=torch.bfloat16)
    assert pool.bytes_per_adapter == 2 * 32 * (7 * 256 + 5 * 4096 + 2 * 11008)
    assert pool.bytes_per_adapter / 1e6 == pytest.approx(2.83, abs=0.01)


def test_a_pool_serves_in_evaluation_mode_and_without_gradients():
    model = nn.Sequential(nn.Linear(12, 20), nn.Dropout(0.5), nn.Linear(20, 8)).double().train()
    pool = AdapterPool(model, config(), capacity=2, dtype=torch.float64)
    pool.put("a", vectors(1))
    y = pool(X, adapter_names=["a"] * 5)
    assert not y.requires_grad
    assert torch.equal(pool(X, adapter_names=["a"] * 5), y)
