"""Nearest neighbours and in-context segmentation: workloads, providers, limits, report."""
