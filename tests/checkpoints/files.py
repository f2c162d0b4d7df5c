"""Weight files of the tests."""

import torch


def save(folder, content, name="file.pth"):
    """Write what torch.save writes; the path."""
    path = folder / name
    torch.save(content, path)
    return path
