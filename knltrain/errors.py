"""Errors that are for people: one line that says what is wrong, where, and what to do."""


class KnltrainError(Exception):
    """The run cannot go on. The command line prints the message alone and exits with 1."""


class ConfigError(KnltrainError):
    """What was asked for is not possible. The command line prints the message alone and exits with 2."""
