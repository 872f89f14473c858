"""The run: set up, stepped, evaluated, saved, and gone on with."""
