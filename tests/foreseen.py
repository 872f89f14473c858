"""What the tests of predictions share: jobs, systems with other numbers, and a system file that is good."""

import msgspec

from knltrain.predict.run import Job
from knltrain.predict.systems import Sourced, load
from knltrain.recipes import RECIPES

ALEXNET = RECIPES["alexnet-bn-32k"].config()
RESNET = RECIPES["resnet50-32k"].config()


def job(config=ALEXNET, system="knl7250-opa", nodes=512, **options):
    return Job(config=config, system=load(system) if isinstance(system, str) else system, nodes=nodes, **options)


def replaced(system, **parts):
    """A system with fields of its parts replaced by values."""
    for part, fields in parts.items():
        values = {name: Sourced(value, "test") for name, value in fields.items()}
        system = msgspec.structs.replace(system, **{part: msgspec.structs.replace(getattr(system, part), **values)})
    return system


GOOD = """
name = "two"
about = "two nodes"
[node]
cores = {value = 4, source = "counted"}
ranks = {value = 1, source = "one"}
comm_cores = {value = 0, source = "none"}
fp32_gflop_per_s = {value = 100, source = "measured"}
memory_gb_per_s = {value = 10, source = "measured"}
efficiency = {value = 0.5, source = "measured"}
[network]
link_gb_per_s = {value = 1.25, source = "10 Gbit/s"}
latency_us = {value = 10, source = "measured"}
shared_gb_per_s = {value = 5, source = "measured"}
shared_latency_us = {value = 0, source = "in call_us"}
sum_gb_per_s = {value = 5, source = "measured"}
call_us = {value = 50, source = "measured"}
[noise]
spread = {value = 0.05, source = "measured"}
[storage]
write_gb_per_s = {value = 1, source = "measured"}
"""
