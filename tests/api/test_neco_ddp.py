"""NeCo's loss on two ranks: gradients are averaged, queues stay apart."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SUPPORT = Path(__file__).parent.parent / "support"


def test_two_ranks(tmp_path):
    results = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, SUPPORT / "neco_ddp.py", str(rank), "2", tmp_path / "store", result],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (torch.load(result, weights_only=True) for result in results)
    assert torch.equal(first["averaged"], second["averaged"])
    torch.testing.assert_close(first["averaged"], first["alone"])
    assert first["shared"].item() == second["shared"].item() == 0
    assert (first["patches"] != second["patches"]).any(dim=-1).all()
    assert first["keys"] == ["module.criterion.queue._extra_state"]
