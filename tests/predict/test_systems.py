"""Descriptions of machines: the ones that come along, and every way in which a file can be wrong."""

import msgspec
import pytest
from foreseen import GOOD

from knltrain.errors import ConfigError
from knltrain.predict.systems import Rate, Sourced, load, names, parse


def numbers(struct, place=""):
    """Every number of a system, with its place; those with a source are found whole."""
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        if isinstance(value, Sourced | Rate):
            yield f"{place}{field.name}", value
        elif isinstance(value, msgspec.Struct):
            yield from numbers(value, f"{place}{field.name}.")
        elif isinstance(value, tuple):
            yield from ((f"{place}{field.name}", one) for one in value)
        else:
            assert not isinstance(value, int | float), f"{place}{field.name} has no source"


def test_the_machines_that_come_along():
    assert set(names()) >= {"knl7250-opa", "xeon8160-opa", "xeon8480-200g", "cloud-10g", "cloud-25g", "cloud-100g"}
    for name in names():
        system = load(name)
        assert system.name == name
        for place, number in numbers(system):
            assert len(number.source) >= 3, f"{name}: {place}"


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "two.toml"
    file.write_text(GOOD)
    assert load(str(file)).network.link_gb_per_s.value == 1.25


@pytest.mark.parametrize(
    "before, after, words",
    [
        ("link_gb_per_s = {value = 1.25", "link_gb_per_s = {value = -1.25", "network.link_gb_per_s.value: .*> 0"),
        ("link_gb_per_s = {value = 1.25", "link_gb_per_s = {value = nan", "network.link_gb_per_s.value"),
        ("link_gb_per_s = {value = 1.25", "link_gb_per_s = {value = inf", "network.link_gb_per_s.value"),
        ("latency_us = {value = 10", "latency_us = {value = -1", "network.latency_us.value"),
        ("latency_us = {value = 10", 'latency_us = {value = "ten"', "network.latency_us.value"),
        ("latency_us", "latencyus", "unknown field network.latencyus; did you mean latency_us?"),
        ("[noise]", "[nose]", "unknown field nose; did you mean noise?"),
        ("[noise]\nspread", "[noise]\nwidth", "unknown field noise.width; there are spread"),
        ('{value = 4, source = "counted"}', '{value = 4, sauce = "c"}', "unknown field node.cores.sauce; did you mean"),
        ('{value = 4, source = "counted"}', "4", "node.cores: expected `object`, got `int`"),
        ('{value = 4, source = "counted"}', "{value = 4}", "node.cores: object missing required field `source`"),
        ('{value = 4, source = "counted"}', '{value = 4, source = ""}', "node.cores.source"),
        ("{value = 4,", "{value = 0,", "node.cores.value"),
        ("comm_cores = {value = 0", "comm_cores = {value = 4", "leaves none of the 4 cores"),
        ("efficiency = ", "# ", r"neither \[\[rate\]\] nor node.efficiency"),
        ("[storage]", "[[rate]]\nmodel = 'x'\n[storage]", r"unknown field rate\[0\].model; did you mean models?"),
        ("[storage]", "[[rate]]\nmodels = []\n[storage]", r"rate\[0\]"),
        ("about", "about = ", "not TOML"),
        ("[network]", "[network]\nalgorithm = 'magic'", "network.algorithm: invalid enum value 'magic'"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(before, after, words):
    assert before in GOOD
    with pytest.raises(ConfigError, match=words) as caught:
        parse(GOOD.replace(before, after, 1), "two.toml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("two.toml: ")


@pytest.mark.parametrize(
    "name, words",
    [("knl7250", "did you mean knl7250-opa?"), ("nowhere.toml", "No such file"), ("", "there are cloud-100g"),
     ("/", "Is a directory")],
)  # fmt: skip
def test_what_is_no_system_is_one_line(name, words):
    with pytest.raises(ConfigError, match=words):
        load(name)


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "binary.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not TOML"):
        load(str(file))
