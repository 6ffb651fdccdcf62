"""The ops: stateless functions on tensors, one folder each."""
