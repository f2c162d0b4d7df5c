"""A frozen network, its images and what is extracted from them."""
