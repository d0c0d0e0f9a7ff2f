"""Experiments on models, one per module: each function takes a model and returns a frame or tensors."""
