"""Calls into transformers: what it says is switched off, what it raises over a damaged folder becomes one sentence."""

from __future__ import annotations

import logging
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as hf

from nsvd.stored.folder import CONFIG, CheckpointError, each_field

Loaded = tuple[PreTrainedModel, dict[str, Any]]  # what ``from_pretrained`` returns with ``output_loading_info=True``


@contextmanager
def quiet() -> Iterator[None]:
    """Loading report, progress bar, log and warnings of the libraries off; what matters is raised."""
    verbosity, bar = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.CRITICAL)  # a hub that cannot be reached is told of once, by what is raised
    hf.set_verbosity(logging.CRITICAL)
    hf.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf.set_verbosity(verbosity)
        hub.setLevel(level)
        if bar:
            hf.enable_progress_bar()


@contextmanager
def reading(folder: Path, what: str = "model", config: dict | None = None) -> Iterator[None]:
    """One ``CheckpointError`` with the folder and the reason, whatever the libraries raise within over what lies there.

    Only calls into the libraries belong in the block. An error that comes from code of ours which they call back is a fault
    of the program, and passes as it is; so do those of memory. Where a name is not known, ``config`` tells which field gives it.
    """
    try:
        with quiet():
            yield
    except CheckpointError as error:
        if str(error).startswith(str(folder)):
            raise
        raise CheckpointError(f"{folder}: {error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
        called = list(dropwhile(_ours, frames))  # from the call into a library on
        if not called or any(map(_ours, called)):
            raise
        fields = [
            path for path, _, value in each_field(config) if isinstance(error, KeyError) and value in error.args[:1]
        ]
        if fields:
            raise CheckpointError(f"{folder / CONFIG}: {fields[0]} is {error}, which is not known") from error
        reason = textwrap.shorten(str(error), 240, placeholder=" …") or type(error).__name__
        raise CheckpointError(f"{folder}: the {what} cannot be read ({type(error).__name__}: {reason})") from error


def _ours(module: str) -> bool:
    return module.partition(".")[0] == "nsvd"
