"""Measures of a mixture of von Mises-Fisher components; pure functions."""
