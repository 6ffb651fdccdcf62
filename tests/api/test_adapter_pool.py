"""Thousands of adapters in bounded memory: what each row gets, who is evicted, and threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from fmkernels.api import AdapterPool, UnknownAdapterError, VeraConfig, VeraModel, get_vera_model

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
            "expected lambda_d, lambda_b for 0, got lambda_d, lambda_b, magnitude",
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
        ({"1": {}}, ValueError, "vectors: expected layers of the pool, got 1"),
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
