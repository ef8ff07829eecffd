"""The torch.optim optimizers as one kernel launch per step, with the same bits on every backend."""

from ._base import FusedOptimizer
from ._clip import clip_grad_norm_, clip_grad_value_, grad_norm
from ._options import StepOptions
from ._rule import Rule, State
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .gallery import (
    ADOPT,
    ASGD,
    LAMB,
    LARS,
    Adadelta,
    Adamax,
    AdamWScheduleFree,
    AdEMAMix,
    CautiousAdamW,
    Lion,
    NAdam,
    RAdam,
    Rprop,
)
from .gradient_release import step_in_backward
from .groups import decay_groups, layerwise_groups
from .norm_adaptive import NormAdaptive
from .rmsprop import RMSprop
from .rule_functions import mean_square, norm, to_fp32
from .schedules import warmup_cosine
from .sgd import SGD

__version__ = "0.1.0"
__all__ = [
    "ADOPT",
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWScheduleFree",
    "Adamax",
    "CautiousAdamW",
    "FusedOptimizer",
    "Lion",
    "NAdam",
    "NormAdaptive",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Rule",
    "State",
    "StepOptions",
    "clip_grad_norm_",
    "clip_grad_value_",
    "decay_groups",
    "grad_norm",
    "layerwise_groups",
    "mean_square",
    "norm",
    "step_in_backward",
    "to_fp32",
    "warmup_cosine",
]
