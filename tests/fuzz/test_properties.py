"""Any value in any field, any word on a command line, any name of a file, any list of a launcher."""

import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings

from knltrain import config as configuration
from knltrain.cli.main import main
from knltrain.config import RunConfig
from knltrain.config.schedule import learning_rate, make_schedule
from knltrain.data.datasets import open_folder
from knltrain.errors import ConfigError, KnltrainError
from knltrain.launch.hosts import expand_counts, expand_hosts
from knltrain.launch.world import Ranks, discover
from knltrain.node.cpulist import parse_cpu_list

# The same examples every time; KNLTRAIN_FUZZ_EXAMPLES makes them more, and others.
EXAMPLES = int(os.environ.get("KNLTRAIN_FUZZ_EXAMPLES", "0"))


def examples(count):
    return settings(
        max_examples=EXAMPLES or count, derandomize=not EXAMPLES, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**18, 10**400, 1e300, 1e-300, 5e-324])
)
TEXTS = st.one_of(
    st.text(), NUMBERS.map(lambda n: repr(n) if isinstance(n, float) or abs(n) < 10**300 else "9" * 5000),
    st.sampled_from(["null", "true", "nan", "inf", "-inf", "", " ", "1,2", "../..", "/", "\0", "\udcff", "auto"]),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.binary(max_size=9), st.datetimes()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5,
)  # fmt: skip
FIELDS = st.sampled_from([field.name for field in configuration.fields()])


def assert_for_people(error):
    line = str(error)
    assert line
    assert line.isprintable()
    assert len(line) < 3000


@given(st.dictionaries(st.one_of(FIELDS, FIELDS, FIELDS, st.text()), VALUES, max_size=3))
@examples(400)
def test_a_configuration_or_one_line(values):
    try:
        config = configuration.override(RunConfig(), values)
    except ConfigError as error:
        assert_for_people(error)
        return
    assert configuration.override(RunConfig(), configuration.flatten(configuration.as_dict(config))) == config


