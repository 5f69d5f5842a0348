"""The options of tune, fit, cache_features and compare as data. Needs no torch.

Each function has one dataclass with names, defaults, kinds of value, help, choices, and whether a value is recorded
with the result. The commands are generated from these dataclasses, and a resumed run compares its recorded values. A
test checks that the functions have the same keyword arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mergetune.facts.option_kinds import Option

if TYPE_CHECKING:
    from collections.abc import Sequence

Solution = Any  # a prompt or a head; this file must not import the room of solutions

TUNE_METHODS = {"coop": "CoOp", "kgcoop": "KgCoOp", "head": "linear head"}  # methods of stage 1 -> titles
TOP_METHODS = {"residual": "residual", "map": "map"}  # put on a solution, and their titles in "CoOp + residual"
PROMPT_METHODS = ("coop", "kgcoop")  # methods that train a prompt
TOWER_METHODS = {"lora": "LoRA"}  # methods that change weights of the towers, trained on pixels, and their titles
OPTIMIZERS = ("sgd", "adam", "adamw")
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
    "lora": COOP_SETTINGS | {
        "epochs": None, "lr": 2e-4, "weight_decay": 1e-2, "warmup_epochs": 0, "optimizer": "adamw",
    },
}  # fmt: skip
"""The settings of each method of tune where an option is None. batch_size None: all images in each step. epochs None:
as many as ``LORA_STEPS`` needs. LoRA's are those of CLIP-LoRA (github.com/MaxZanella/CLIP-LoRA: run_utils.py, lora.py).
"""
LORA_STEPS = 500  # training steps per shot, that is per mean number of training images of a class
PATH_SETTINGS: Mapping[bool, dict[str, Any]] = {
    False: {"space": "embedding", "grid": "even", "points": 5},
    True: {"space": "parameter", "grid": "random", "points": 1},
}
"""The settings of fit's paths where an option is None; True: for solutions that change weights of the towers. One
random point per step is an unbiased estimate of the path loss, for one more pass through the towers."""
POSITIONS = ("end", "middle", "front")  # places of the class name in a prompt
PATH_GRIDS = ("even", "official", "random")
SURROGATES = ("identity", "fisher", "cosine", "l2")
SPACES = ("embedding", "parameter")
ACTIVATIONS = ("softmax", "sigmoid")  # how a predictor turns logits into probabilities
MAX_PIXELS = 1 << 26  # 8192 x 8192, more than today's cameras take; decoding needs about 8 bytes per pixel
BACKGROUND = "white"  # under transparent pixels
TABLE_PRECISION = "float32"  # of tables: they must not depend on what a machine is fastest at
BETA = 0.5  # default of fit
CACHE_DTYPES = ("float32", "bfloat16", "float16")
FIT_METHODS = (*TUNE_METHODS, "auto")  # of stage 1 in fit_dataset; "auto" also chooses the kind of solution
CHOICE_GRID = ((8.0, 0.3), (4.0, 0.3), (16.0, 0.3), (8.0, 0.6), (4.0, 0.6), (1.0, 1.0))
"""Pairs (lam, tau) that fit_dataset chooses from; fit's defaults come first."""
MERGETUNE_GRID = {"lam": (8.0, 4.0, 16.0), "tau": (0.3, 0.6)}  # values that compare tries; fit's defaults come first


def _option(kind: str, default: Any, help: str, *, recorded: bool | str = True, **more: Any) -> Any:
    """Returns a dataclass field with an option, see :class:`mergetune.facts.Option`.

    Args:
        kind, default, help, more: fields of the option.
        recorded: whether results depend on the value beyond rounding; such values are recorded with a result. "changed"
            records no default: an option that came later than the records of others.
    """
    metadata = {"option": Option("", kind, default, help, **more), "recorded": recorded}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(options: type) -> tuple[Option, ...]:
    """Returns the options of a dataclass of this file, in the order of its fields."""
    return tuple(replace(f.metadata["option"], name=f.name) for f in fields(options))


def check_types(options: Any) -> None:
    """Checks that the numbers and flags in an instance of a dataclass of this file are no values of another type.

    Raises:
        TypeError: a value is not of the option's kind; the message names the option.
    """
    for option in options_of(type(options)):
        option.check(getattr(options, option.name))


