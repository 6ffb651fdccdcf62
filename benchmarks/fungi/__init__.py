"""Projections of per-sample gradients: workloads, providers, limits, report."""
