"""The short form of the byte-flipping fuzzer, and whether it finds what it is there to find."""

import pytest
from fuzz import flips
from fuzz.targets import TARGETS

# A second or two each. The long form: python tests/fuzz/flips.py --minutes 20.
COUNTS = {"checkpoint": 25, "config": 300, "image": 300, "index": 40, "jpeg": 150, "jpeg-whole": 150, "journal": 400,
          "machine": 40, "raw": 300, "tar": 150}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_damaged_files_end_in_a_result_or_in_one_line(name):
    tried, failure = flips.run(name, count=COUNTS[name])
    assert failure is None, f"python tests/fuzz/flips.py --target {name} --only {failure[0]}: {failure[1]}"
    assert tried == COUNTS[name]


@pytest.mark.parametrize(
    "name, said",
    [("crash", "SIGABRT"), ("hang", "no end within 2 s"), ("traceback", "KeyError: 'state'"),
     ("two lines", "several lines"), ("memory", "MemoryError")],
)  # fmt: skip
def test_the_fuzzer_finds_faults_and_their_number(name, said):
    tried, (number, text) = flips.run(name, count=10, slowest_s=2.0)
    assert (tried, number) == (4, 3)
    assert said in text


def test_an_input_follows_from_its_number():
    corpus = [bytes(range(200)), b"7" * 300]
    inputs = [flips.make("jpeg", corpus, 0, number) for number in range(200)]
    assert inputs == [flips.make("jpeg", corpus, 0, number) for number in range(200)]
    assert len(set(inputs)) > 190
