"""Checkpoints in several files with an index, as Hugging Face lays them out.

`model.safetensors.index.json`, or `pytorch_model.bin.index.json`: `{"metadata": {…}, "weight_map": {array: file beside
it}}`.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from cb_vit.weights.containers.files import FormatError, Tensor, WeightFile, open_binary, reading, show
from cb_vit.weights.containers.safetensors import MAX_HEADER, parse_json


def open_index(path: str, open_shard: Callable[[str], WeightFile]) -> WeightFile:
    """Open a checkpoint in several files by its index.

    Args:
        path: the path of the index.
        open_shard: the function that opens one of the files.

    Raises:
        FormatError: the index is damaged, leads out of its folder, or disagrees with the files.
    """
    weight_map, metadata = read_index(path)
    tensors: dict[str, Tensor] = {}
    kinds = set()
    for shard in shards(path, weight_map):
        found = open_shard(os.path.join(os.path.dirname(path), shard))
        kinds.add(found.kind)
        if wrong := found.tensors.keys() ^ {name for name, file in weight_map.items() if file == shard}:
            raise FormatError(f"{path}: {show(shard)} and the index do not agree about {show(min(wrong))}; "
                              f"they are of different checkpoints, fetch all of them again")
        tensors |= found.tensors
    if len(kinds) > 1:
        raise FormatError(f"{path}: its files are of several kinds, {' and '.join(sorted(kinds))}; fetch them again")
    return WeightFile(path, kinds.pop(), tensors, metadata)


def read_index(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The map from arrays to files, and the metadata, of an index.

    Raises:
        FormatError: the file is no index.
    """
    with open_binary(path) as file, reading(path):
        index = parse_json(file.read(MAX_HEADER), path, "the index")
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise FormatError(f"{path}: this JSON file is no index of weights, it has no weight_map; "
                          f"give the file that holds the weights")
    if not weight_map:
        raise FormatError(f"{path}: its weight_map is empty, so it holds no arrays; fetch the index again")
    return weight_map, metadata


def shards(path: str, weight_map: dict[str, Any]) -> list[str]:
    """The files that an index names, each once.

    Args:
        path: the path of the index, for errors.
        weight_map: the index's map from arrays to files.

    Raises:
        FormatError: a file is not beside the index, or by the names of the others some are missing.
    """
    found = list(dict.fromkeys(map(str, weight_map.values())))
    for shard in found:
        # An index from anywhere could otherwise have any file of this machine read.
        if not shard or shard in (".", "..") or any(c in shard for c in "/\\:\0"):
            raise FormatError(f"{path}: refers to {show(shard)}; an index may name only files beside it")
    numbered = [re.search(r"-of-(\d{1,9})\b", shard) for shard in found]
    most = max((int(match[1]) for match in numbered if match), default=0)
    if all(numbered) and len(found) < most:
        raise FormatError(f"{path}: names {len(found)} files of {most}, so it is incomplete; fetch the index again")
    return found
