"""The verb that trains one recipe at many batches, by several methods, with several seeds, and compares."""
