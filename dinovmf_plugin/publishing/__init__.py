"""Weights that travel: exported folders, their measured numbers, and the Hugging Face Hub."""
