"""How long a run will take on a cluster that one does not have yet: layers, machine, timeline, advice."""
