"""The paper's evaluations: functional cores (tensors in, numbers out) and thin runners."""
