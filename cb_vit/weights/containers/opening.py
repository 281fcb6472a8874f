"""From a path to the arrays of a weight file, whatever its kind."""
from __future__ import annotations

import os
import re
import zipfile

from cb_vit.io import as_path
from cb_vit.weights.containers.files import FormatError, Kind, Tensor, WeightFile, open_binary, reading, show
from cb_vit.weights.containers.index import open_index
from cb_vit.weights.containers.npz import SUFFIX, open_npz
from cb_vit.weights.containers.safetensors import MAX_HEADER, open_safetensors
from cb_vit.weights.containers.torch_files import open_torch

# What a folder of Hugging Face's holds, in the order in which transformers looks.
IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
             "pytorch_model.bin.index.json")
# torch.save before 1.6: a pickle that begins with the number 0x1950a86a20f9469cfc6c.
TORCH_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
OTHERS = {
    b"version https://git-lfs": "this is a Git LFS pointer, not the file itself; fetch that with git lfs pull",
    b"<": "this is a web page, not a weight file; the download failed, perhaps for want of a login",
    b"\x93NUMPY": "this is a single NumPy array; give an .npz with all of them",
    b"\x89HDF": "this is an HDF5 file of Keras, which is not supported; convert it to .npz or .safetensors",
    b"\x1f\x8b": "this is compressed with gzip; unpack it first",
    b"\x80": "this is a Python pickle, which could run code; save the arrays as .npz or .safetensors",
}
HEAD = 64  # bytes that tell what a file is
# Where big_vision keeps the parameters: of the days of optax, and of those of Flax's optimisers.
PREFIXES = ("params/", "opt/target/")
SHARDS = {"safetensors": open_safetensors, "torch": open_torch}


def split_subtree(path: str) -> tuple[str, str | None]:
    """`"file.npz:img"` as `("file.npz", "img")`, big_vision's way to name a part of a file; None: all of it.

    A colon in `gs://…`, `hf-hub:…`, `http://host:80/…`, `C:\\…` or in the name of a file that is there is left alone.

    Args:
        path: the path, with or without the name of a part.
    """
    match = re.fullmatch(r"(?P<file>.+):(?P<subtree>\w[\w./-]*)", path)
    if match is None or os.path.exists(path) or re.fullmatch(r"\w+://[^/]*|[^/\\.]*", match["file"]):
        return path, None
    return match["file"], match["subtree"].rstrip("/")


def open_file(path: str | os.PathLike, key: str | None = None) -> WeightFile:
    """Open a weight file by what is in it, whatever it is called; reads names, shapes and dtypes, but no values.

    Args:
        path: the path of a safetensors, npz or PyTorch file, of the index of several of the first or the last, or of a
            folder as Hugging Face has them that holds one of these.
        key: the entry of a PyTorch file that holds the weights, e.g. "model_ema"; None: see `open_torch`.

    Raises:
        FormatError: there is no such file, it is damaged or of no kind known here, or it has no such key.
    """
    path = _in_folder(os.fspath(path))
    kind = _kind(path)
    if key is not None and kind != "torch":
        raise FormatError(f"{path}: key={key!r} is for PyTorch files; this is {kind}")
    if kind == "index":
        file = open_index(path, _open_shard)
    elif kind == "torch":
        file = open_torch(path, key)
    else:
        file = {"npz": open_npz, "safetensors": open_safetensors}[kind](path)
    if not file.tensors:
        raise FormatError(f"{path}: holds no arrays")
    return file


def parameters(file: WeightFile) -> dict[str, Tensor]:
    """The model's parameters among the arrays of a file, by bare names.

    As big_vision reads its own files (`utils.py`, `load_params`): those under `params/`, or else under `opt/target/`,
    without that prefix and without the rest, which is the optimiser's; or else all of them.

    Args:
        file: the open file.
    """
    for prefix in PREFIXES:
        if found := {name.removeprefix(prefix): tensor for name, tensor in file.tensors.items()
                     if name.startswith(prefix)}:
            return found
    return file.tensors


def _open_shard(path: str) -> WeightFile:
    kind = _kind(path)
    if kind not in SHARDS:
        raise FormatError(f"{path}: is {kind}, where one of several files should be {' or '.join(SHARDS)}")
    return SHARDS[kind](path)


def _in_folder(path: str) -> str:
    """The file that holds the weights of the folder `path`; `path` itself if it is a file."""
    with reading(path):
        folder = as_path(path)
        if not folder.is_dir():
            return path
        for name in IN_FOLDER:
            if (folder / name).exists():
                return os.path.join(path, name)
    raise FormatError(f"{path}: this folder holds none of {', '.join(IN_FOLDER)}; give the weight file itself")


def _kind(path: str) -> Kind | str:
    """The kind of a file, by its first bytes: "index" or a `Kind`."""
    with open_binary(path) as file, reading(path):
        head = file.read(HEAD)
        if head.startswith(b"PK"):
            return _kind_of_archive(zipfile.ZipFile(file).namelist(), path)
    if head.startswith(TORCH_LEGACY):
        return "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"{"):
        return "index"
    for start, words in OTHERS.items():
        if text.startswith(start):
            raise FormatError(f"{path}: {words}")
    raise FormatError(f"{path}: " + ("this is not a weight file or a damaged one; safetensors, npz and PyTorch files "
                                     "can be read" if head else "the file is empty; fetch it again"))


def _kind_of_archive(names: list[str], path: str) -> Kind:
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    if all(name.endswith(SUFFIX) for name in names):
        return "npz"
    strange = next(name for name in names if not name.endswith(SUFFIX))
    raise FormatError(f"{path}: this zip archive is neither an .npz nor a PyTorch file; it holds {show(strange)}")
