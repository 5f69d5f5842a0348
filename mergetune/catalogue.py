"""The merging methods by name: what each needs, its options from text, and how it is applied to solutions and files.

Shapes: K experts, B batch, C classes, D embedding width, n context tokens, W text-tower width.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune import merging
from mergetune.clip import FrozenClip
from mergetune.curvature import fisher_diagonal
from mergetune.evaluate import accuracy
from mergetune.features import FeatureCache
from mergetune.files import write_atomically
from mergetune.geometry import cross_entropy
from mergetune.merging import StateDict, TensorFile
from mergetune.solutions import Head, Prompt, Solution, check_compatible, check_same_text, inputs

METHODS: dict[str, Callable] = {
    name: function for name in merging.__all__ if hasattr(function := getattr(merging, name), "least")
}
"""Every method, ``(base, experts, *, options) -> state dict``, by its name in :mod:`mergetune.merging`."""
FISHER_IMAGES = 256  # whose gradients make a Fisher diagonal of a prompt: each is a pass through the text tower

AVERAGES = ("average", "metrics_average", "fisher_average")  # of solutions: a base is one of what is averaged

_OPTIONS_OF = {  # where the options of methods with ** are written down
    "adamerging": merging.entropy_coefficients,
    "expert_merging": merging.alignment_coefficients,
    "evolve": merging.evolve_options,
}
_FROM_IMAGES = {  # options that are computed from cached features, and what these are used for
    "fishers": "images without labels",
    "second_moments": "images without labels",
    "predict": "images without labels",
    "data": "images without labels",
    "metrics": "labelled images",
    "score": "labelled images",
}


# -- the list ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue, from the method's docstring.

    Attributes:
        name: as ``mergetune merge`` takes it.
        title: the first sentence.
        needs: data or none.
        meaningful: on what.
        source: paper.
        options: its options with their defaults, as text.
    """

    name: str
    title: str
    needs: str
    meaningful: str
    source: str
    options: dict[str, str]


def catalogue() -> tuple[Entry, ...]:
    """All methods."""
    return tuple(map(_entry, METHODS))


def _entry(name: str) -> Entry:
    text = re.sub(r"\s+", " ", inspect.getdoc(METHODS[name]) or "").replace("``", "")
    text = re.sub(r":func:`(?:[\w.]*\.)?(\w+)`", r"\1", text)
    found = re.search(r"Needs: (.+?)\. Meaningful (?:for|on) (.+?)\.(?= [A-Z]|$)", text)
    source = re.search(r"arXiv \d{4}\.\d{5}|[A-Z][a-z]+, [A-Z]+ \d{4}", text)
    if not found or not source:
        raise ValueError(f"the docstring of {name} must hold 'Needs: ... Meaningful for ...' and its source")
    options = {option: _default(parameter) for option, parameter in _options(name).items()}
    return Entry(name, re.split(r"[:(]|\. | of ", text)[0].strip(), *found.groups(), source[0], options)


def _missing(method: str, options: Mapping[str, Any]) -> list[str]:
    return [name for name, p in _options(method).items() if p.default is p.empty and name not in options]


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "from the cache" if parameter.name in _FROM_IMAGES else "required"
    return str(getattr(parameter.default, "__name__", parameter.default))


def find(name: str) -> str:
    """The name of a method as it is known here: dashes are underscores.

    Raises:
        ValueError: naming all methods.
    """
    found = name.replace("-", "_")
    if found not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return found


