"""PyTorch's `.pth` and `.bin`: pickles, read by PyTorch itself, and only by its loader that runs no code.

torch is no requirement of cb_vit and must not be imported where no such file is opened, hence `importlib`. Python's own
pickle is used nowhere: whoever made the file could have it run anything.
"""
from __future__ import annotations

import argparse
import importlib
import mmap
import os
import re
import zipfile
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from cb_vit.io import as_path, is_local
from cb_vit.texts import first_few
from cb_vit.weights.containers.files import (
    DTYPES,
    FormatError,
    Tensor,
    WeightFile,
    count_bytes,
    open_binary,
    reading,
    show,
)

# Where training scripts keep the model among optimiser, epoch and settings (DeiT, timm: "model", "state_dict").
KEYS = ("model", "state_dict")
ADVICE = "save the weights alone, with torch.save(model.state_dict(), path)"
MIN_VERSION = "2.6"  # before, a file could run code in spite of weights_only=True (CVE-2025-32434)


def open_torch(path: str, key: str | None = None) -> WeightFile:
    """Open a `.pth` or `.bin` file.

    Args:
        path: the path of the file, on this machine. Files of PyTorch 1.6 and later are mapped, not read; older ones are
            read as a whole.
        key: the entry that holds the weights, e.g. "model_ema"; None: "model", "state_dict" or the file itself.

    Raises:
        FormatError: torch is not installed, the file is damaged or holds more than data, or there are no weights where
            they should be.
    """
    if not is_local(path):
        raise FormatError(f"{path}: PyTorch reads files of this machine only; copy it here first")
    torch = _torch(path)
    weights = _choose(_load(torch, path), key, torch, path)
    size = os.path.getsize(as_path(path))
    return WeightFile(path, "torch", {name: _tensor(value, size, f"{path}: {show(name)}", torch)
                                      for name, value in weights.items()})


def _torch(path: str) -> ModuleType:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise FormatError(f"{path}: this file needs PyTorch to be read; pip install torch, or convert it to "
                          f"safetensors where PyTorch is") from None
    if torch.__version__ < MIN_VERSION:
        raise FormatError(f"{path}: PyTorch {torch.__version__} reads files unsafely; install {MIN_VERSION} or later")
    return torch


def _load(torch: ModuleType, path: str) -> Any:
    mapped = _check_content(path)
    try:
        # Scripts of DeiT's kind save their settings beside the weights; a Namespace is nothing but attributes.
        with torch.serialization.safe_globals([argparse.Namespace, *_scalars(path)]), reading(path):
            return torch.load(str(as_path(path)), map_location="cpu", mmap=mapped, weights_only=True)
    except FormatError as error:
        if "weights_only" not in (words := str(error.__cause__)):
            raise
        # PyTorch's own words advise to load the file unsafely.
        found = re.search(r"GLOBAL (\S+)", words)
        what = f"holds a Python object, {show(found[1])}, and to make it could run code" if found else "is damaged"
        raise FormatError(f"{path}: {what}; {ADVICE}") from None


class _Scalar:
    """Stands for the NumPy scalars, and their dtypes, that scripts save beside the weights: nothing is made of them."""

    path: str

    def __init__(self, code: Any, *rest: Any):
        if isinstance(code, str) and not re.fullmatch(r"[biufcSUmM]\d*", code):
            raise FormatError(f"{self.path}: holds NumPy's {show(code)}, neither number nor text; {ADVICE}")

    def __setstate__(self, state: Any) -> None:
        """Nothing."""


def _scalars(path: str) -> list[type[_Scalar]]:
    """What NumPy's scalars are pickled with, before and since NumPy 2; arrays are not among them.

    PyTorch knows what it may make by module and name.
    """
    names = ("numpy", "dtype"), ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")
    return [type(name, (_Scalar,), {"__module__": module, "path": path}) for module, name in names]


def _check_content(path: str) -> bool:
    """Whether the file is a zip archive, as PyTorch writes since 1.6; what it would unpack without bound is refused."""
    with open_binary(path) as file, reading(path):
        if zipped := file.read(2) == b"PK":
            archive = zipfile.ZipFile(file)
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise FormatError(f"{path}: is a program (TorchScript), not weights; {ADVICE}")
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise FormatError(f"{path}: is compressed, which PyTorch's weights never are; {ADVICE}")
            pickled = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
        else:
            pickled = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # PyTorch's loader makes a bytearray of as many zeros as the file says, and no weights need one.
        if pickled.find(b"\nbytearray\n") >= 0:
            raise FormatError(f"{path}: holds a bytearray; {ADVICE}")
    return zipped


def _choose(content: Any, key: str | None, torch: ModuleType, path: str) -> dict[str, Any]:
    """The arrays of the entry `key`, or of the one that holds the weights by custom."""
    def arrays(value: Any) -> dict[str, Any]:
        value = value if isinstance(value, Mapping) else {}
        return {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, torch.Tensor)}

    entries = content if isinstance(content, Mapping) else {}
    choices = [name for name in entries if isinstance(name, str) and arrays(entries[name])]
    chosen = key or next((name for name in KEYS if name in choices), None)
    found = arrays(entries.get(chosen) if chosen else entries)
    if not found:
        listed = first_few(map(show, choices), 10) or "none"
        what = "the state of an optimiser and " * ({"state", "param_groups"} <= entries.keys()) + "no weights"
        raise FormatError(f"{path}: holds {what}{f' under {show(key)}' if key else ''}; "
                          f"entries with weights: {listed}" + ("; choose with key=" if choices else ""))
    return found


def _tensor(tensor: Any, size: int, where: str, torch: ModuleType) -> Tensor:
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = next((known for known in DTYPES if known.name == name), None)
    if dtype is None or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise FormatError(f"{where} is {tensor.dtype}, {tensor.layout}; only dense numbers and bfloat16 are supported")
    # Strides of 0 let a small file declare any size.
    if count_bytes(tuple(tensor.shape), dtype, where) > size:
        raise FormatError(f"{where} is larger than its file; the file is damaged")

    def read() -> np.ndarray:
        values = tensor.detach()
        # NumPy sees no bfloat16 of PyTorch's.
        values = values.view(torch.int16) if dtype.name == "bfloat16" else values
        return np.array(values.numpy(), order="C").view(dtype)

    return Tensor(tuple(tensor.shape), dtype, read)
