"""How many threads each rank computes with."""

from __future__ import annotations

import os
from collections.abc import Mapping

from knltrain.errors import ConfigError
from knltrain.node.topology import Node


def threads_per_rank(node: Node, local_size: int, environ: Mapping[str, str] | None = None) -> int:
    """Returns the number of compute threads of one rank: one per physical core that is the rank's own.

    ``OMP_NUM_THREADS`` is obeyed, except the 1 that torchrun sets for whoever did not: that default makes CPU
    training silently slow. A rank whose launcher left it the whole machine takes its share of the cores.

    Args:
        node: what this process may use.
        local_size: ranks on this node.
        environ: the environment, by default this process's.

    Raises:
        ConfigError: ``OMP_NUM_THREADS`` is no positive number.
    """
    environ = os.environ if environ is None else environ
    asked = environ.get("OMP_NUM_THREADS", "")
    by_torchrun = "TORCHELASTIC_RUN_ID" in environ and asked == "1"
    if asked and not by_torchrun:
        # OpenMP allows one number per nesting level; the first is ours.
        first = asked.split(",")[0].strip()
        if not first.isdigit() or int(first) < 1:
            raise ConfigError(f"OMP_NUM_THREADS={asked} is no positive number; unset it or give one")
        return int(first)
    pinned = len(node.cpus) * local_size <= node.online
    return max(1, len(node.cores) if pinned else len(node.cores) // local_size)
