"""Topology of the node and placement of ranks on it. Imports no torch, which reads affinity and variables once."""
