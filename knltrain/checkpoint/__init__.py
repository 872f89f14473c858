"""Checkpoints: their files, integrity checks, and asynchronous writing."""

from knltrain.checkpoint.store import (
    Progress,
    Snapshot,
    find,
    folder_of,
    list_checkpoints,
    load_optimizer,
    load_weights,
    newest,
    progress_of,
    read_state,
    remove_leftovers,
    restore,
    restore_average,
    started_from,
    verify,
    write,
)
from knltrain.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointWriter",
    "Progress",
    "Snapshot",
    "find",
    "folder_of",
    "list_checkpoints",
    "load_optimizer",
    "load_weights",
    "newest",
    "progress_of",
    "read_state",
    "remove_leftovers",
    "restore",
    "restore_average",
    "started_from",
    "verify",
    "write",
]
