"""cb_vit: Vision Transformers with Context Broadcasting (arXiv 2210.08457) in JAX and Flax."""
__version__ = "0.1.0"
