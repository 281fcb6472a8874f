"""Weights & Biases: where a run is filed, and whether it can be."""
from __future__ import annotations

import dataclasses
import os
import re
import uuid
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Literal

from cb_vit import io
from cb_vit.config import ConfigError


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Where Weights & Biases files the run: the arguments of `wandb.init` of the same names.

    Attributes:
        project: name of the project.
        name: name of the run; None: Weights & Biases makes one up.
        entity: user or team that the run belongs to; None: the account's own.
        group: name of a group of runs; None: no group.
        tags: words to find the run by.
        mode: "online", "offline" (to be sent later with `wandb sync`), or "disabled".
    """

    project: str
    name: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline", "disabled"] = "online"


def check_login(cfg: WandbConfig | None) -> None:
    """Refuse to file a run with Weights & Biases where nobody has logged in; at a terminal it asks.

    Raises:
        ConfigError: at "config.wandb": no API key is known, or Weights & Biases refuses it.
    """
    if cfg is None or cfg.mode != "online":
        return
    import wandb
    try:
        known = wandb.login(verify=False)
    except Exception as error:  # of wandb's own kinds
        raise _no_wandb(error) from None
    if not known:
        raise _no_wandb("no API key is known")


def open_run(workdir: Any, cfg: WandbConfig, resume_step: int | None, run_config: Mapping[str, Any]) -> Any:
    """The run at Weights & Biases; one that is resumed goes on there as well.

    Args:
        workdir: the run's folder here, which keeps the name of the one there.
        cfg: where it is filed.
        resume_step: step the run goes on from; None: it begins anew.
        run_config: the run's settings, shown there.

    Raises:
        ConfigError: it cannot be opened, or the name that the folder keeps is none.
        CannotWrite: the name cannot be kept.
    """
    import wandb
    # Kept, so that a resumed run goes on with the same curves rather than beginning others.
    id_file = workdir / "wandb_run.txt"
    known = None if resume_step is None else io.read(id_file)
    if known is None:
        known = uuid.uuid4().hex[:8].encode() + b"\n"
        with io.writing(id_file):
            io.write_atomic(id_file, known)
    if not re.fullmatch(rb"[\w-]+\s*", known):
        raise ConfigError("workdir", f"{id_file} holds no name of a Weights & Biases run ({known!r:.40}); move it away")
    try:
        return wandb.init(**dataclasses.asdict(cfg), id=known.decode().strip(), resume="allow",
                          config=dict(run_config), dir=os.fspath(workdir) if io.is_local(workdir) else None)
    except Exception as error:  # of wandb's own kinds: no network, no such entity, …
        raise _no_wandb(error) from None


def as_image(png: bytes) -> Any:
    """A picture, the bytes of a PNG, as a run takes it."""
    import wandb
    from PIL import Image
    return wandb.Image(Image.open(BytesIO(png)))


def _no_wandb(reason: Any) -> ConfigError:
    return ConfigError("config.wandb", f"{str(reason).splitlines()[0]}; run `wandb login`, or set "
                                        "config.wandb.mode='offline' and `wandb sync` later")
