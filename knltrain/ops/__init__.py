"""Fused operations, one file each: the plain torch implementation and what stands in for it where it is faster."""
