"""Choice of the process group: oneCCL where it is installed, otherwise gloo, with a note that says why."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from knltrain.comm import ccl, oneccl
from knltrain.comm.segments import small_shared_memory
from knltrain.comm.trial import try_oneccl
from knltrain.errors import ConfigError
from knltrain.launch.world import Ranks


@dataclass(frozen=True)
class Backend:
    """A back end that ``init_process_group`` accepts by name.

    Attributes:
        name: ccl or gloo.
        version: of the library behind it.
        transport: the network layer below it.
        settings: its environment variables, under ``set`` by knltrain and ``kept`` from the user.
        note: for the user, why this back end; empty if there is nothing to say.
    """

    name: str
    version: str
    transport: str
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    note: str = ""


def gloo(note: str = "") -> Backend:
    """Returns the back end that every torch has."""
    return Backend("gloo", f"torch {torch.__version__}", "tcp", note=note)


def choose_backend(
    requested: str, ranks: Ranks, cpus: Sequence[int] = (), already_set: Mapping[str, str] | None = None
) -> Backend:
    """Chooses the back end and registers it with ``torch.distributed``.

    Args:
        requested: auto, ccl or gloo.
        ranks: this process among its peers.
        cpus: logical CPUs reserved for its communication.
        already_set: variables that knltrain, not the user, has set.

    Raises:
        ConfigError: ccl was requested and is not available; the message says what to do.
    """
    if requested == "gloo":
        return gloo()
    notes = []
    if importlib.util.find_spec("oneccl_bindings_for_pytorch"):
        try:
            return _intel_binding()
        except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or without its oneCCL
            notes.append(f"oneccl_bindings_for_pytorch does not load and is ignored: {str(error).splitlines()[0]}")
    try:
        settings = oneccl.configure(ranks, cpus, already_set=already_set)
        shim = oneccl.load()
        note = small_shared_memory(ranks.local_size)
        if ranks.local_rank == 0:  # for all ranks of its node
            try_oneccl(settings)
    except oneccl.UnavailableError as error:
        if requested == "ccl":
            raise ConfigError(f"comm.backend ccl: {error}") from None
        return gloo("; ".join([f"gradients are all-reduced over gloo, which is slower than ccl: {error}", *notes]))
    ccl.register()
    notes += [note] if note else []
    if settings.kept:
        notes.append(f"oneCCL uses exported variables: {', '.join('='.join(item) for item in settings.kept.items())}")
    return Backend(
        "ccl",
        f"oneCCL {shim.version()}",
        settings.transport,
        {"set": settings.set, "kept": settings.kept},
        "; ".join(notes),
    )


def _intel_binding() -> Backend:
    """Uses Intel's own oneCCL binding, where the user has built it."""
    importlib.import_module("oneccl_bindings_for_pytorch")
    version = "of unknown version"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("oneccl_bindings_for_pytorch")
    note = f"oneccl_bindings_for_pytorch {version} is installed: its ccl is used, not knltrain's"
    return Backend("ccl", f"oneccl_bindings_for_pytorch {version}", "its own choice", note=note)
