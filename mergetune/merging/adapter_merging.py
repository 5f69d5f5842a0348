"""Merging of LoRA adapters: weights and scales act on the product B A, as in PEFT's add_weighted_adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergetune.merging.adapters import Adapter, merged_config
from mergetune.merging.averages import average
from mergetune.merging.checks import check_choice, per_expert
from mergetune.merging.methods import Method
from mergetune.merging.plans import facts_of, merged_pieces, plan_of
from mergetune.merging.preparation import prepared
from mergetune.merging.sources import Constant, Source, StateDict, View, source, sources

FORMS = ("factors", "svd", "cat")
FACTOR_METHODS = ("task_arithmetic", "ties", "dare")
"""Methods that PEFT applies to the factors: linear, ties, dare_linear and dare_ties."""
SUMS = ("task_arithmetic", "negate", "average")
"""Methods whose result is a sum of the products with one weight per adapter."""
MAX_PRODUCT = 1 << 28  # most numbers of a product of which an svd is taken: 1 GiB; a layer of 4096 by 4096 has 2^24


@torch.no_grad()
def merge_adapters(
    method: Callable,
    adapters: Sequence[Adapter],
    *,
    form: str | None = None,
    rank: int | None = None,
    missing: str = "refuse",
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Merges LoRA adapters, which add ``scale_k B_k A_k`` to the weights of a model.

    There are three forms. They give the numbers of PEFT's ``add_weighted_adapter``, except for random masks:

    - "factors" merges all A and all B, each multiplied by ``sqrt(weight_k scale_k)`` (with the sign in A): PEFT's
      linear, ties, dare_linear and dare_ties. It is an approximation, because it also adds products of A and B of
      different adapters. Trims each factor alone, as PEFT does, unless ``trim`` says otherwise.
    - "svd" merges the products ``scale_k B_k A_k`` as task vectors with any method, and takes the best approximation of
      a rank: PEFT's svd and ties_svd.
    - "cat" joins the factors of all adapters: exact, and of the sum of the ranks. For sums of products alone.

    A layer that an adapter lacks counts as a product of 0.

    Args:
        method: a method that works tensor by tensor.
        adapters: from :func:`mergetune.merging.adapters.open_adapter`.
        form: one of the forms; None takes "factors" for ``FACTOR_METHODS`` and "svd" for all others.
        rank: rank of the result of "svd"; None takes the largest rank of the adapters in each layer.
        missing: what happens to tensors that are no factors (``modules_to_save``) and differ between the adapters:
            they are no differences to a base. ``average`` averages them; for other methods "refuse" raises ValueError,
            "base" takes those of the first adapter, and "drop" leaves them out.
        options: keyword arguments of the method.

    Returns:
        The merged tensors, and the configuration of the result, which is None for adapters without one. Without
        configurations the result has the scale of the adapters, which must be the same for all.

    Raises:
        ValueError: adapters with and without a configuration; ranks that differ with "factors"; a method that has no
            such form; or full tensors that cannot be merged.
    """
    facts = facts_of(method)
    form = form or ("factors" if facts.name in FACTOR_METHODS else "svd")
    check_choice("lora", form, FORMS)
    if len({adapter.config is None for adapter in adapters}) > 1:
        without = next(adapter.title for adapter in adapters if adapter.config is None)
        raise ValueError(f"{without} must have adapter_config.json beside it, as the others have: it gives the scale")
    if rank is not None and (form != "svd" or rank < 1):
        raise ValueError(f"lora_rank must be at least 1, and None without lora='svd', got {rank} with {form!r}")
    if form != "svd" and facts.name not in (FACTOR_METHODS if form == "factors" else SUMS):
        allowed = ", ".join(FACTOR_METHODS if form == "factors" else SUMS)
        raise ValueError(f"lora={form!r} (--lora) is for {allowed}, got {facts.name}: take 'svd'")
    layers = list(dict.fromkeys(layer for adapter in adapters for layer in adapter.layers))
    merge = {"factors": _factors, "cat": _joined, "svd": partial(_truncated, rank=rank)}[form]
    merged = _full_tensors(facts, adapters, missing, options)
    full, ranks = list(merged), {}
    for layer, a, b in merge(method, facts, adapters, layers, options):
        ranks[layer] = len(a)
        for name, tensor in zip(_names(adapters, layer), (a, b), strict=True):
            merged[name] = tensor.to(_dtype(adapters, name)).contiguous()
    return merged, merged_config(adapters, ranks, full)


def _names(adapters: Sequence[Adapter], layer: str) -> tuple[str, str]:
    """Names of A and B of a layer, in the first adapter that has it."""
    found = next(adapter.layers[layer] for adapter in adapters if layer in adapter.layers)
    return found.a, found.b


def _dtype(adapters: Sequence[Adapter], name: str) -> torch.dtype:
    return next(source(adapter.state, name).dtype for adapter in adapters if name in adapter.state)


Merged = Sequence[tuple[str, Tensor, Tensor]]


def _weights(facts: Method, count: int, options: dict[str, Any]) -> list[float]:
    """One weight per adapter: of a sum of products, or of the values that ties and dare take the mean or sum of."""
    left = dict(options)
    weights = per_expert("weights", left.pop("weights", None), count)
    default = {"average": 1.0}.get(facts.name) or facts.option("scale").default
    scale = float(left.pop("scale", default))
    if facts.name == "negate":
        scale = -scale
    if facts.name == "average":
        if not sum(weights) > 0:
            raise ValueError(f"weights must have a positive sum, got {weights}")
        scale = 1 / sum(weights)
    if facts.name in SUMS and left:
        raise TypeError(f"{facts.name} has no option {next(iter(left))!r}")
    return [scale * weight for weight in weights]


