"""Where examples come from: TFDS copies, image folders, MNIST's files, scikit-learn's digits and made-up images."""
from cb_vit.datasets.core import DataError, Source, check_source, open_source

__all__ = ["DataError", "Source", "check_source", "open_source"]
