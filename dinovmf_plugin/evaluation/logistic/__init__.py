"""Softmax regression on frozen features: few-shot and small data sets."""
