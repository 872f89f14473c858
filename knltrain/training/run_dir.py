"""A run's folder: only one run at a time writes there, and only with the configuration that it had."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from knltrain import config as configuration
from knltrain.config import RunConfig
from knltrain.errors import ConfigError, KnltrainError
from knltrain.files import naming, open_regular, resolved, says_absent
from knltrain.runlog.console import Console

# What may differ between the parts of one run: where and how it runs, and how long, not what it computes. Where data
# and lists of classes lie may: what they are is compared with the checkpoint.
_MAY_CHANGE = {
    "data", "classes", "class_order", "stage", "out", "resume", "workers", "max_steps", "checkpoint.every",
    "checkpoint.keep", "engine",
    "log_trust_ratios", "force_bf16", "comm.backend", "comm.timeout_s", "comm.start_timeout_s", "health.policy",
    "health.max_skips", "health.max_rewinds", "health.rewind_factor", "health.divergence_steps", "health.compare_every",
}  # fmt: skip
_LEFT_BY_RUNS = ("config.json", "metrics.jsonl", "checkpoints")
# A run that was killed a moment ago may have ranks that have not ended yet.
_LOCK_TIMEOUT_S = 10.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def lock_run_dir(out: Path, console: Console, *, timeout_s: float | None = None) -> Iterator[None]:
    """Makes a run's folder, and keeps other runs out of it as long as this process lives.

    The lock is the kernel's (fcntl, which NFS has too): a process that is killed holds it no longer. After the death of
    a node, an NFS server keeps it until the node's lease ends, usually 90 s. Folders that are made here and stay empty
    are removed.

    Args:
        out: the folder.
        console: told who has it, where somebody has to be waited for.
        timeout_s: how long to wait, in seconds; default as long as the ranks of a run that was killed may take to end.

    Raises:
        KnltrainError: another run has it; names the host and the process.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    path = out / ".lock"
    descriptor = _locked(path, console, _LOCK_TIMEOUT_S if timeout_s is None else timeout_s)
    try:
        with contextlib.suppress(OSError):  # a full disk; it is only for people
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{socket.gethostname()}, process {os.getpid()}".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            for folder in missing:
                folder.rmdir()
        os.close(descriptor)


def _locked(path: Path, console: Console, timeout_s: float) -> int:
    out = path.parent
    deadline = time.monotonic() + timeout_s
    told = False
    while True:
        out.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another run has just removed the folder, which was empty
            if time.monotonic() > deadline:
                raise
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ends removes the file: what was locked may be one that has no name any more.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except OSError as error:
            if error.errno in _NO_LOCKS:
                console.warn(f"{out}: {error.strerror}: a second run in this folder would not be noticed")
                return descriptor
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.ENOENT):
                os.close(descriptor)
                raise
            who = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise KnltrainError(f"{out} is in use by a run on {who}; end it, or give another --out") from None
            if not told and error.errno != errno.ENOENT:
                console.line(f"{out} is in use by a run on {who}: waiting up to {timeout_s:g} s for it to end")
                told = True
        os.close(descriptor)
        time.sleep(0.1)


def result_affecting_fields(config: RunConfig) -> dict[str, object]:
    """The fields that decide a run's result, by dotted name."""
    flat = configuration.flatten(configuration.as_dict(config))
    return {name: value for name, value in flat.items() if name not in _MAY_CHANGE}


def digest(config: RunConfig) -> str:
    """SHA-256 of the fields that decide a run's result."""
    return hashlib.sha256(json.dumps(result_affecting_fields(config), sort_keys=True).encode()).hexdigest()


def guard_out(config: RunConfig, out: Path, allowed: frozenset[str]) -> dict[str, Any]:
    """Refuses to write into a folder that holds another run.

    Args:
        config: of the run that is about to begin.
        out: its folder.
        allowed: fields that may differ from the run that the folder holds.

    Returns:
        OUT/config.json as it is, or nothing where there is none: then a checkpoint says what the run was.

    Raises:
        ConfigError: OUT has a run of another configuration, or one that would be started over.
        OSError: config.json cannot be read now.
    """
    path = out / "config.json"
    if config.resume == "never" and any((out / name).exists() for name in _LEFT_BY_RUNS):
        raise ConfigError(f"{out} holds a run already; give another --out, or delete the folder to start over")
    try:
        with naming(path), open_regular(path) as file:
            record: dict[str, Any] = json.loads(file.read())
        before = configuration.flatten(record["config"])
        record["changes"] = list(record.get("changes", []))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, OSError) and not says_absent(error):
            raise
        raise ConfigError(
            f"{path} is damaged; delete this file, and the run goes on with the configuration that its newest "
            "checkpoint has"
        ) from None
    _refuse(changes(before, config), allowed, f"{out} holds a run", "give another --out, or ")
    return record


def guard_checkpoint(config: RunConfig, folder: Path, state: Mapping[str, Any], allowed: frozenset[str]) -> None:
    """Refuses to go on from a checkpoint of another configuration.

    Raises:
        ConfigError: the fields that differ.
    """
    _refuse(changes(configuration.flatten(state["config"]), config), allowed, f"{folder} is a checkpoint", "")


def changes(before: Mapping[str, object], config: RunConfig) -> dict[str, tuple[object, object]]:
    """The deciding fields that are not as they were: by name, what they were and what they are.

    A field that there was not yet had its default's effect.
    """
    now = result_affecting_fields(config)
    then = result_affecting_fields(RunConfig()) | {
        name: value for name, value in before.items() if name not in _MAY_CHANGE
    }
    return {
        name: (then.get(name), now.get(name))
        for name in sorted(then.keys() | now.keys())
        if _comparable(name, then.get(name)) != _comparable(name, now.get(name))
    }


def _comparable(name: str, value: object) -> object:
    """Returns a field's value with one spelling for each path."""
    return resolved(value) if name == "init_from" and isinstance(value, str) and value else value


def _refuse(changed: Mapping[str, tuple[object, object]], allowed: frozenset[str], what: str, remedy: str) -> None:
    if refused := changed.keys() - allowed:
        differ = "; ".join(f"{name}: {was} -> {now}" for name, (was, now) in changed.items() if name in refused)
        raise ConfigError(
            f"{what} of another configuration ({differ}); {remedy}--allow-change {','.join(sorted(refused))}"
        )
