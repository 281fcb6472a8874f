"""Evaluators: what is measured during training, and by `cb-vit eval`."""
