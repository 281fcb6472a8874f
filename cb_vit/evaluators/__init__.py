"""Evaluators: what is measured during training, and by `python -m cb_vit.tools.eval_only`."""
