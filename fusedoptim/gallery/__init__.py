"""Optimizers whose rules are functions alone, one file each: examples of rules of one's own, and tested as all others
are."""

from .adadelta import Adadelta
from .adamax import Adamax
from .asgd import ASGD
from .nadam import NAdam
from .radam import RAdam
from .rprop import Rprop

__all__ = ["ASGD", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop"]
