"""Schedule-free AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import AT_LEAST_0, FP32, SQUARES, Flag, Group, Hyper, Range, Rule, State, at_least_0, betas
from .._storage import asked_dtype
from .._switching import move_towards
from .._values import number
from ..rule_functions import double

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


#: Weights of steps, and their sum, are not to overflow float32.
POWER = Range(0.0, 4.0, "from 0 to 4")


def schedule_free_adamw(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """Schedule-free AdamW (arXiv:2405.15682). ``p`` is the paper's y."""
    (beta1, beta2), lr = h["betas"], double(h["lr"])
    if t <= h["warmup_steps"]:
        lr = lr * (t / h["warmup_steps"])
    lr_max = s["lr_max"] = max(lr, s["lr_max"])
    weight = t ** h["r"] * lr_max ** h["weight_lr_power"]
    weight_sum = s["weight_sum"] = s["weight_sum"] + weight
    share = weight / weight_sum if weight_sum != 0 else 0.0
    if h["maximize"]:
        g = -g
    if s["z"] is None:
        s["z"] = p.clone()
    s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    g = g.div(s["exp_avg_sq"].div(1 - beta2**t).sqrt_().add_(h["eps"]))
    if h["weight_decay"] != 0:
        g = g.add(p, alpha=h["weight_decay"])
    p.lerp_(s["z"], share).add_(g, alpha=lr * (beta1 * (1 - share) - 1))
    s["z"].sub_(g, alpha=lr)


def _check(group: Group) -> None:
    if asked_dtype(group, "z") == "int8":
        raise ValueError(
            "state_dtype='int8' is not for 'z', which is where the parameters go, and needs more than two digits; use "
            "state_dtype={'exp_avg_sq': 'int8'}"
        )


class AdamWScheduleFree(FusedOptimizer):
    r"""Schedule-free AdamW (arXiv:2405.15682): no schedule and no last step, because gradients are taken at a mix y of
    AdamW's iterates z and of their average x.

    .. math::
        v = \beta_2 v + (1-\beta_2) g^2, \quad
        d = \frac{g}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda y, \quad
        z = z - lr \cdot d, \quad x = (1-c) x + c z, \quad y = (1-\beta_1) z + \beta_1 x

    with c the share of this step's weight, ``t**r * lr_max**weight_lr_power``, in the sum of all. The parameters are y
    in training and x after :meth:`eval`, which they must be for evaluation and in a checkpoint of the model;
    :meth:`train` makes them y again, and ``step()`` in between raises; ``betas[0]`` is to stay what it is in between,
    as each of the two works with that of its moment. Checkpoints carry which it is. Formula and
    signature are those of the authors' package, schedulefree 1.4; but an optimizer starts as after :meth:`train`,
    because x, y and z are the same then, and a parameter that gets no gradient has a sum of its own.

    ``optimizer.eval(); evaluate(model); optimizer.train()`` is an evaluation.

    State per parameter: ``step``, ``weight_sum`` and ``lr_max`` (0-dim, fp32, where schedulefree has Python's doubles:
    the sum stops growing after 2**24 steps of equal weight), ``z`` and ``exp_avg_sq``, each of the parameter's shape,
    in its dtype or in ``state_dtype``. For 16-bit parameters use ``master="remainder"`` with
    ``state_dtype={"z": torch.float32}``, so that small steps and both mixes are not rounded away.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: the share of x in y, in (0, 1) where :meth:`eval` is to find x again, and the decay rate of the second
            moment, in [0, 1).
        eps: added to the denominator.
        weight_decay: the decay, at y.
        warmup_steps: in so many steps lr comes from 0, linearly.
        r: the power of t in a step's weight, from 0 to 4.
        weight_lr_power: the power of the largest learning rate so far in it, from 0 to 4.
        maximize: go up instead of down.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range.
    """

    rule = Rule(
        name="schedule_free_adamw",
        reference=schedule_free_adamw,
        hyper=(
            *betas(),
            at_least_0("eps", "epsilon value", FP32),
            at_least_0("weight_decay"),
            Hyper("warmup_steps", accepts=AT_LEAST_0),
            Hyper("r", accepts=POWER),
            Hyper("weight_lr_power", accepts=POWER),
            Flag("maximize"),
        ),
        states=(State("z", starts_absent=True), State("exp_avg_sq", kind=SQUARES)),
        numbers=(State("weight_sum"), State("lr_max")),
        check=_check,
        sparse_alternative="SparseAdam",
    )

    _self_check: ClassVar[dict[str, Any]] = {"warmup_steps": 3, "r": 0.5, "weight_decay": 0.1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "maximize": maximize,
            "train_mode": True,
        }
        super().__init__(params, defaults, options)

    def eval(self, model: nn.Module | None = None) -> None:
        """Makes the parameters x, the average of the iterates. Does nothing if they are that.

        Args:
            model: needed for FSDP2 (``fully_shard``) and FullyShardedDataParallel, as in :meth:`ema_weights`.

        Raises:
            ValueError: if ``betas[0]`` of a group is 0, as y is z then, and says nothing of x; for values and states
                with which no step could be made.
            RuntimeError: within :meth:`ema_weights`, and for sharded parameters without their model. Nothing is
                written then, nor by a ValueError.
        """
        self._switch(False, model)

    def train(self, model: nn.Module | None = None) -> None:
        """Makes the parameters y again, at which gradients are to be taken. Does nothing if they are that.

        Args:
            model: as in :meth:`eval`.

        Raises:
            RuntimeError: as in :meth:`eval`.
        """
        self._switch(True, model)

    def _switch(self, train: bool, model: nn.Module | None) -> None:
        groups = [group for group in self.param_groups if group["train_mode"] is not train]
        for group in groups:
            self._check_group({**self.defaults, **group})
        if not train and any(number(group["betas"][0]) == 0 for group in groups):
            raise ValueError("eval() finds x from y and z, but with betas[0] = 0 y is z; use a larger betas[0]")
        weights = [1 - (beta1 if train else 1 / beta1) for beta1 in (number(group["betas"][0]) for group in groups)]
        move_towards(self, "z", list(zip(groups, weights, strict=True)), model, "train" if train else "eval")
        for group in groups:
            group["train_mode"] = train

    def _check_not_evaluating(self, call: str = "step") -> None:
        super()._check_not_evaluating(call)
        if call == "step" and not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                "step() after eval(), which made the parameters the average that evaluation is for: call "
                "optimizer.train() before the next forward, so that gradients are taken where a step needs them"
            )

    def _step(self, in_operator: bool = False, grad_norm: Tensor | None = None) -> None:
        self._check_not_evaluating()
        super()._step(in_operator, grad_norm)
