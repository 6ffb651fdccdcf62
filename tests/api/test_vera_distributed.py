"""VeRA and DVoRA on two ranks, replicated (DDP) and sharded (FSDP2): as on one, on all rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vera_ddp
from safetensors.torch import load_file

from fmkernels.api import VeraModel

SUPPORT = Path(__file__).parent.parent / "support"
WORLD = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks write."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    """What every rank found."""
    results = [folder / f"rank{rank}.pt" for rank in range(WORLD)]
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "GLOO_SOCKET_IFNAME": "lo"}
    program = [sys.executable, "-W", "error", SUPPORT / "vera_ddp.py"]
    processes = [
        subprocess.Popen(
            [*program, str(rank), str(WORLD), folder / "store", result],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, errors
    return [torch.load(result, weights_only=True) for result in results]


def alone(dora, names=None):
    return vera_ddp.train(vera_ddp.adapted(dora), vera_ddp.batch(), names)


def assert_same(ranks, key, expected):
    for found in ranks:
        gradients, weights = found[key]
        torch.testing.assert_close(gradients, expected[0])
        torch.testing.assert_close(weights, expected[1])
    assert any("lambda_b" in name for name in expected[0])
    assert any("copies" in name for name in expected[0])
    assert all(bool(gradient.any()) for gradient in expected[0].values())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_as_one_process_on_the_whole_batch(ranks, kind, dora):
    assert_same(ranks, (kind, dora), alone(dora))


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_for_every_row(ranks, dora):
    half = vera_ddp.ROWS // 4
    names = ["default", "__base__"] * half + ["__base__", "default"] * half
    assert_same(ranks, ("rows", dora), alone(dora, names))


@pytest.mark.parametrize("dora", [False, True])
def test_shared_matrices_are_on_every_rank_and_not_sent(ranks, dora):
    """To send a buffer is to write to it."""
    expected = vera_ddp.matrices(vera_ddp.adapted(dora))
    for found in ranks:
        for key in ("ddp matrices", "fsdp matrices"):
            assert torch.equal(found[key, dora]["A"], expected["A"])
            assert torch.equal(found[key, dora]["B"], expected["B"])
        assert found["ddp matrices", dora]["versions"] == found["ddp matrices", dora]["before"]
        assert set(found["fsdp sharded", dora].values()) == {"DTensor"}


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_sharded_is_gathered_when_it_is_saved(ranks, folder, dora):
    _, expected = alone(dora)
    bare = vera_ddp.adapted(dora).merge_and_unload()  # of the same base weights elsewhere
    loaded = VeraModel.from_pretrained(bare, folder / f"store.vera.{dora}", is_trainable=True)
    found = vera_ddp.gathered(loaded)
    torch.testing.assert_close(found, expected)
    whole = vera_ddp.adapted(dora)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name in found:
                parameter.copy_(found[name])
    whole.to_lora(folder / "whole")
    factors = load_file(folder / f"store.lora.{dora}" / "adapter_model.safetensors")
    torch.testing.assert_close(factors, load_file(folder / "whole" / "adapter_model.safetensors"))
    for kind in ("vera", "lora"):
        assert len(list((folder / f"store.{kind}.{dora}").iterdir())) == 2


@pytest.mark.parametrize("dora", [False, True])
def test_sharded_weights_are_not_merged(ranks, dora):
    for found in ranks:
        words = "VeraModel.merge: expected weights that are whole, got "
        assert found["fsdp merge", dora].startswith(words)


def test_constants_of_dvora_are_made_once(ranks):
    """Although FSDP frees the weights and fills them again, elsewhere, in every step."""
    for found in ranks:
        assert found["fsdp constants", False] == 0
        assert found["fsdp constants", True] == 6  # layers


@pytest.mark.parametrize("dora", [False, True])
def test_mixed_precision(ranks, dora):
    """Weights in float32, all else in bfloat16: as a copy in bfloat16 of each rank's half."""
    model = vera_ddp.adapted(dora, torch.float32)
    optimizer = vera_ddp.optimizer_of(model)
    first = None
    for x in vera_ddp.batch(torch.float32):
        gradients = [half_gradients(model, dora, half) for half in x.chunk(WORLD)]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = (gradients[0][name] + gradients[1][name]) / WORLD
        first = first or {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    assert_same(ranks, ("mixed", dora), (first, vera_ddp.gathered(model)))


def half_gradients(model, dora, x):
    half = vera_ddp.adapted(dora, torch.float32)
    half.load_state_dict(model.state_dict())
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    y = half(x.bfloat16()).float()
    y.square().mean().backward()
    return {n: p.grad.float() for n, p in half.named_parameters() if p.requires_grad}
