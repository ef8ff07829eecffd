"""Parameter groups of a model: which parameters decay, and how fast each layer learns. For any torch optimizer."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._values import number

__all__ = ["decay_groups", "layerwise_groups"]

Groups = list[dict[str, Any]]


def decay_groups(
    model: nn.Module, weight_decay: float, *, no_decay: Iterable[str] = (), decay_embeddings: bool = True
) -> Groups:
    """Two groups, of the parameters that decay and of those that do not.
    ``AdamW(decay_groups(model, weight_decay=0.1), lr=3e-4)``.

    Without decay are biases (``bias`` is a word of the parameter's own name, as in ``in_proj_bias``), the parameters of
    normalisation layers (whose class has a name that ends with ``Norm``, ``Norm1d``, ``Norm2d`` or ``Norm3d``), the
    magnitudes of torch's ``weight_norm``, whatever has fewer than two dimensions, and what ``no_decay`` names. All
    other parameters decay, embeddings too.

    Parameters that need no gradient are in no group: call it again, or ``add_param_group``, when they do. One that
    several modules share is in once, and decays only if it does under each of its names. A lazy parameter, whose shape
    is not known yet, is judged by its name and module. The order is that of ``model.named_parameters()``.

    Args:
        model: the model, after ``fully_shard``, which makes new parameters; before or after DistributedDataParallel;
            before FullyShardedDataParallel.
        weight_decay: the first group's. The second has 0.
        no_decay: patterns of names, as in a shell (``"*.pos_embed"``, ``"head"``), of parameters or of modules with all
            that is in them, for further parameters that do not decay.
        decay_embeddings: False spares the weights of ``Embedding`` and ``EmbeddingBag`` as well, and an output layer
            that shares one.

    Returns:
        Groups for an optimizer's first argument: ``params``, as pairs of name and parameter, and ``weight_decay``. One
        without any parameter is left out.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if a pattern fits no name, or the model or a part of it is a FullyShardedDataParallel, which
            flattens parameters. Call it before, wrap with ``use_orig_params=True``, and pass the groups.
    """
    split: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    parameters = _parameters(model)
    spared = _spared(model, parameters, no_decay, decay_embeddings)
    for one in parameters:
        if one.value.requires_grad:
            split[id(one) not in spared].append((one.names[0], one.value))
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0}
        for decays, members in split.items()
        if members
    ]


def layerwise_groups(
    model: nn.Module,
    lr: float,
    layer_decay: float,
    weight_decay: float | None = None,
    *,
    layers: Sequence[str] | Callable[[str], int] | None = None,
    no_decay: Iterable[str] = (),
    decay_embeddings: bool = True,
) -> Groups:
    r"""Groups with learning rates that fall by a factor from layer to layer, from the output to the input.
    ``AdamW(layerwise_groups(model, lr=1e-3, layer_decay=0.75, weight_decay=0.05))``.

    As in the fine-tuning of ELECTRA (arXiv:2003.10555), BEiT (arXiv:2106.08254) and MAE (arXiv:2111.06377): a parameter
    of depth d learns with

    .. math:: \mathrm{lr}_d = \mathrm{lr} \cdot \mathrm{layer\_decay}^{D - d}

    where D is the largest depth of the model, that of frozen parameters included. What is registered before the first
    layer, such as embeddings and patches, has depth 0, the layers have 1, 2, ..., and all else, such as the last
    normalisation, a pooler or the head, has one more than the last of them, hence ``lr`` itself. A parameter with
    several names, such as an embedding that is the head's weight too, has the smallest depth of these. Parameters that
    need no gradient are in no group.

    Args:
        model: the model.
        lr: the learning rate of the deepest parameters.
        layer_decay: the factor, above 0 and at most 1; 0.65 to 0.9 in the papers.
        weight_decay: splits the groups as :func:`decay_groups` does. None leaves this to the optimizer, whose own
            ``weight_decay`` then holds for all parameters.
        layers: the layers' names, or patterns of them, in the order from input to output, each of a depth of its own;
            or a function from the name of any parameter, embeddings and heads included, to its depth. None takes the
            entries of the ``ModuleList`` or ``Sequential`` of modules of one class that has the most elements of
            parameters, if no other has a tenth as many or modules of that class, and no list within an entry is longer:
            it suits transformers with one stack of layers.
        no_decay, decay_embeddings: as in :func:`decay_groups`; they need ``weight_decay``.

    Returns:
        Groups for an optimizer's first argument, by depth from 0 on, those with decay first: ``params``, as pairs of
        name and parameter, ``lr`` and, where given, ``weight_decay``.

    Raises:
        TypeError: if ``model`` is no module, or a function's depth no integer.
        ValueError: for a factor out of range, a name or pattern that fits nothing, if it is not clear which the layers
            are, and, with ``weight_decay``, for what :func:`decay_groups` refuses.
    """
    layer_decay = number(layer_decay)
    lr = lr if isinstance(lr, Tensor) else number(lr)  # a Decimal is not multiplied by a float
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, but is {layer_decay}")
    parameters = _parameters(model)
    if weight_decay is not None:
        spared = _spared(model, parameters, no_decay, decay_embeddings)
    elif list(no_decay) or not decay_embeddings:
        raise ValueError("no_decay and decay_embeddings say what weight_decay is not for: pass weight_decay as well")
    depths = _depths(model, parameters, _layers_of(model) if layers is None else layers)
    deepest = max(depths, default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for one, depth in zip(parameters, depths, strict=True):
        if one.value.requires_grad:
            group = {"params": [], "lr": lr * layer_decay ** (deepest - depth)}
            is_spared = weight_decay is not None and id(one) in spared
            if weight_decay is not None:
                group["weight_decay"] = 0.0 if is_spared else weight_decay
            groups.setdefault((depth, is_spared), group)["params"].append((one.names[0], one.value))
    return [groups[key] for key in sorted(groups)]


@dataclass
class _Parameter:
    value: nn.Parameter
    #: Its names and the modules that have it, in the order in which they are registered.
    names: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)


def _parameters(model: nn.Module) -> list[_Parameter]:
    """All of a model's, each once."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, whose parameters have names, but is a {type(model).__name__}"
        )
    found: dict[nn.Parameter, _Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            one = found.setdefault(p, _Parameter(p))
            one.names.append(name)
            one.modules.append(module)
    return list(found.values())


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits the name of a parameter, or of a module that it is in."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return any(prefix == pattern or fnmatchcase(prefix, pattern) for prefix in prefixes)


def _check_patterns(parameters: list[_Parameter], patterns: Sequence[str], what: str) -> None:
    for pattern in patterns:
        if not any(_fits(name, pattern) for one in parameters for name in one.names):
            raise ValueError(
                f"{what} has {pattern!r}, which fits no parameter or module of the model: its parameters are named as "
                f"{', '.join(repr(one.names[0]) for one in parameters[:3])}, ... (model.named_parameters())"
            )


# ---- who decays ----


def _spared(
    model: nn.Module, parameters: list[_Parameter], no_decay: Iterable[str], decay_embeddings: bool
) -> set[int]:
    """The ids of those that do not decay."""
    if isinstance(no_decay, str):
        no_decay = [no_decay]
    patterns = list(no_decay)
    _check_patterns(parameters, patterns, "no_decay")
    for name, module in model.named_modules():
        if any(c.__name__ == "FullyShardedDataParallel" for c in type(module).__mro__):
            raise ValueError(
                f"{name or 'the model'} is a FullyShardedDataParallel, which flattens its parameters, so that no shape "
                "shows which of them are matrices: make the groups before wrapping, wrap with use_orig_params=True, "
                "and pass those groups to the optimizer"
            )
    return {id(one) for one in parameters if not _decays(one, patterns, decay_embeddings)}


def _decays(one: _Parameter, no_decay: list[str], decay_embeddings: bool) -> bool:
    if not is_lazy(one.value) and one.value.dim() < 2:
        return False
    for name, module in zip(one.names, one.modules, strict=True):
        if "bias" in name.rpartition(".")[2].split("_") or any(_fits(name, pattern) for pattern in no_decay):
            return False
        if any(re.search(r"Norm(\dd)?$", c.__name__) for c in type(module).__mro__):
            return False
        if not decay_embeddings and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return False
        if _is_magnitude(module, name.rpartition(".")[2]):
            return False
    return True


def _is_magnitude(module: nn.Module, name: str) -> bool:
    """Whether a parameter is a gain that torch's weight_norm, of either kind, takes out of a weight."""
    if name == "original0":
        return any(type(child).__name__ == "_WeightNorm" for child in module.children())
    return name.endswith("_g") and f"{name[:-2]}_v" in module._parameters


# ---- how deep ----


def _depths(model: nn.Module, parameters: list[_Parameter], layers: Sequence[str] | Callable[[str], int]) -> list[int]:
    of_name: dict[str, int] = {}
    if callable(layers):
        of_name = {name: _integer(layers(name), name) for one in parameters for name in one.names}
    else:
        layers = [layers] if isinstance(layers, str) else list(layers)
        _check_patterns(parameters, layers, "layers")
        outside = 0
        for name, _ in model.named_parameters(remove_duplicate=False):
            depth = next((i for i, layer in enumerate(layers, 1) if _fits(name, layer)), None)
            if depth is not None:
                outside = len(layers) + 1  # from here on
            of_name[name] = outside if depth is None else depth
    return [min(of_name[name] for name in one.names) for one in parameters]


def _integer(depth: int, name: str) -> int:
    try:
        return operator.index(depth)
    except TypeError:
        raise TypeError(f"the depth of {name!r} must be an integer, but layers() returned {depth!r}") from None


#: A list with so small a share of the elements of the largest one is none of layers, such as one of heads.
SMALL_SHARE = 0.1


@dataclass
class _Stack:
    """Modules of one class in a row."""

    entries: dict[str, nn.Module]
    #: Of their parameters; lazy ones have none so far.
    elements: int
    #: Those within an entry.
    inner: list[_Stack] = field(default_factory=list)

    @property
    def kind(self) -> type[nn.Module]:
        return type(next(iter(self.entries.values())))

    def __str__(self) -> str:
        return f"{len(self.entries)} {self.kind.__name__}s from {next(iter(self.entries))!r} on"


def _stacks(model: nn.Module) -> list[_Stack]:
    """The outermost ones. A list within a layer, such as the two matrices of its perceptron, is rarely of layers."""
    outermost: dict[str, _Stack] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        prefix = f"{name}." if name else ""
        entries = {prefix + key: m for key, m in module.named_children() if next(m.parameters(), None) is not None}
        if len(entries) > 1 and len(set(map(type, entries.values()))) == 1:
            stack = _Stack(entries, sum(0 if is_lazy(p) else p.numel() for p in module.parameters()))
            outer = next((outermost[o] for o in outermost if prefix.startswith(o)), None)
            if outer is None:
                outermost[prefix] = stack
            else:
                outer.inner.append(stack)
    return list(outermost.values())


def _layers_of(model: nn.Module) -> list[str]:
    """The names of the entries of the model's stack of layers."""
    stacks = _stacks(model)
    remedy = "pass layers=, the layers' names in the order from input to output, or a function from names to depths"
    if not stacks:
        raise ValueError(f"the model has no ModuleList or Sequential of several modules of one class: {remedy}")
    largest = max(stacks, key=lambda stack: stack.elements)
    rivals = [s for s in stacks if s.elements >= SMALL_SHARE * largest.elements or s.kind is largest.kind]
    longest = max(largest.inner, key=lambda stack: len(stack.entries), default=largest)
    if len(longest.entries) > len(largest.entries):  # stages of blocks, or a sequence of encoders
        rivals.append(longest)
    if len(rivals) > 1:
        raise ValueError(
            f"the model has {' and '.join(map(str, rivals))}, and it is not clear which are its layers: {remedy}"
        )
    return list(largest.entries)
