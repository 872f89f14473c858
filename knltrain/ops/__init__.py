"""Fused operations, one module each: in plain torch, and by a native kernel where there is a faster one."""
