"""The list of mutants still fits the tree: run.py beside it says what it is for."""

from pathlib import Path

import pytest
from mutants.run import HERE, read_list

ROOT = Path(__file__).parents[2]
MUTANTS = read_list(HERE / "mutants.toml")


def test_every_mutant_has_its_own_name():
    names = [mutant.id for mutant in MUTANTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_there_is_one_place_to_change_and_tests_to_notice(mutant):
    assert mutant.new != mutant.old
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text() if name else True, test