@given(st.data())
@examples(150)
def test_whatever_is_within_bounds_can_be_computed_with(data):
    """The ends of every range, together: no learning rate overflows."""
    values = {}
    for field in configuration.fields():
        if field.name.startswith(("schedule.", "optim.lr", "global_batch", "epochs")):
            with pytest.raises(ConfigError) as raised:
                configuration.override(RunConfig(), {field.name: object()})
            ends = re.findall(r"[<>]=? ([\d.,e+-]+\d)", str(raised.value))
            if len(ends) == 2 and "values with commas" not in str(raised.value):
                values[field.name] = data.draw(st.sampled_from([end.replace(",", "") for end in ends]))
    values["schedule.name"] = data.draw(st.sampled_from(["poly", "poly-after-warmup", "step", "constant"]))
    values["schedule.milestones"] = data.draw(st.sampled_from([[1e-6] * 100, [1e6], []]))
    try:
        config = configuration.override(RunConfig(), values)
    except ConfigError:  # of an end that is not in its range
        return
    steps = data.draw(st.sampled_from([1, 10**6, 10**15]))
    for step in {0, steps // 2, steps - 1}:
        rate = learning_rate(config.schedule, peak=config.peak_lr, step=step, epoch=step / 1e-3, total_steps=steps,
                             steps_per_epoch=1e-3)  # fmt: skip
        assert 0 <= rate < float("inf")


@given(st.data())
@examples(300)
def test_any_course_of_a_run_is_a_stream_without_a_gap(data):
    lengths = [1e-6, 0.01, 0.5, 1.0, 1.25, 3.0, 1e6]
    epochs = data.draw(st.sampled_from(lengths))
    before_the_end = [length for length in lengths if length < epochs]

    def changes(values, lengths):
        ends = sorted(data.draw(st.sets(st.sampled_from(lengths), max_size=3))) if lengths else []
        return [data.draw(st.sampled_from(values)) for _ in ends], ends

    sizes, batches = changes([8, 128, 224], [*before_the_end, epochs]), changes([1, 3, 1000, 10**7], before_the_end)
    collapse = data.draw(st.sampled_from([0.0, *before_the_end]))
    config = configuration.override(
        RunConfig(),
        {"epochs": epochs, "global_batch": data.draw(st.sampled_from([1, 7, 10**7])),
         "schedule.image_sizes": sizes[0], "schedule.image_size_epochs": sizes[1], "schedule.batches": batches[0],
         "schedule.batch_epochs": batches[1], "augment.collapse_epochs": collapse,
         "schedule.warmup_epochs": data.draw(st.sampled_from([0.0, 2.0])),
         "schedule.name": data.draw(st.sampled_from(["poly", "poly-after-warmup", "step", "constant"]))},
    )  # fmt: skip
    course = make_schedule(config, data.draw(st.sampled_from([1, 10, 50_000])))
    step = image = 0
    for phase in course.phases:
        assert (phase.first_step, phase.first_image) == (step, image)
        assert phase.last_step > step
        image += (phase.last_step - step) * phase.batch
        step = phase.last_step
        for one in (phase.first_step, phase.last_step - 1):
            assert course.phase(one) == phase
            assert 0 <= course.lr(config, one) <= config.peak_lr
    assert course.images(course.total_steps) == image


# What does not compute for long, and starts nothing.
VERBS = ["plan", "launch", "recipes", "train", "eval", "prepare", "data"]


@given(st.data())
@examples(100)
def test_any_words_on_the_command_line(data):
    verb = data.draw(st.sampled_from(VERBS))
    known = [option for option in main.commands[verb].params if option.param_type_name == "option"]
    words = []
    for option in data.draw(st.lists(st.sampled_from(known), max_size=4)):
        words.append(option.opts[0])
        if not option.is_flag:
            words.append(data.draw(TEXTS))
    words += data.draw(st.lists(TEXTS, max_size=2))
    with tempfile.TemporaryDirectory() as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            end = {"train": ["--data", "/nowhere", "--out", "run"], "launch": ["--dry-run", "--", "train"]}.get(
                verb, []
            )
            result = CliRunner().invoke(main, [verb, *words, *end])
            left = [path for path in Path(folder).rglob("*") if path.name != "run"]
        finally:
            os.chdir(before)
    assert isinstance(result.exception, (SystemExit, type(None))), repr(result.exception)
    assert result.exit_code in (0, 1, 2), result.output
    assert "Traceback" not in result.output
    assert result.exit_code == 0 or result.stderr.strip()
    assert not left


@pytest.mark.parametrize(
    "words",
    [
        [b"\xff\xfe"],
        [b"train", b"--recipe", b"quickstart", b"--out", b"\xff"],
        [b"train", b"--config", b"\xff\n"],
        [b"eval", b"\xff\x1b[2J", b"--data", b"x"],
        [b"data", b"\xff"],
        [b"prepare", b"\xff", b"\xfe"],
    ],
)
def test_words_that_are_no_text(words, tmp_path):
    result = subprocess.run([sys.executable, "-m", "knltrain", *words], capture_output=True, timeout=120, cwd=tmp_path)
    assert result.returncode in (1, 2)
    assert b"Traceback" not in result.stderr
    assert b"\x1b" not in result.stderr
    result.stderr.decode()
    assert not list(tmp_path.iterdir())


NAMES = st.binary(min_size=1, max_size=60).filter(lambda n: not set(n) & {0, ord("/")} and n not in (b".", b".."))


@given(st.lists(NAMES, min_size=1, max_size=3, unique=True), st.lists(NAMES, max_size=3, unique=True))
@examples(60)
def test_any_names_of_classes_and_files(classes, files):
    with tempfile.TemporaryDirectory() as folder:
        for name in classes:
            path = os.path.join(os.fsencode(folder), b"train", name)
            os.makedirs(path)
            for file in files:
                Path(os.fsdecode(os.path.join(path, file + b".jpg"))).write_bytes(file)
        with pytest.raises(KnltrainError) as raised:  # none of them is an image
            part = open_folder(Path(folder), "train")
            assert len(part.classes) == len(classes)
            part.check(3)
        assert_for_people(raised.value)


LAUNCHERS = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID",
             "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS",
             "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "FLUX_JOB_NNODES", "PMIX_RANK", "PALS_RANKID",
             "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "PBS_NODEFILE", "LSB_HOSTS", "LSB_MCPU_HOSTS", "PE_HOSTFILE",
             "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_NODEID", "MASTER_ADDR",
             "MASTER_PORT"]  # fmt: skip
LISTS = st.one_of(
    st.text("0123456789-,[]()x naé", max_size=30), st.integers(-1, 5).map(str), TEXTS,
    st.sampled_from(["n[0-999999][0-999999]", "1(x999999)," * 50, "n[" + "1," * 1000 + "2]", "9" * 5000, "2(x2)"]),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(LAUNCHERS), LISTS, max_size=8))
@examples(300)
def test_any_words_of_a_launcher(environ):
    try:
        assert isinstance(discover(environ), Ranks)
    except ConfigError as error:
        assert_for_people(error)


@given(LISTS)
@examples(200)
def test_any_list_of_nodes_and_of_cpus(text):
    for expand, error in (
        (partial(expand_hosts, given_as="--hosts"), ConfigError),
        (expand_counts, ConfigError),
        (parse_cpu_list, ValueError),
    ):
        try:
            assert len(expand(text)) <= 2_000_000
        except error as raised:
            assert "\n" not in str(raised)
