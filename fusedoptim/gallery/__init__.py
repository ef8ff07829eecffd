"""Optimizers whose rules are functions alone, one file each: examples of rules of one's own, and tested as all others
are."""

from .adadelta import Adadelta
from .adamax import Adamax
from .ademamix import AdEMAMix
from .adopt import ADOPT
from .asgd import ASGD
from .cautious import CautiousAdamW
from .lamb import LAMB
from .lars import LARS
from .lion import Lion
from .nadam import NAdam
from .radam import RAdam
from .rprop import Rprop
from .schedule_free import AdamWScheduleFree

__all__ = [
    "ADOPT",
    "ASGD",
    "LAMB",
    "LARS",
    "AdEMAMix",
    "Adadelta",
    "AdamWScheduleFree",
    "Adamax",
    "CautiousAdamW",
    "Lion",
    "NAdam",
    "RAdam",
    "Rprop",
]
