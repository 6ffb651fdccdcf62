"""Run as a program: by how much a search of a bank in a file raises the peak memory."""

import sys

import torch

from fmkernels._memory import peak_extra_bytes
from fmkernels.api import open_bank


def main(small, large):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bank = open_bank(large, metric="inner_product")
    queries = torch.randn(4, bank.dim)
    open_bank(small, metric="inner_product").search(queries, 3)  # what a first search loads
    found = []
    extra = peak_extra_bytes(lambda: found.append(bank.search(queries, 3)))
    print(extra, found[0][1].tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
