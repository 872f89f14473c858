"""knltrain: large-batch ImageNet training on clusters of many-core CPUs.

Importing this package imports nothing else: the command line answers before torch is loaded, and sets the
environment that torch will see.
"""

__version__ = "0.1.0"
