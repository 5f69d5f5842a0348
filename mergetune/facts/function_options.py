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
TOP_METHODS = {"residual": "residual", "map": "map"}  # put on a solution, and their titles in "CoOp + residual"
OPTIMIZERS = ("sgd", "adam")
COOP_SETTINGS: Mapping[str, Any] = {
    "epochs": 50, "batch_size": 32, "lr": 2e-3, "momentum": 0.9, "weight_decay": 5e-4, "warmup_epochs": 1,
    "warmup_lr": 1e-5, "optimizer": "sgd", "lam": None,
}  # fmt: skip
TUNE_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(TUNE_METHODS, COOP_SETTINGS),
    **{
        method: COOP_SETTINGS | {
            "epochs": 300, "batch_size": None, "lr": 1e-3, "weight_decay": 0.0, "warmup_epochs": 0, "optimizer": "adam",
            "lam": lam,
        }
        for method, lam in (("residual", 8.0), ("map", 0.5))
    },
}  # fmt: skip
"""The settings of each method of tune where an option is None. batch_size None: all images in each step."""
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
_backend = partial(
    _option, "str", None, "Implementation of the loss: cpp, triton, cuda, compile or torch; none chooses.",
    none=True, recorded=False,
)  # fmt: skip
_cuda_graph = partial(_option, "bool", False, "On a GPU: capture one step and replay it.", recorded=False)


@dataclass(frozen=True, eq=False)
class TuneOptions:
    """The options of :func:`mergetune.tune`."""

    method: str = _option(
        "str", "coop", "coop, kgcoop or head; or residual or map, which are put on a base.",
        choices=(*TUNE_METHODS, *TOP_METHODS),
    )  # fmt: skip
    template: str = _option("str", "a photo of a {}.", "Text with {} whose words the context starts from.")
    n_ctx: int | None = _option("int", None, "Random start with so many context tokens.", none=True, least=1)
    class_specific: bool = _option("bool", False, "Train context vectors of every class by themselves.")
    position: str = _option("str", "end", "Place of the class name: end, middle or front.", choices=POSITIONS)
    zero_shot: str | Sequence[str] | None = _option(
        "strs", None, "Templates that KgCoOp stays near and a head starts from; the template if not given.", none=True
    )
    kg_weight: float = _option("float", 8.0, "Weight of KgCoOp's distance to zero-shot.")
    lam: float | None = _option(
        "float", None, "Weight of the distance to the base: 8 for a residual, 0.5 for a map if not given.", none=True
    )
    precision: str = _precision()
    epochs: int | None = _option(
        "int", None, "Passes over the training images; 50, for a residual or a map 300, if not given.", none=True
    )
    batch_size: int | None = _option(
        "int", None, "Images per step; 32, for a residual or a map all, if not given.", none=True
    )
    lr: float | None = _option(
        "float", None, "Learning rate; 0.002, for a residual or a map 0.001, if not given.", none=True
    )
    optimizer: str | None = _option(
        "str", None, "sgd or adam; sgd, for a residual or a map adam, if not given.", none=True
    )
    momentum: float | None = _option("float", None, "Momentum of SGD; 0.9 if not given.", none=True)
    weight_decay: float | None = _option(
        "float", None, "Weight decay; 0.0005, for a residual or a map 0, if not given.", none=True
    )
    warmup_epochs: int | None = _option(
        "int", None, "Epochs at the warm-up learning rate; 1, for a residual or a map 0, if not given.", none=True
    )
    warmup_lr: float | None = _option("float", None, "Learning rate of the warm-up; 0.00001 if not given.", none=True)
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
    epochs: int = _option("int", 50, "Passes over the training images.")
    batch_size: int = _option("int", 128, "Images per step.")
    lr: float = _option("float", 2e-3, "Learning rate.")
    optimizer: str = _option("str", "sgd", "sgd or adam.", choices=OPTIMIZERS)
    momentum: float = _option("float", 0.9, "Momentum of SGD.")
    weight_decay: float = _option("float", 5e-4, "Weight decay.")
    warmup_epochs: int = _option("int", 1, "Epochs at the warm-up learning rate, before the cosine.")
    warmup_lr: float = _option("float", 1e-5, "Learning rate of the warm-up.")
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
