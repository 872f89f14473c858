"""How a node can be divided into ranks: the few ways that are worth measuring."""

from __future__ import annotations

from dataclasses import dataclass

from knltrain.node.affinity import plan_node
from knltrain.node.topology import Node

# Fewer images at once keep no core busy.
_FEWEST_IMAGES = 8


@dataclass(frozen=True)
class Layout:
    """A way to divide a node.

    Attributes:
        ranks_per_node: equal ranks.
        threads: compute threads of each.
        comm_cores: cores that each keeps for the communication library.
        local_batch: images that each passes through the model at once; the rest of its share is accumulated.
    """

    ranks_per_node: int
    threads: int
    comm_cores: int
    local_batch: int


def layouts(node: Node, batch: int) -> list[Layout]:
    """Returns the layouts to measure, the rule's own first.

    One rank, one or two per NUMA domain; with the rule's cores for communication and with none; with all images of a
    rank at once and with half of them, where these are 8 or more. Ranks that do not divide the batch, or would share
    cores, are left out.

    Args:
        node: what the ranks have together.
        batch: images of a step over all ranks.
    """
    domains = len(node.domains)
    counts = [count for count in dict.fromkeys((domains, 1, 2 * domains))
              if count <= len(node.cores) and batch % count == 0]  # fmt: skip
    found: list[Layout] = []
    for part in (1, 2):
        for count in counts:
            local = batch // count // part
            if batch // count % part or (part > 1 and local < _FEWEST_IMAGES):
                continue
            by_rule = plan_node(node, count, environ={})
            comm = len(by_rule.ranks[0].comm)
            threads = min(rank.threads for rank in by_rule.ranks)
            found.append(Layout(count, threads, comm, local))
            if comm:
                found.append(Layout(count, threads + comm, 0, local))
    return found
