"""Video object segmentation by label propagation (DAVIS 2017)."""
