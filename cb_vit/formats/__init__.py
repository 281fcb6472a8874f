"""Weight files: their arrays in and out, safely, and other codebases' names for a ViT's parameters."""
from cb_vit.formats.files import FormatError, Tensor, WeightFile
from cb_vit.formats.npz import write_npz
from cb_vit.formats.opening import open_file, parameters, split_subtree
from cb_vit.formats.safetensors import write_safetensors

__all__ = ["FormatError", "Tensor", "WeightFile", "open_file", "parameters", "split_subtree", "write_npz",
           "write_safetensors"]
