"""Errors that are for people: one line that says what is wrong, where, and what to do."""

# Of a line, characters: names within archives may be as long as their author likes.
_LONGEST = 2000


def one_line(text: str) -> str:
    """Escapes what would break a line, or drive the terminal that shows it: names of files hold whatever they like."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class KnltrainError(Exception):
    """The run cannot go on. The command line prints the message alone and exits with 1.

    Args:
        message: made one line whatever names it holds.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(KnltrainError):
    """What was asked for is not possible. The command line prints the message alone and exits with 2."""


class SharedError(KnltrainError):
    """The run cannot go on, and all ranks raise this at the same step for the same reason: they end together."""
