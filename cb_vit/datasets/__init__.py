"""Where examples come from: TFDS copies, image folders, MNIST's files, scikit-learn's digits and made-up images."""
from cb_vit.datasets.contents import DataError
from cb_vit.datasets.core import Source, check_source, open_source
from cb_vit.datasets.relabel import align, for_head, known_names

__all__ = ["DataError", "Source", "align", "check_source", "for_head", "known_names", "open_source"]
