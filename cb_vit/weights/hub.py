"""The Hugging Face hub, and the cards that lie beside weights; what they say is for `dialects` to understand.

Needs `pip install huggingface_hub` for `hf://` only. Without a network its cache is used.
"""
from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cb_vit.io import open_regular
from cb_vit.weights.containers import FormatError
from cb_vit.weights.containers.files import reading
from cb_vit.weights.containers.index import read_index, shards
from cb_vit.weights.containers.opening import IN_FOLDER
from cb_vit.weights.containers.safetensors import parse_json

TIMEOUT = 5  # seconds, for the hub's first answer
CARDS = ("config.json", "preprocessor_config.json")


def resolve(path: str) -> tuple[str, dict[str, Any]]:
    """The local file or folder of `path`, fetched if it is on the hub, and the cards beside it as one dict.

    Args:
        path: local path, or `hf://ORG/NAME[@REVISION][/FILE]`.

    Raises:
        FormatError: the address is not of this form, or names what is not there or not allowed.
    """
    if not path.startswith("hf://"):
        local = os.path.expanduser(path)
        folder = Path(local) if os.path.isdir(local) else Path(local).parent
        return path, _cards({name: folder / name for name in CARDS})
    match = re.fullmatch(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>[^@]+))?", path)
    if match is None:
        raise FormatError(f"{path}: write hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME/FILE")
    names = [match["file"]] if match["file"] else list(IN_FOLDER)
    silent = _unreachable(path, match["repo"], match["revision"], names[0])
    download = functools.partial(_download, path, match["repo"], match["revision"], silent is not None)
    found = next((file for file in map(download, names) if isinstance(file, str)), None)
    if found is None and silent:
        raise FormatError(f"{path}: is not in the hub's cache, and {silent}. Where there is a network, run "
                          f"`hf download {match['repo']}` and bring its cache here (HF_HUB_CACHE), or give a file")
    if found is None:
        raise FormatError(f"{path}: has no file {' or '.join(names)}; name the file, as in "
                          f"hf://{match['repo']}/FILE")
    if found.endswith(".index.json"):
        for shard in shards(found, read_index(found)[0]):
            download(shard)
    cards = {name: Path(card) for name in CARDS if (card := download(name))}
    return found, _cards(cards)


def _library(path: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise FormatError(f"{path}: the hub needs a library: pip install huggingface_hub") from None


def _unreachable(path: str, repo: str, revision: str | None, name: str) -> str | None:
    """Why the hub does not answer, asked once and briefly: its library would ask six times for each file."""
    library = _library(path)
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        library.get_hf_file_metadata(library.hf_hub_url(repo, name, revision=revision), timeout=TIMEOUT)
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
            errors.HFValidationError):
        return None  # it answers; what it says comes up again with the download
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE forbids to ask the hub"
    except Exception as error:  # the library's, or one of what it happens to be built on
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        return f"{library.constants.ENDPOINT} cannot be reached ({reason}; HF_HUB_OFFLINE=1 spares the try)"
    return None


def _download(path: str, repo: str, revision: str | None, cached: bool, name: str) -> str | None:
    """The file in the hub's cache, fetched if need be unless `cached`; None if it is neither there nor on the hub."""
    library = _library(path)
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        return library.hf_hub_download(repo, name, revision=revision, local_files_only=cached)
    except errors.EntryNotFoundError:  # LocalEntryNotFoundError, without a network, is one of them
        return None
    except errors.GatedRepoError:
        raise FormatError(f"{path}: asks for its terms to be accepted; do so on its page and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise FormatError(f"{path}: no such repository, or a private one; for that set HF_TOKEN") from None
    except Exception as error:  # the library's, or one of what it happens to be built on
        raise FormatError(f"{path}: {(str(error) or repr(error)).splitlines()[0][:200]}") from None


def _cards(files: Mapping[str, Path]) -> dict[str, Any]:
    """What the cards say together; a folder may hold other files of these names, which say nothing of weights."""
    cards = [_json(file) for file in files.values() if file.exists()]
    known = ("architecture", "architectures", "model_type", "pretrained_cfg", "image_mean", "image_processor_type",
             "feature_extractor_type")
    return {key: value for card in cards if any(name in card for name in known) for key, value in card.items()}


def _json(file: Path) -> dict[str, Any]:
    with reading(str(file)):
        with open_regular(file) as content:
            return parse_json(content.read(), str(file), "it")
