"""The compiled rules and the states of their variants."""

from __future__ import annotations

#: The name of a rule in C++, and as the library lists it.
RULES = {
    "Adam": "adam",
    "SGD": "sgd",
    "RMSprop": "rmsprop",
    "Adagrad": "adagrad",
    "NormAdaptive": "norm_adaptive",
    "Clip": "clip",
}
#: How many states of the parameter's shape each variant of a rule has.
STATES = {"Adam": (2, 3), "SGD": (0, 1), "RMSprop": (1, 2, 2, 3), "Adagrad": (1,), "NormAdaptive": (0,), "Clip": (0,)}
