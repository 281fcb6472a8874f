"""Files of weights: their arrays in and out, safely, whatever they are called in there."""
from cb_vit.weights.containers.files import FormatError, Tensor, WeightFile
from cb_vit.weights.containers.npz import write_npz
from cb_vit.weights.containers.opening import open_file, parameters, split_subtree
from cb_vit.weights.containers.safetensors import write_safetensors

__all__ = ["FormatError", "Tensor", "WeightFile", "open_file", "parameters", "split_subtree", "write_npz",
           "write_safetensors"]
