"""What needs a GPU, in one command: ``make gpu``. Tests first, then benchmarks, then tuning.

It runs from an installed wheel, without network or compiler, within nine minutes, and leaves one
JSON per suite; ``make gpu-accept`` makes committed results of them. ``make gpu-dry-run`` goes
through all of it on a machine without a GPU: everything but the numbers.
"""
