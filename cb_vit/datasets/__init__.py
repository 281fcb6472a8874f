"""Where examples come from: TFDS copies, image folders, MNIST's files, scikit-learn's digits, made-up images, and
what is put together of these."""
from cb_vit.datasets.contents import Absent, DataError
from cb_vit.datasets.core import Source, check_source, open_source
from cb_vit.datasets.relabel import align, classes_of, for_head, known_names

__all__ = ["Absent", "DataError", "Source", "align", "check_source", "classes_of", "for_head", "known_names",
           "open_source"]
