"""Data that may lie here or there: the first of several blocks of which there is anything."""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Annotated, Any

from cb_vit.config import ConfigError, Read, parse
from cb_vit.datasets.contents import Absent
from cb_vit.datasets.core import Source, SourceConfig, check_source
from cb_vit.datasets.core import open_source as open_block

logger = logging.getLogger(__name__)
ALL = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstOfConfig(SourceConfig):
    """One of several places: "first_of". Each block says its own split.

    Attributes:
        blocks: blocks of data, as each could stand here alone; the first that is there is taken.
    """

    blocks: tuple[Annotated[SourceConfig, Read(Any, check_source)], ...]
    split: str = ALL

    def __post_init__(self):
        super().__post_init__()
        if not self.blocks:
            raise ConfigError("blocks", "is empty; give blocks of data, the first that is there is taken")
        if self.split != ALL or self.labels != "name":
            raise ConfigError("split", "and labels are said by each of the blocks; leave them out here")


def check(block: Mapping[str, Any], path: str) -> FirstOfConfig:
    """The block as a checked `FirstOfConfig`."""
    return parse(FirstOfConfig, block, path)


def open_source(config: FirstOfConfig, path: str) -> Source:
    """Open the first block of which there is anything.

    Args:
        config: the checked block.
        path: where the block stands, for errors.

    Raises:
        Absent: there is nothing of any block; says what was looked for.
        ConfigError, DataError: as for the block that is there.
    """
    looked = []
    for number, block in enumerate(config.blocks):
        try:
            source = open_block(block, f"{path}.blocks[{number}]")
        except Absent as error:
            looked.append(error.message)
            continue
        where = getattr(block, "root", None) or f"{block.name} of TFDS"
        logger.info("%s: taken from %s", path, where)
        return source
    raise Absent(path, "nothing is there: " + ", and ".join(message.partition("; ")[0] for message in looked))
