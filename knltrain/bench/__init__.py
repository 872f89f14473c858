"""Benchmarks of a training step on this node: single, by engine, by layer, over batches and threads."""

from knltrain.bench.step import bench

__all__ = ["bench"]