def _factors(
    method: Callable, facts: Method, adapters: Sequence[Adapter], layers: Sequence[str], options: dict[str, Any]
) -> Merged:
    weights = _weights(facts, len(adapters), options)
    more = {name: value for name, value in options.items() if name not in ("weights", "scale")}
    if facts.name == "ties":
        more = {"trim": "tensor", **more}
    groups: dict[tuple, list[str]] = {}
    for layer in layers:
        own = [k for k, adapter in enumerate(adapters) if layer in adapter.layers]
        ranks = [adapters[k].layers[layer].rank for k in own]
        if len(set(ranks)) > 1:
            raise ValueError(
                f"lora='factors' needs one rank for all adapters, got {ranks} in {layer!r}: take lora='svd' or 'cat' "
                "(--lora)"
            )
        groups.setdefault(tuple((k, weights[k] * adapters[k].layers[layer].scale) for k in own), []).append(layer)
    if len(groups) > 1 and more.get("trim") == "global":
        raise ValueError("trim must be 'tensor' for adapters whose layers or scales differ, got 'global'")
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}  # A, B
    for group, own in groups.items():
        for factor in (0, 1):  # A, then B
            names = {layer: _names(adapters, layer)[factor] for layer in own}  # masks depend on the names
            states = [{names[layer]: adapters[k].factors(layer)[factor] for layer in own} for k, _ in group]
            roots = [math.copysign(math.sqrt(abs(w)), 1 if factor else w) for _, w in group]
            done = method(Constant(states[0]), states, scale=1.0, weights=roots, **more)
            for layer in own:
                found[factor][layer] = done[names[layer]]
    return [(layer, found[0][layer], found[1][layer]) for layer in layers]


def _joined(
    method: Callable, facts: Method, adapters: Sequence[Adapter], layers: Sequence[str], options: dict[str, Any]
) -> Merged:
    weights, found = _weights(facts, len(adapters), options), []
    for layer in layers:
        own = [
            (*adapter.factors(layer), weight * adapter.layers[layer].scale)
            for adapter, weight in zip(adapters, weights, strict=True)
            if layer in adapter.layers
        ]
        found.append((layer, torch.cat([a * w for a, _, w in own]), torch.cat([b for _, b, _ in own], 1)))
    return found


def _truncated(
    method: Callable,
    facts: Method,
    adapters: Sequence[Adapter],
    layers: Sequence[str],
    options: dict[str, Any],
    *,
    rank: int | None,
) -> Merged:
    shapes = {layer: next(a.product(layer) for a in adapters if layer in a.layers) for layer in layers}
    for layer, like in shapes.items():
        if like.numel > MAX_PRODUCT:  # a small file can describe a product of any size
            raise ValueError(
                f"lora='svd' needs the product of A and B of {layer!r} in memory, at most {MAX_PRODUCT:,} numbers, got "
                f"{list(like.shape)}: take lora='factors' or 'cat' (--lora)"
            )
    experts: list[StateDict] = [
        View(
            {
                layer: partial(adapter.product, layer) if layer in adapter.layers else partial(_nothing, shapes[layer])
                for layer in layers
            },
            title=adapter.title,
        )
        for adapter in adapters
    ]
    base = Constant(experts[0]) if facts.base else None
    plan = plan_of(method)
    if plan is None:
        raise ValueError(f"{facts.name} does not merge LoRA adapters: it does not work tensor by tensor")
    given = prepared(facts, base, experts)
    step, found = plan(given.moving_base, given.moving, **options), []
    pieces: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    numel = {layer: like.numel for layer, like in sources(given.reference)}
    for layer, piece in merged_pieces(step, given):
        pieces[layer].append(piece.clone())
        if sum(map(len, pieces[layer])) < numel[layer]:
            continue
        own = [adapter for adapter in adapters if layer in adapter.layers]
        keep = rank or max(adapter.layers[layer].rank for adapter in own)
        a, b = own[0].factors(layer)
        u, s, v = torch.linalg.svd(torch.cat(pieces.pop(layer)).reshape(shapes[layer].shape), full_matrices=False)
        keep = min(keep, len(s))
        columns = (u[:, :keep] * s[:keep]).reshape(len(b), keep, *b.shape[2:])
        found.append((layer, v[:keep].reshape(keep, *a.shape[1:]), columns))
    return found


def _nothing(like: Source) -> Source:
    return Source(like.shape, like.dtype, like.device, lambda begin, end: torch.zeros(end - begin, dtype=like.dtype))


def _full_tensors(
    facts: Method, adapters: Sequence[Adapter], missing: str, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors that are no factors: equal ones, averages, or what ``missing`` says."""
    merged = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.full):
        own = [adapter.state[name] for adapter in adapters if name in adapter.full]
        everywhere = len(own) == len(adapters) and len({tensor.shape for tensor in own}) == 1
        if everywhere and all(torch.equal(tensor, own[0]) for tensor in own):
            merged[name] = own[0]
        elif everywhere and facts.name == "average" and own[0].is_floating_point():
            merged |= average(None, [{name: tensor} for tensor in own], weights=options.get("weights"))
        elif missing == "base" and name in adapters[0].full:
            merged[name] = own[0]
        elif missing == "refuse":
            holds = next(adapter for adapter in adapters if name in adapter.full)
            raise ValueError(
                f"{holds.title} holds {name!r}, a whole tensor (modules_to_save or a bias), no difference to a base: "
                f"{facts.name} cannot merge it where adapters differ. average averages it, missing='base' (--missing "
                "base) takes that of the first adapter, missing='drop' leaves it out"
            )
    return merged
