"""The machine: processors, cores, memory, ranks. Imports no torch, so that it can set what torch will see."""