def check_method(options: Any) -> None:
    """Checks that options which the method in ``options`` does not use have their defaults.

    Raises:
        ValueError: another value was given; the message names the option and the methods that use it.
    """
    for option in options_of(type(options)):
        value = getattr(options, option.name)
        given = tuple(value) if isinstance(value, list) else value
        if option.methods and options.method not in option.methods and given != option.default:
            raise ValueError(
                f"{option.name} must be left out for method {options.method!r}, which does not use it, got {value!r}: "
                f"it is for {' and '.join(option.methods)}"
            )


def used_by(method: str, options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the given values without those of options that a method does not use."""
    methods = {option.name: option.methods for option in options_of(options)}
    return {name: value for name, value in given.items() if not methods.get(name) or method in methods[name]}


def recorded(options: Any, **resolved: Any) -> dict[str, Any]:
    """Returns the values that are recorded with a result and compared when a run is resumed.

    Args:
        options: an instance of a dataclass of this file.
        resolved: values that replace those of ``options``, for example the precision that "auto" chose.

    Raises:
        ValueError: ``resolved`` names an option that is not recorded.
    """
    when = {f.name: f.metadata["recorded"] for f in fields(options) if f.metadata["recorded"]}
    if unknown := resolved.keys() - when.keys():
        raise ValueError(f"resolved must hold recorded options, got {', '.join(sorted(unknown))}")
    found = {name: resolved.get(name, getattr(options, name)) for name in when}
    defaults = {f.name: f.metadata["option"].default for f in fields(options)}
    return {name: value for name, value in found.items() if when[name] != "changed" or value != defaults[name]}


_precision = partial(
    _option, "str", "auto", "Precision in which the text tower computes: float32, bfloat16 or auto (the faster).",
    choices=("auto", "float32", "bfloat16"),
)  # fmt: skip
_backend = partial(
    _option, "str", None, "Implementation of the loss: cpp, triton, cuda, compile or torch. Default: chosen by device.",
    none=True, recorded=False,
)  # fmt: skip
_cuda_graph = partial(
    _option, "bool", False, "On a GPU: record one training step as a CUDA graph and replay it.", recorded=False
)


@dataclass(frozen=True, eq=False)
class TuneOptions:
    """The options of :func:`mergetune.tune`."""

    method: str = _option(
        "str", "coop",
        "Method of stage 1: coop, kgcoop or head; residual or map, which are put on a base; or lora, on pixels.",
        choices=(*TUNE_METHODS, *TOP_METHODS, *TOWER_METHODS),
    )  # fmt: skip
    template: str = _option(
        "str", "a photo of a {}.", "Template whose words initialise the context; {} stands for the class name."
    )
    n_ctx: int | None = _option(
        "int", None, "Number of context tokens of a random start, instead of the template's words.", none=True, least=1,
        methods=PROMPT_METHODS,
    )  # fmt: skip
    class_specific: bool = _option(
        "bool", False, "Train separate context vectors for every class.", methods=PROMPT_METHODS
    )
    position: str = _option(
        "str", "end", "Place of the class name in the prompt: end, middle or front.", choices=POSITIONS,
        methods=PROMPT_METHODS,
    )  # fmt: skip
    zero_shot: str | Sequence[str] | Solution | None = _option(
        "strs", None, "Zero-shot templates, or one saved zero-shot solution, that KgCoOp stays near and a head starts "
        "from. Default: the template.", none=True,
    )  # fmt: skip
    kg_weight: float = _option(
        "float", 8.0, "Weight of KgCoOp's distance to the zero-shot class embeddings.", methods=("kgcoop",)
    )
    lam: float | None = _option(
        "float", None, "Weight of the distance to the base. Default: 8 for a residual, 0.5 for a map.", none=True,
        methods=tuple(TOP_METHODS),
    )  # fmt: skip
    rank: int = _option("int", 2, "Rank of a LoRA.", least=1, methods=("lora",))
    alpha: float = _option("float", 1.0, "Scale of a LoRA, times the root of its rank.", methods=("lora",))
    parts: str | Sequence[str] = _option(
        "strs",
        ("q", "k", "v"),
        "Adapted parts of a block: some of q, k, v, qkv, out, fc and proj.",
        methods=("lora",),
    )
    tower: str = _option(
        "str", "both", "Adapted tower: text, image or both.", choices=("text", "image", "both"), methods=("lora",)
    )
    last_blocks: int | None = _option(
        "int", None, "Number of adapted blocks of a tower, the last ones. Default: all.", none=True, least=1,
        methods=("lora",),
    )  # fmt: skip
    precision: str = _precision()
    epochs: int | None = _option(
        "int", None,
        "Passes over the training images. Default: 50; 300 for a residual or a map; 500 steps per shot for LoRA.",
        none=True,
    )  # fmt: skip
    batch_size: int | None = _option(
        "int", None, "Images per step. Default: 32; all images for a residual or a map.", none=True
    )
    lr: float | None = _option(
        "float", None, "Learning rate. Default: 0.002; 0.001 for a residual or a map; 0.0002 for LoRA.", none=True
    )
    optimizer: str | None = _option(
        "str", None, "Optimiser: sgd, adam or adamw. Default: sgd; adam for a residual or a map; adamw for LoRA.",
        none=True,
    )  # fmt: skip
    momentum: float | None = _option("float", None, "Momentum of SGD. Default: 0.9.", none=True)
    weight_decay: float | None = _option(
        "float", None, "Weight decay. Default: 0.0005; 0 for a residual or a map; 0.01 for LoRA.", none=True
    )
    warmup_epochs: int | None = _option(
        "int", None, "Epochs at the warm-up learning rate. Default: 1; 0 for a residual, a map or LoRA.", none=True
    )
    warmup_lr: float | None = _option("float", None, "Learning rate of the warm-up. Default: 0.00001.", none=True)
    seed: int = _option("int", 1, "Seed of the random start and of the batch order.")
    backend: str | None = _backend()
    cuda_graph: bool = _cuda_graph()


@dataclass(frozen=True, eq=False)
class FitOptions:
    """The options of :func:`mergetune.fit`."""

    zero_shot: str | Sequence[str] | Solution | None = _option(
        "strs", None, "Zero-shot template; {} stands for the class name. Several are averaged.", none=True
    )
    lam: float = _option(
        "float", 8.0,
        "Weight of the surrogate loss that keeps the solution near zero-shot; of a head in the unit of its loss.",
    )  # fmt: skip
    beta: float | Sequence[float] = _option(
        "float or floats", BETA, "Weight of the path to the fine-tuned solution; one for all, or one per solution."
    )
    tau: float = _option("float", 0.3, "Where training starts: 0 is zero-shot, 1 is the fine-tuned solution.")
    points: int | None = _option("int", None, "Number of points on each path. Default: 5; 1 for LoRA.", none=True)
    grid: str | Sequence[float] | None = _option(
        "str or floats", None,
        "Points on each path: even, official or random; or the points in [0, 1] with commas between. Default: even; "
        "random for LoRA.",
        none=True,
    )  # fmt: skip
    surrogate: str = _option(
        "str", "identity", "Surrogate of the zero-shot path: identity, fisher, cosine or l2.", choices=SURROGATES
    )
    space: str | None = _option(
        "str", None,
        "What paths interpolate: class embeddings (embedding) or trained parameters (parameter). Default: embedding; "
        "parameter for LoRA.",
        none=True, choices=SPACES,
    )  # fmt: skip
    weight_ensemble: bool = _option(
        "bool", False, "Average the result with the zero-shot solution, half and half (the paper's MT + WE).",
        recorded="changed",
    )  # fmt: skip
    precision: str = _precision()
    epochs: int = _option("int", 50, "Passes over the training images.")
    batch_size: int = _option("int", 128, "Images per step.")
    lr: float = _option("float", 2e-3, "Learning rate.")
    optimizer: str = _option("str", "sgd", "Optimiser: sgd, adam or adamw.", choices=OPTIMIZERS)
    momentum: float = _option("float", 0.9, "Momentum of SGD.")
    weight_decay: float = _option("float", 5e-4, "Weight decay.")
    warmup_epochs: int = _option("int", 1, "Epochs at the warm-up learning rate, before the cosine schedule.")
    warmup_lr: float = _option("float", 1e-5, "Learning rate of the warm-up.")
    seed: int = _option("int", 1, "Seed of the batch order, of the choice of views and of the random grid.")
    backend: str | None = _backend()
    cuda_graph: bool = _cuda_graph()


@dataclass(frozen=True, eq=False)
class CacheOptions:
    """The options of :func:`mergetune.cache_features`.

    An existing cache is used again only if its recorded options are equal.
    """

    dtype: str = _option("str", "float32", "Type of the features: float32, bfloat16 or float16.", choices=CACHE_DTYPES)
    views: int = _option("int", 1, "Number of views of each training image; all but the first are augmented.")
    seed: int = _option("int", 0, "Seed of the augmented views.")
    batch_size: int = _option("int", 64, "Images per call of the image tower.", least=1, recorded=False)
    shard_size: int | None = _option(
        "int", None, "Images per block; an interrupted build loses at most one block. Default: 1,024.",
        none=True, least=1, recorded=False,
    )  # fmt: skip
    workers: int = _option(
        "int", 0, "Number of processes that decode images; 0 decodes in the main process.", least=0, recorded=False
    )
    max_pixels: int = _option(
        "int", MAX_PIXELS, "Largest allowed width times height of an image.", least=1, recorded=False
    )
    background: str = _option("str", BACKGROUND, "Colour under transparent pixels: a name such as black, or #rrggbb.")
    on_error: str = _option(
        "str", "raise", "What an unreadable image does: raise stops the build, skip leaves the image out.",
        choices=("raise", "skip"), recorded=False,
    )  # fmt: skip
    overwrite: bool = _option(
        "bool", False, "Replace an existing cache of other images, options or another model.", recorded=False
    )
    verify: bool = _option(
        "bool", False, "Compare the checksums of an existing cache, whatever the state of its file.", recorded=False
    )


@dataclass(frozen=True)
class CompareOptions:
    """The settings that all cells of :func:`mergetune.experiments.compare` share.

    Attributes:
        experts: texts "METHOD:NUMBER" such as "coop:1" or "head:1": a method of :func:`mergetune.tune` and the number
            of a training run. Runs with different numbers have the same images in different batch orders. For a
            single cell also a mapping of names to solutions.
        shots: training images per class; None uses all images.
        tune, fit: more keyword arguments of :func:`mergetune.tune` and :func:`mergetune.fit`.
        grid: name of an option of fit -> values that are tried for MERGETUNE.
        choose: images on which hyper-parameters are chosen: "validation" uses the validation images of the same cell,
            "others" those of the cells of all other datasets.
        select: classes whose validation images count. "base": the trained classes, so that no label of a novel class is
            used before the test, as the base-to-novel protocol has it. "both": the harmonic mean over base and novel
            classes; novel classes then are new to the training, but not to the choice.
    """

    experts: tuple[str, ...] | Mapping[str, Solution] = _option(
        "strs", ("coop:1",), "Solutions to merge: METHOD:NUMBER trains one (coop:1, head:1); or saved solutions."
    )
    shots: int | None = _option("int", 16, "Images per class.", none=True, least=1)
    tune: dict[str, Any] = _option("object", {}, "More options of mergetune.tune.")
    fit: dict[str, Any] = _option("object", {}, "More options of mergetune.fit.")
    grid: dict[str, tuple] = _option("object", MERGETUNE_GRID, "Values of fit's options to try for MERGETUNE.")
    choose: str = _option(
        "str", "validation",
        "Validation images on which hyper-parameters are chosen: the cell's (validation), or other datasets' (others).",
        choices=("validation", "others"),
    )  # fmt: skip
    select: str = _option(
        "str", "base",
        "Classes on whose validation images hyper-parameters are chosen: base, the trained ones; or both halves.",
        choices=("base", "both"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for option in options_of(CompareOptions):
            value = getattr(self, option.name)
            if option.choices and value not in option.choices:
                raise ValueError(f"{option.name} must be {' or '.join(option.choices)}, got {value!r}")
        if self.fit.get("weight_ensemble"):
            raise ValueError("fit must not hold weight_ensemble: the rows 'MERGETUNE + WE' have it")
        if not self.experts:
            raise ValueError("experts must hold at least one expert, got none")
        if isinstance(self.experts, Mapping):
            if len({solution.kind for solution in self.experts.values()}) > 1:
                kinds = ", ".join(f"{name} ({solution.kind})" for name, solution in self.experts.items())
                raise ValueError(f"experts must be of one kind, got {kinds}: compare each kind in a run of its own")
            return
        for expert in self.experts:
            method, _, number = expert.partition(":")
            if method not in TUNE_METHODS or not number.isdigit() or not int(number):
                methods = ", ".join(TUNE_METHODS)
                raise ValueError(f"experts must be like coop:1, a method ({methods}) and a number, got {expert!r}")
        if len({expert.partition(":")[0] in PROMPT_METHODS for expert in self.experts}) > 1:
            raise ValueError(
                f"experts must be of one kind, all heads or all prompts ({', '.join(PROMPT_METHODS)}), got "
                f"{', '.join(self.experts)}: compare heads in a run of their own"
            )
        if len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts must not repeat, got {', '.join(self.experts)}")
