"""What people read in a terminal of 80 and of 120 columns, and in a pipe: nothing is cut."""

import fcntl
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios

import pytest
from click.testing import CliRunner
from rich.console import Console as RichConsole

from knltrain.cli.main import main
from knltrain.doctor.finding import Finding
from knltrain.runlog.console import Console, StepProgress
from knltrain.runlog.tables import fit, new_table, print_table

PREDICT = ("predict", "--recipe", "alexnet-bn-32k", "--nodes", "512")
COMMANDS = {
    "recipes": ("recipes",),
    "predict": (*PREDICT, "--system", "knl7250-opa"),
    "validate": ("predict", "validate"),
    "accounting": ("predict", "accounting", *PREDICT[1:]),
    "phases": ("predict", "accounting", "--recipe", "resnet50-ffcv-16", "--nodes", "8"),
}
COLOUR = re.compile(r"\x1b\[[\d;]*\b(3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")
STYLE = re.compile(r"\x1b\[[\d;]*m")


def in_terminal(columns, *arguments, **environment):
    """What a command writes to a terminal so many columns wide."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen([sys.executable, "-m", "knltrain", *arguments], stdin=theirs, stdout=theirs,
                               stderr=theirs, env={**kept, "TERM": "xterm-256color", **environment})  # fmt: skip
    os.close(theirs)
    written = b""
    while True:
        try:
            written += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0, written
    return written.decode()


def piped(*arguments):
    return CliRunner().invoke(main, arguments).stdout


def words_with_digits(text):
    return set(re.findall(r"\S*\d\S*", text))


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_shows_whole_words_and_numbers(command, columns):
    text = STYLE.sub("", in_terminal(columns, *COMMANDS[command]))
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    text = re.sub(r"too wide for \d+ columns: .*", "", text)
    assert words_with_digits(text) <= words_with_digits(piped(*COMMANDS[command]))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_gets_all_columns(command):
    text = piped(*COMMANDS[command])
    assert "…" not in text
    assert "too wide" not in text


def test_a_pipe_gets_a_line_a_recipe():
    lines = piped("recipes").splitlines()
    for row in json.loads(piped("recipes", "--json")):
        (line,) = [line for line in lines if line.startswith(f" {row['recipe']} ")]
        for field in ("model", "optimizer", "augmentation", "published", "measured"):
            assert row[field] in line


def test_columns_that_do_not_fit_are_named():
    text = STYLE.sub("", in_terminal(80, *COMMANDS["predict"]))
    assert "too wide for 80 columns: node-hours, USD, kWh" in text
    assert "too wide" not in in_terminal(120, *COMMANDS["predict"])


def test_the_progress_of_half_a_million_steps_fits_80_columns():
    console, now = Console(), 0.0
    console.rich = RichConsole(file=io.StringIO(), force_terminal=True, width=80, get_time=lambda: now)
    with StepProgress(console, first=100_000, total=450_410, epochs=90) as bar:
        for step in range(100_001, 100_004):
            now += 0.3
            bar.step({"step": step, "epoch": 20.1, "loss": 6.912, "images_per_s": 587.0, "data_s": 0.03, "step_s": 0.3})
        bar._bar.refresh()
    text = STYLE.sub("", console.rich.file.getvalue())
    assert "…" not in text
    assert "loss nan" not in text
    assert re.search(r"step 100003/450410 loss 6.912  587 img/s  data 10% \d\d:\d\d:\d\d", text)


def table():
    made = new_table("title", names=("name",), numbers=("images a rank", "step, ms"))
    made.add_row("a name of several words", "1,234,567", "8.9", end_section=True)
    made.add_row("b", "2", "")
    return made


@pytest.mark.parametrize("width, headers", [(100, 3), (52, 3), (51, 3), (36, 3), (35, 2), (20, 1)])
def test_headers_and_text_wrap_before_columns_go(width, headers):
    fitted = fit(table(), width)
    assert len(fitted.columns) == headers
    assert [row.end_section for row in fitted.rows] == [True, False]
    stream = io.StringIO()
    RichConsole(file=stream, width=width).print(fitted)
    assert ("1,234,567" in stream.getvalue()) == (headers > 1)
    assert max(map(len, stream.getvalue().splitlines())) <= width


def test_a_table_that_fits_stays_as_it_is():
    made = table()
    assert fit(made, 52) is made
    assert fit(made, 51) is not made


def test_a_pipe_has_no_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    wide = new_table("", names=("name",), numbers=())
    wide.add_row("x" * 300)
    print_table(Console(), wide)
    assert "x" * 300 in capsys.readouterr().out


@pytest.mark.parametrize("environment, coloured", [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_respected(environment, coloured, monkeypatch):
    finding = Finding("disk", "warning", "full", "slow", "delete")
    monkeypatch.setattr("knltrain.doctor.examine", lambda data: [finding])
    monkeypatch.delenv("NO_COLOR", raising=False)
    told = CliRunner(env=environment).invoke(main, ["doctor"], color=True).stdout
    assert bool(COLOUR.search(told)) == coloured
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    console = Console()
    console.rich.file = stream
    console.warn("look")
    assert bool(COLOUR.search(stream.getvalue())) == coloured
