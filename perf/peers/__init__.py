"""The contestants of perf/vs_peers.py: their steps, the process that each runs in, and what is made of their times."""
