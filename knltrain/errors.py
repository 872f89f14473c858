"""Errors for users: one line that says what is wrong, where, and what to do."""

# Exit statuses of commands. STOPPED: a signal came, and the same command goes on from there.
FAILED, BAD_USAGE, STOPPED, INTERRUPTED = 1, 2, 75, 130
# Names in archives may have any length.
_MAX_CHARS = 2000


def one_line(text: str) -> str:
    """Escapes line breaks and terminal control sequences, which file names may contain, and shortens long texts."""
    if len(text) > _MAX_CHARS:
        text = f"{text[: _MAX_CHARS // 2]} ... {text[-_MAX_CHARS // 4 :]}"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class KnltrainError(Exception):
    """An error that ends the run. The command line prints only the message and exits with 1.

    Args:
        message: the message, which :func:`one_line` converts to one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(KnltrainError):
    """An invalid or impossible request. The command line prints only the message and exits with 2."""


class DataError(KnltrainError):
    """A data set that cannot be used; the message names the file or folder."""


class SharedError(KnltrainError):
    """An error that all ranks raise at the same step for the same reason, so that they end together."""
