"""The multi-crop recipe on NVIDIA DALI, on a GPU or the CPU."""
