"""Errors are one line, whatever names they speak of."""

import click
import pytest
from click.testing import CliRunner

from knltrain.cli.options import reports_errors
from knltrain.errors import KnltrainError, one_line


@pytest.mark.parametrize(
    "name, shown",
    [
        ("plain é ×", "plain é ×"),
        ("a\nb\r\x1b[2J", r"a\nb\r\x1b[2J"),
        ("caf\udce9", r"caf\udce9"),
        ("\u202egpj", r"\u202egpj"),
    ],
)
def test_names_are_escaped(name, shown):
    assert one_line(name) == str(KnltrainError(name)) == shown
    one_line(name).encode()


def test_long_names_leave_room_for_the_remedy():
    text = str(KnltrainError(f"{'x' * 10**6}: damaged; copy it again"))
    assert len(text) < 2000
    assert text.endswith("x: damaged; copy it again")


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError("Unable to allocate 2 TiB for an array"), "not enough memory (Unable to allocate 2 TiB"),
        (MemoryError(), "not enough memory (no memory left); use a smaller local-batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: you tried to allocate 99 bytes. Error code 12"),
         "not enough memory (you tried to allocate 99 bytes)"),
        (OSError(2, "No such file or directory", "a\nb"), r"knltrain: a\nb: No such file"),
        (OSError(2, "No such file or directory", b"a\xff"), r"knltrain: a\udcff: No such file"),
        (OSError(28, "No space left on device", "/tmp/x"), "knltrain: /tmp/x: No space left on device ("),
        (OSError(28, "No space left on device", "/tmp/x"), "MiB free); free space, or give a place elsewhere"),
        (OSError(28, "No space left on device"), "standard output, or another file being written: No space left"),
        (OSError(13, "Permission denied", "x"), "knltrain: x: Permission denied; give this user access to it"),
        (OSError(116, "Stale file handle", "x"), "give the same command"),
    ],
)  # fmt: skip
def test_what_is_no_error_of_ours_is_one_line_too(error, words):
    @reports_errors
    def command():
        raise error

    result = CliRunner().invoke(click.command()(command))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert words in result.stderr


def test_errors_of_the_program_itself_keep_their_traceback():
    @reports_errors
    def command():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        command()
