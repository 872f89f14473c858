"""Which process group a run takes: oneCCL where it is there, gloo otherwise, and never without a word."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from knltrain.comm import ccl, oneccl
from knltrain.errors import ConfigError
from knltrain.launch.world import Ranks


@dataclass(frozen=True)
class Chosen:
    """A back end that is ready to be named to ``torch.distributed``.

    Attributes:
        name: ccl or gloo.
        version: of the library behind it.
        transport: what it sends over.
        settings: environment variables that it was told, and that the user had set.
        note: what a user should know of the choice; empty where there is nothing.
    """

    name: str
    version: str
    transport: str
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    note: str = ""


def gloo(note: str = "") -> Chosen:
    """The back end that is always there."""
    return Chosen("gloo", f"torch {torch.__version__}", "tcp", note=note)


def choose_backend(asked: str, ranks: Ranks, cpus: Sequence[int] = (), told: Mapping[str, str] | None = None) -> Chosen:
    """Returns the back end to use, made known to ``torch.distributed``.

    Args:
        asked: auto, ccl or gloo.
        ranks: this process among its peers.
        cpus: logical CPUs that are kept for its communication.
        told: variables that knltrain has set already, which are no wish of the user's.

    Raises:
        ConfigError: ccl was asked for and cannot be had; the message says what to do.
    """
    if asked == "gloo":
        return gloo()
    notes = []
    if importlib.util.find_spec("oneccl_bindings_for_pytorch"):
        try:
            return _torch_ccl()
        except (ImportError, OSError, RuntimeError) as error:  # made for another torch, or without its oneCCL
            notes.append(f"oneccl_bindings_for_pytorch does not load and is left out: {str(error).splitlines()[0]}")
    try:
        settings = oneccl.configure(ranks, cpus, told=told)
        shim = oneccl.load()
    except oneccl.UnavailableError as error:
        if asked == "ccl":
            raise ConfigError(f"comm.backend ccl: {error}") from None
        return gloo("; ".join([f"gradients travel over gloo, which is slower than ccl: {error}", *notes]))
    ccl.register()
    if settings.kept:
        notes.append(f"oneCCL obeys what was exported: {', '.join('='.join(item) for item in settings.kept.items())}")
    return Chosen(
        "ccl",
        f"oneCCL {shim.version()}",
        settings.transport,
        {"set": settings.set, "kept": settings.kept},
        "; ".join(notes),
    )


def _torch_ccl() -> Chosen:
    """Intel's own binding of oneCCL, by users who have it built."""
    importlib.import_module("oneccl_bindings_for_pytorch")
    version = "of unknown version"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("oneccl_bindings_for_pytorch")
    note = f"oneccl_bindings_for_pytorch {version} is installed: its ccl is used, not knltrain's"
    return Chosen("ccl", f"oneccl_bindings_for_pytorch {version}", "its own choice", note=note)
