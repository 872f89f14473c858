"""The configuration of a run.

A recipe gives a configuration, a TOML file overrides it, and flags override both. All three use the same dotted field
names (``optim.lr``): :func:`fields` lists them, :func:`override` sets them. Imports no torch.
"""

from knltrain.config.overrides import as_dict as as_dict
from knltrain.config.overrides import as_typed as as_typed
from knltrain.config.overrides import comma_separated as comma_separated
from knltrain.config.overrides import fields as fields
from knltrain.config.overrides import flatten as flatten
from knltrain.config.overrides import names as names
from knltrain.config.overrides import override as override
from knltrain.config.overrides import read_toml as read_toml
from knltrain.config.schema import WEIGHTS_ONLY as WEIGHTS_ONLY
from knltrain.config.schema import AugmentConfig as AugmentConfig
from knltrain.config.schema import CheckpointConfig as CheckpointConfig
from knltrain.config.schema import CommConfig as CommConfig
from knltrain.config.schema import ConvName as ConvName
from knltrain.config.schema import EngineName as EngineName
from knltrain.config.schema import HealthConfig as HealthConfig
from knltrain.config.schema import OptimConfig as OptimConfig
from knltrain.config.schema import Precision as Precision
from knltrain.config.schema import RunConfig as RunConfig
from knltrain.config.schema import ScheduleConfig as ScheduleConfig
