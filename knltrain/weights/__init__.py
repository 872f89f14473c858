"""Weights in and out: initial ones, those of other programs, and what is exported."""
