"""TensorBoard's event files, written with tensorboardX, and where in TensorBoard a metric is to be found."""
from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Mapping
from typing import Any

from cb_vit.config import ConfigError

# The group, TensorBoard's fold of charts, for names that do not begin with one as `val/prec@1` does; the first wins.
GROUPS = (
    ("speed", r"img/sec(/core)?|data_wait|mfu|uptime|core_hours"),
    ("memory", r"\w+_gib"),
    ("train", r"training_loss|lr(/\w+)?|l2_\w+|epoch|examples_\w+"),
)


def tag(name: str) -> str:
    """The name under which TensorBoard shows a metric: "training_loss" → "train/training_loss"."""
    group = next((group for group, names in GROUPS if re.fullmatch(names, name)), None)
    return f"{group}/{name}" if group else name


def open_writer(folder: os.PathLike, resume_step: int | None) -> Any:
    """A writer of events in `folder`.

    Args:
        folder: where the files lie, local or in a bucket.
        resume_step: step the run goes on from, after which nothing of earlier files is shown; None: it begins anew.

    Raises:
        ConfigError: what a bucket needs is not installed.
    """
    # Not FileWriter: its thread dies of a full disk unheard, and then nobody empties the queue that it reads.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    first = 0 if resume_step is None else resume_step + 1
    try:  # the suffix because names differ by the second only, and a restart within it would overwrite
        folder.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(os.fspath(folder / "events"), filename_suffix=f".{first:09d}")
    except ImportError as error:  # its own client for buckets is missing
        raise ConfigError("config.tensorboard", f"cannot write to {folder}: {error}") from None
    # TensorBoard hides what earlier event files hold from this step on.
    now = time.time()
    writer.write_event(Event(wall_time=now, step=first, file_version="brain.Event:2"))
    writer.write_event(Event(wall_time=now, step=first, session_log=SessionLog(status=SessionLog.START)))
    return writer


def write_scalars(writer: Any, step: int, scalars: Mapping[str, float]) -> None:
    """Write metrics under their tags."""
    # Not SummaryWriter.add_scalar, which would file "val/prec@1" as "val/prec_1".
    _write(writer, step, [dict(tag=tag(name), simple_value=value) for name, value in scalars.items()])


def write_image(writer: Any, step: int, name: str, png: bytes) -> None:
    """Write a picture, the bytes of a PNG, under `name`."""
    from tensorboardX.proto.summary_pb2 import Summary
    width, height = struct.unpack(">II", png[16:24])  # of the header, which is a PNG's first chunk
    image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
    _write(writer, step, [dict(tag=name, image=image)])


def _write(writer: Any, step: int, values: list[dict[str, Any]]) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    summary = Summary(value=[Summary.Value(**value) for value in values])
    writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
