"""Layers with VeRA adapters: workloads, providers, limits, report."""
