"""NeCo's sort: workloads, providers, parity, limits and its part of the report."""