def _options(name: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(_OPTIONS_OF.get(name, METHODS[name])).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


# -- options from text ------------------------------------------------------------------------------------------------


def parse_options(method: str, given: Sequence[str]) -> dict[str, Any]:
    """``["scale=0.3", "weights=1,2"]`` -> keyword arguments of a method, by the types that its signature names.

    Numbers, text and lists with commas; "none" where None is a value; names of safetensors files for state dicts
    (``fishers=a.safetensors,b.safetensors``); for ``evolve`` a method's name, ``space=density:0.1:1,weights:0:1:2`` and
    ``start=density:1,weights:0.5:0.5``.

    Raises:
        ValueError: no ``=``, an option that the method does not have, or a value that is none of its type; says which
            options there are.
    """
    method = find(method)
    return parse_keywords(method, _options(method), given)


def parse_keywords(title: str, known: Mapping[str, inspect.Parameter], given: Sequence[str]) -> dict[str, Any]:
    """``name=value`` texts -> keyword arguments, by the annotations of ``known``; ``title`` names it in errors."""
    options: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"options must be name=value, got {item!r}")
        if name not in known:
            raise ValueError(f"{title} has no option {name!r}; it has {', '.join(known) or 'none'}")
        if name in options:
            raise ValueError(f"options must not repeat, got {name!r} twice")
        options[name] = _parse(name, str(known[name].annotation), text)
    return options


def _parse(name: str, kind: str, text: str) -> Any:
    if text.lower() == "none" and "None" in kind:
        return None
    form = kind.replace(" | None", "")
    try:
        if form in _READERS:
            return _READERS[form](text)
        if name == "method":
            return METHODS[find(text)]
        if name == "space":
            fields = [item.split(":") for item in text.split(",")]
            return {option: (float(low), float(high), *map(int, count)) for option, low, high, *count in fields}
    except (KeyError, ValueError) as error:
        if isinstance(error, ValueError) and name == "method":
            raise
        example = {"space": "name:low:high[:count], with commas between"}.get(name, _KINDS.get(form, form))
        raise ValueError(f"{name} must be {example}, got {text!r}") from None
    raise ValueError(f"{name} cannot be given as text ({kind}): call mergetune.merging from Python")


_READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
    "Sequence[float]": lambda text: [float(number) for number in text.split(",")],
    "Sequence[str]": lambda text: text.split(","),
    "Sequence[StateDict]": lambda text: [TensorFile(file) for file in text.split(",")],
    "Mapping[str, float | Sequence[float]]": lambda text: {
        option: [float(x) for x in values.split(":")] if ":" in values else float(values)
        for option, values in (item.split(":", 1) for item in text.split(","))
    },
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "Sequence[float]": "numbers with commas between",
    "Sequence[StateDict]": "safetensors files with commas between",
    "Mapping[str, float | Sequence[float]]": "name:value[:value ...], with commas between",
}


# -- files ------------------------------------------------------------------------------------------------------------


def merge_files(
    method: str, base: str | Path | None, experts: Sequence[str | Path], out: str | Path, options: Mapping[str, Any]
) -> None:
    """Merge safetensors files into one: streamed where the method works tensor by tensor, else in memory.

    Args:
        method: a name of the catalogue.
        base: a file, or "zeros" or "ones" for experts that are differences already, as LoRA's and IA3's are; or None.
        experts, out, options: files, and the method's options.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the method needs images and a model, or refuses these files.
    """
    method = find(method)
    if needed := _missing(method, options):
        images = "images and a model, which files of tensors do not have: merge solutions, with --cache"
        why = f"-o {needed[0]}=..." if _options(method)[needed[0]].annotation in _READERS else images
        raise ValueError(f"{method} needs {why} ({_entry(method).needs})")
    function = METHODS[method]
    if hasattr(function, "plan"):
        merging.merge_files(function, {"zeros": 0.0, "ones": 1.0}.get(base, base), experts, out, **options)
        return
    merged = function(None if base is None else TensorFile(base), [TensorFile(file) for file in experts], **options)
    write_atomically(Path(out), serialize({name: tensor.contiguous() for name, tensor in merged.items()}))


# -- solutions --------------------------------------------------------------------------------------------------------


def state_of(solution: Solution) -> dict[str, Tensor]:
    """What is merged: ``ctx``, or ``weight`` and ``bias``."""
    if isinstance(solution, Prompt):
        return {"ctx": solution.ctx}
    return {"weight": solution.weight} | ({} if solution.bias is None else {"bias": solution.bias})


