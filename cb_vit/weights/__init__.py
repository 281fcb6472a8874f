"""Trained models from anywhere, in and out: runs, files of other codebases, and hubs."""
from cb_vit.weights.loading import LoadConfig, Weights, load, merge, open_weights

__all__ = ["LoadConfig", "Weights", "load", "merge", "open_weights"]
