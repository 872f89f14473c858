"""Layouts of a node, ranks and threads, that ``knltrain tune`` measures."""

from __future__ import annotations

from dataclasses import dataclass

from knltrain.node.affinity import plan_node
from knltrain.node.topology import Node

# Smaller micro-batches do not keep the cores busy.
_MIN_IMAGES = 8


@dataclass(frozen=True)
class Layout:
    """A way to divide a node.

    Attributes:
        ranks_per_node: number of ranks.
        threads: compute threads of a rank.
        comm_cores: cores that a rank reserves for the communication library.
        local_batch: images of a rank's micro-batch; gradients of the rest of its batch are accumulated.
    """

    ranks_per_node: int
    threads: int
    comm_cores: int
    local_batch: int


def layouts(node: Node, batch: int) -> list[Layout]:
    """Returns the layouts to measure, the rule's own first.

    One rank, one or two per NUMA domain; with the rule's cores for communication and with none; with a rank's whole
    batch as one micro-batch, or as two of 8 or more images. Numbers of ranks that do not divide the batch, or exceed
    the cores, are skipped.

    Args:
        node: the part of the node that the ranks share.
        batch: images of a step over all ranks.
    """
    domains = len(node.domains)
    counts = [count for count in dict.fromkeys((domains, 1, 2 * domains))
              if count <= len(node.cores) and batch % count == 0]  # fmt: skip
    found: list[Layout] = []
    for part in (1, 2):
        for count in counts:
            local = batch // count // part
            if batch // count % part or (part > 1 and local < _MIN_IMAGES):
                continue
            by_rule = plan_node(node, count, environ={})
            comm = len(by_rule.ranks[0].comm)
            threads = min(rank.threads for rank in by_rule.ranks)
            found.append(Layout(count, threads, comm, local))
            if comm:
                found.append(Layout(count, threads + comm, 0, local))
    return found
