"""Performance model of a run on a cluster: layers, system, all-reduce, timeline of a step, advice."""
