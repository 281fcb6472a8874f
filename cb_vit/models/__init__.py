"""Models by name: `config.model_name` picks a module, `config.model` holds its `Config`."""
from __future__ import annotations

import importlib
from types import ModuleType

from cb_vit.registry import Registry

MODELS = Registry("model", {"vit": "cb_vit.models.vit"})


def get(name: str, path: str = "config.model_name") -> ModuleType:
    """The module of a model: it offers `Config`, `Model`, `resolve`, `check_image_size`, `patch_grid` and `merge`.

    Args:
        name: one of the names in `MODELS`.
        path: where the name stands in the config, for errors.

    Raises:
        ConfigError: at `path`, when there is no such model.
    """
    return importlib.import_module(MODELS.pick(name, path))
