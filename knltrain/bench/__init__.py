"""How fast a training step is on this node: alone, engine beside engine, layer by layer, over batches and threads."""

from knltrain.bench.step import bench

__all__ = ["bench"]
