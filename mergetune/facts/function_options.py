"""The options of tune, fit, cache_features and compare as data. Needs no torch.

One dataclass for each function: names, defaults, kinds of value, help, choices, and whether a value is recorded with
the result. The commands are generated from them, resumed runs are compared by them, and a test holds the functions'
keyword arguments to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mergetune.facts.option_kinds import Option

if TYPE_CHECKING:
    from collections.abc import Sequence

Solution = Any  # a prompt or a head: facts stand below them

TUNE_METHODS = {"coop": "CoOp", "kgcoop": "KgCoOp", "head": "linear head"}  # of stage 1, and their titles
POSITIONS = ("end", "middle", "front")  # of the class name in a prompt
PATH_GRIDS = ("even", "official", "random")
SURROGATES = ("identity", "fisher", "cosine", "l2")
SPACES = ("embedding", "parameter")
MAX_PIXELS = 1 << 26  # 8192 x 8192, more than today's cameras take; decoding needs about 8 bytes per pixel
BETA = 0.5  # of fit
CACHE_DTYPES = ("float32", "bfloat16", "float16")
MERGETUNE_GRID = {"lam": (8.0, 4.0, 16.0), "tau": (0.3, 0.6)}  # tried by compare, the defaults first


def _option(kind: str, default: Any, help: str, *, recorded: bool = True, **more: Any) -> Any:
    """A field: see :class:`mergetune.facts.Option`; ``recorded``: whether results depend on it, beyond rounding."""
    metadata = {"option": Option("", kind, default, help, **more), "recorded": recorded}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(options: type) -> tuple[Option, ...]:
    """The options of a dataclass of this file."""
    return tuple(replace(f.metadata["option"], name=f.name) for f in fields(options))


def recorded(options: Any, **resolved: Any) -> dict[str, Any]:
    """The values that are recorded with a result, and compared when a run is resumed.

    Args:
        options: an instance of a dataclass of this file.
        resolved: what is recorded instead of the values given: what "auto" or None stand for.
    """
    names = [f.name for f in fields(options) if f.metadata["recorded"]]
    if unknown := resolved.keys() - set(names):
        raise ValueError(f"resolved must hold recorded options, got {', '.join(sorted(unknown))}")
    return {name: resolved.get(name, getattr(options, name)) for name in names}


_precision = partial(
    _option, "str", "auto", "Precision of the text tower; auto is the faster one on this machine.",
    choices=("auto", "float32", "bfloat16"),
)  # fmt: skip
_epochs = partial(_option, "int", 50, "Passes over the training images.")
_lr = partial(_option, "float", 2e-3, "Learning rate of SGD.")
_momentum = partial(_option, "float", 0.9, "Momentum of SGD.")
_weight_decay = partial(_option, "float", 5e-4, "Weight decay of SGD.")
_warmup_epochs = partial(_option, "int", 1, "Epochs at the warm-up learning rate, before the cosine.")
_warmup_lr = partial(_option, "float", 1e-5, "Learning rate of the warm-up.")
_backend = partial(
    _option, "str", None, "Implementation of the loss: cpp, triton, cuda, compile or torch; none chooses.",
    none=True, recorded=False,
)  # fmt: skip
_cuda_graph = partial(_option, "bool", False, "On a GPU: capture one step and replay it.", recorded=False)


@dataclass(frozen=True, eq=False)
class TuneOptions:
    """The options of :func:`mergetune.tune`."""

    method: str = _option("str", "coop", "coop, kgcoop or head.", choices=tuple(TUNE_METHODS))
    template: str = _option("str", "a photo of a {}.", "Text with {} whose words the context starts from.")
    n_ctx: int | None = _option("int", None, "Random start with so many context tokens.", none=True, least=1)
    class_specific: bool = _option("bool", False, "Train context vectors of every class by themselves.")
    position: str = _option("str", "end", "Place of the class name: end, middle or front.", choices=POSITIONS)
    zero_shot: str | Sequence[str] | None = _option(
        "strs", None, "Templates that KgCoOp stays near and a head starts from; the template if not given.", none=True
    )
    kg_weight: float = _option("float", 8.0, "Weight of KgCoOp's distance to zero-shot.")
    precision: str = _precision()
    epochs: int = _epochs()
    batch_size: int = _option("int", 32, "Images per step.")
    lr: float = _lr()
    momentum: float = _momentum()
    weight_decay: float = _weight_decay()
    warmup_epochs: int = _warmup_epochs()
    warmup_lr: float = _warmup_lr()
    seed: int = _option("int", 1, "Seed of the random start and the order of the batches.")
    backend: str | None = _backend()
    cuda_graph: bool = _cuda_graph()


@dataclass(frozen=True, eq=False)
class FitOptions:
    """The options of :func:`mergetune.fit`."""

    zero_shot: str | Sequence[str] | Solution | None = _option(
        "strs", None, "Zero-shot text with {}; several are ensembled.", none=True
    )
    lam: float = _option("float", 8.0, "Weight of the zero-shot surrogate.")
    beta: float | Sequence[float] = _option(
        "float or floats", BETA, "Weight of the path to the fine-tuned solution; several for several of them."
    )
    tau: float = _option("float", 0.3, "Start: 0 at zero-shot, 1 at the fine-tuned solution.")
    points: int = _option("int", 5, "Points on each path.")
    grid: str | Sequence[float] = _option(
        "str or floats", "even", "even, official or random; or the points themselves, with commas between."
    )
    surrogate: str = _option("str", "identity", "identity, fisher, cosine or l2.", choices=SURROGATES)
    space: str = _option("str", "embedding", "embedding or parameter.", choices=SPACES)
    precision: str = _precision()
    epochs: int = _epochs()
    batch_size: int = _option("int", 128, "Images per step.")
    lr: float = _lr()
    momentum: float = _momentum()
    weight_decay: float = _weight_decay()
    warmup_epochs: int = _warmup_epochs()
    warmup_lr: float = _warmup_lr()
    seed: int = _option("int", 1, "Seed of the order of the batches, the views and the random grid.")
    backend: str | None = _backend()
    cuda_graph: bool = _cuda_graph()


@dataclass(frozen=True, eq=False)
class CacheOptions:
    """The options of :func:`mergetune.cache_features`. Recorded is what a cache is refused for."""

    dtype: str = _option("str", "float32", "float32, bfloat16 or float16.", choices=CACHE_DTYPES)
    views: int = _option("int", 1, "Views of each image; all but the first are augmented.")
    seed: int = _option("int", 0, "Seed of the augmented views.")
    batch_size: int = _option("int", 64, "Images per call of the image tower.", least=1, recorded=False)
    shard_size: int | None = _option(
        "int", None, "Images per file, the most that a kill can lose; 1,024 or more if not given.",
        none=True, least=1, recorded=False,
    )  # fmt: skip
    workers: int = _option("int", 0, "Processes that decode images.", least=0, recorded=False)
    max_pixels: int = _option(
        "int", MAX_PIXELS, "Largest width times height of an image that is decoded.", least=1, recorded=False
    )
    on_error: str = _option(
        "str", "raise", "An unreadable image stops the build (raise) or is left out (skip).",
        choices=("raise", "skip"), recorded=False,
    )  # fmt: skip
    overwrite: bool = _option("bool", False, "Rebuild a cache of other images or another model.", recorded=False)


@dataclass(frozen=True)
class CompareOptions:
    """What all cells of :func:`mergetune.experiments.compare` share.

    Attributes:
        experts: "coop:1", "kgcoop:1", "head:1": a method of :func:`mergetune.tune` and which of its trainings (each has
            its own order of batches; all have the cell's images). Or solutions, by name, for a single cell.
        shots: images a class; None is all.
        tune, fit: more keyword arguments of :func:`mergetune.tune` and :func:`mergetune.fit`.
        grid: hyper-parameters that are tried for MERGETUNE.
        choose: on each cell's own "validation" images, or on those of the "others": the other datasets' cells.
    """

    experts: tuple[str, ...] | Mapping[str, Solution] = _option(
        "strs", ("coop:1",), "coop:1, coop:2, kgcoop:1, head:1 are trained; or saved solutions."
    )
    shots: int | None = _option("int", 16, "Images per class.", none=True, least=1)
    tune: dict[str, Any] = _option("object", {}, "More options of mergetune.tune.")
    fit: dict[str, Any] = _option("object", {}, "More options of mergetune.fit.")
    grid: dict[str, tuple] = _option("object", MERGETUNE_GRID, "Values of fit's options that are tried for MERGETUNE.")
    choose: str = _option(
        "str", "validation", "Choose hyper-parameters on the cell's validation images, or on the others' ones.",
        choices=("validation", "others"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.choose not in ("validation", "others"):
            raise ValueError(f"choose must be validation or others, got {self.choose!r}")
        if not self.experts:
            raise ValueError("experts must hold at least one, got none")
        if isinstance(self.experts, Mapping):
            return
        for expert in self.experts:
            method, _, number = expert.partition(":")
            if method not in TUNE_METHODS or not number.isdigit() or not int(number):
                raise ValueError(f"experts must be like coop:1, of {', '.join(TUNE_METHODS)}, got {expert!r}")
        if len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts must not repeat, got {', '.join(self.experts)}")
