"""`knltrain sweep`: one recipe at many batches, with several optimizers, learning rates and seeds."""
