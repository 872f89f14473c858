"""Launchers, rank discovery, rendezvous and CPU binding. Imports no torch."""