def needs_base(method: str, experts: int, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a method needs the zero-shot solution beside so many experts."""
    inner = METHODS[find(method)]
    if find(method) == "evolve":
        inner = (options or {}).get("method", merging.task_arithmetic)
    return bool(inner.base) or (inner.base is None and experts < 2)


def data_of(method: str) -> str:
    """What data a method is given for solutions: "none", "images without labels" or "labelled images"."""
    found = [_FROM_IMAGES[option] for option in _options(find(method)) if option in _FROM_IMAGES]
    return found[0] if found else "none"


def merge_solutions(
    method: str,
    experts: Sequence[Solution],
    *,
    base: Solution | None = None,
    clip: FrozenClip | None = None,
    features: FeatureCache | None = None,
    options: Mapping[str, Any] | None = None,
) -> Solution:
    """Merge prompts, shared or class-specific, or heads.

    Args:
        method: a name of the catalogue.
        experts: solutions of one kind and shape; heads are brought to the logit scale of the first.
        base: the zero-shot solution; may be None for methods that do not need it. Where an average is given one, it is
            averaged too, as the first (``AVERAGES``).
        clip, features: for methods that need data: cached image features and their CLIP. Fisher diagonals and second
            moments are expected squared gradients over them; AdaMerging and Expert Merging learn on them without their
            labels; ``metrics_average`` takes its losses, ``evolve`` and ``natural_niches`` the labels that they score.
            Never those that a figure is reported on.
        options: of the method. ``evolve`` without options searches one coefficient for each expert in [0, 1].

    Returns:
        A solution like the first expert; its notes say how it was made.

    Raises:
        TypeError, ValueError: solutions that do not go together; a method that is not meaningful for them, with the
            reason; data that is missing.
    """
    method, options = find(method), dict(options or {})
    if not experts:
        raise ValueError("experts must hold at least one solution, got none")
    first = experts[0]
    solutions = [s.rescaled(first.logit_scale) if isinstance(s, Head) and isinstance(first, Head) else s
                 for s in [*experts, *([] if base is None else [base])]]  # fmt: skip
    for other in solutions[1:]:
        check_compatible(first, other)
        check_same_text(first, other)
    if base is None and needs_base(method, len(experts), options):
        raise ValueError(f"{method} of {len(experts)} expert(s) needs a base, the zero-shot solution, got None")
    states = [state_of(solution) for solution in solutions]
    start, states = (states[-1], states[:-1]) if base is not None else (None, states)
    if start is not None and method in AVERAGES:
        start, states = None, [start, *states]
    given = {name: value for name, value in options.items() if not callable(value)}
    notes = {
        "merged": method,
        "options": {name: v if isinstance(v, int | float | str | list | None) else str(v) for name, v in given.items()},
        "base": None if base is None else base.notes or getattr(base, "template", "zero-shot"),
        "experts": [expert.notes for expert in experts],
        "data": data_of(method),
    }
    if method == "compeft":
        density = {name: options[name] for name in ("density",) if name in options}
        notes["size"] = asdict(merging.compeft_size(start, states, **density))
    options |= _from_images(method, options, first, states, clip, features)
    if missing := _missing(method, options):
        raise ValueError(f"{method} needs the option {missing[0]!r} ({_entry(method).needs})")
    merged = METHODS[method](start, states, **options)
    parameter = merged["ctx"] if isinstance(first, Prompt) else _joined(merged)
    return first.with_parameter(parameter, notes=notes)


def _joined(state: StateDict) -> Tensor:
    """A head's parameter from its weight and bias."""
    return torch.cat([state["weight"], state["bias"][:, None]], 1) if "bias" in state else state["weight"]


def _from_images(
    method: str,
    options: Mapping[str, Any],
    like: Solution,
    experts: Sequence[StateDict],
    clip: FrozenClip | None,
    features: FeatureCache | None,
) -> dict[str, Any]:
    """The options that are computed from cached features."""
    wanted = [name for name in _options(method) if name in _FROM_IMAGES and name not in options]
    if not wanted:
        return {}
    if clip is None or features is None:
        raise ValueError(f"{method} needs cached image features and their CLIP ({_entry(method).needs}): give --cache")
    weights = _class_weights(like, clip, features.classnames)
    scale, found = like.scale(clip), {}
    x = features.tensor().to(clip.device)

    def predict(state: StateDict, x: Tensor, k: int = 0) -> Tensor:
        classes = weights(state)
        return scale * inputs(x, classes) @ classes.T

    if method == "evolve":
        found["score"] = lambda state: accuracy(weights(state).detach(), features).accuracy
        if "space" not in options and options.get("method") in (None, merging.task_arithmetic):
            found |= {"space": {"weights": (0.0, 1.0, len(experts))}, "fixed": {"scale": 1.0}}
    elif method == "natural_niches":
        labels = features.labels.to(x.device)
        found["score"] = lambda state: predict(state, x).argmax(1).eq(labels).double()
    elif "metrics" in wanted:
        losses = [cross_entropy(weights(state).detach(), features, scale=scale) for state in experts]
        found["metrics"] = losses
    elif "predict" in wanted:
        found |= {"predict": predict, "data": [x] * len(experts)}
    else:
        found[wanted[0]] = [_fisher(like, state, clip, features) for state in experts]
    return found


def _class_weights(like: Solution, clip: FrozenClip, classnames: Sequence[str]) -> Callable[[StateDict], Tensor]:
    """State dict -> class weights [C, D], or [C, D + 1], differentiable."""
    if isinstance(like, Head):
        like.class_weights(clip, classnames)  # for its checks
        if tuple(classnames) != like.classnames:
            raise ValueError(f"features must have the head's {len(like.classnames)} classes, got {len(classnames)}")
        return lambda state: _joined(state).to(clip.device)
    encode = like.encoder(clip, classnames)
    last: list[Any] = [None, None]  # AdaMerging asks for the same weights once for each expert

    def weights(state: StateDict) -> Tensor:
        if state["ctx"] is not last[0]:
            last[:] = state["ctx"], F.normalize(encode(state["ctx"].to(clip.device)[None])[0], dim=-1)
        return last[1]

    return weights


def _fisher(like: Solution, state: StateDict, clip: FrozenClip, features: FeatureCache) -> dict[str, Tensor]:
    """Diagonal Fisher information of a solution's parameters on unlabelled features.

    A mean over images in either case, so that experts keep their scales. Heads: :func:`mergetune.fisher_diagonal`.
    Prompts: squared gradients of log p(y | x), with y drawn from p, at up to ``FISHER_IMAGES`` images; each image has a
    copy of the context vectors in one call of the text tower.
    """
    if isinstance(like, Head):
        made = {"scale": like.logit_scale, "normalize": False, "unit_mean": False}
        found = fisher_diagonal(features, _joined(state).to(clip.device), **made).cpu()
        return {"weight": found[:, : features.dim], **({"bias": found[:, -1]} if "bias" in state else {})}
    encode, generator = like.encoder(clip, features.classnames), torch.Generator().manual_seed(0)
    total = torch.zeros_like(state["ctx"])
    chosen = torch.randperm(len(features), generator=generator)[:FISHER_IMAGES]
    for index in chosen.split(32):
        copies = state["ctx"].to(clip.device).expand(len(index), *total.shape).clone().requires_grad_()
        x = features.rows(index).to(clip.device)
        with torch.enable_grad():
            logits = clip.logit_scale * torch.einsum("bd,bcd->bc", x, F.normalize(encode(copies), dim=-1))
            drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(x.device)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), copies)
        total += gradient.square().sum(0).to(total)
    return {"ctx": total / len(chosen)}
