"""The merging methods as data: requirements, suitable inputs, source and options of each. Needs no torch.

A test checks every entry against its function: names, kinds, defaults and choices of the options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from mergetune.facts import Option
from mergetune.facts.option_kinds import REQUIRED

UNLABELLED, LABELLED = "images without labels", "labelled images"


@dataclass(frozen=True)
class Method:
    """A merging method, ``(base, experts, *, options) -> state dict``.

    Attributes:
        name: name for ``mergetune merge``.
        title: name in tables.
        source: the paper.
        needs: the data that the method needs.
        meaningful: the inputs for which the method is meaningful.
        function: dotted name of the function.
        base: True if a base is required, False if none is allowed, None if the base is optional.
        least: smallest number of experts.
        most: largest number of experts; None is any number.
        options: keyword arguments of the function.
        from_images: names of the options that are computed from cached features when solutions are merged.
        images: images from which these options are computed: "none", "images without labels" or "labelled images".
    """

    name: str
    title: str
    source: str
    needs: str
    meaningful: str
    function: str
    base: bool | None
    least: int = 1
    most: int | None = None
    options: tuple[Option, ...] = ()
    from_images: tuple[str, ...] = ()
    images: str = "none"

    def load(self) -> Callable[..., Any]:
        """Imports the function, and torch with it, and returns the function."""
        module, _, name = self.function.rpartition(".")
        return getattr(import_module(module), name)

    def option(self, name: str) -> Option:
        """The option of a name."""
        return next(option for option in self.options if option.name == name)

    def missing(self, given: Any) -> list[str]:
        """Names of the options without a default that ``given`` does not contain."""
        return [option.name for option in self.options if option.default is REQUIRED and option.name not in given]

    def shown(self) -> dict[str, str]:
        """Name of each option -> its default as text, or "from the cache" if computed from images."""
        return {o.name: "from the cache" if o.name in self.from_images else o.shown() for o in self.options}


def find(name: str) -> Method:
    """The method of a name, in which dashes count as underscores.

    Raises:
        ValueError: no method has the name; lists all methods.
    """
    found = METHODS.get(name.replace("-", "_"))
    if found is None:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return found


_WEIGHTS = Option("weights", "floats", None, "Weight of each expert; equal weights if not given.", none=True)
_SCALE = Option("scale", "float", 1.0, "Factor of the merged task vector.")
_PREDICT = Option("predict", "object", help="Function of weights, inputs and expert number that returns logits.")
_DATA = Option("data", "object", help="Unlabelled inputs of each expert's task.")
_PER = Option("per", "str", "tensor", "Learn one coefficient per tensor and expert, or one per expert.",
              choices=("tensor", "expert"))  # fmt: skip
_TRIM = Option("trim", "str", "global", "Trim all tensors of an expert together, or each tensor separately.",
               choices=("global", "tensor"))  # fmt: skip
_DIVIDE = Option("divide", "str", "count", "Divide the sum by the number of agreeing values, by their weight, or by 1.",
                 choices=("count", "weight", "none"))  # fmt: skip

_ALL = (
    Method(
        "adamerging",
        title="AdaMerging",
        source="arXiv 2310.02575",
        needs="the model and unlabelled inputs of every expert's task",
        meaningful="one or several experts, any tensors",
        function="mergetune.merging.adamerging",
        base=True,
        options=(
            _PREDICT,
            _DATA,
            _PER,
            Option("start", "float", 0.3, "Initial value of every coefficient."),
            Option("steps", "int", 500, "Number of Adam steps."),
            Option("batch_size", "int", 32, "Inputs of each task per step."),
            Option("lr", "float", 1e-3, "Learning rate of Adam."),
            Option("seed", "int", 0, "Seed of the batches."),
        ),
        from_images=("predict", "data"),
        images=UNLABELLED,
    ),
    Method(
        "average",
        title="Weight average",
        source="arXiv 2203.05482",
        needs="no data",
        meaningful="any number of experts and any tensors",
        function="mergetune.merging.average",
        base=None,
        options=(_WEIGHTS,),
    ),
    Method(
        "compeft",
        title="ComPEFT",
        source="arXiv 2311.13171",
        needs="no data (the paper chooses alpha on validation images)",
        meaningful="one expert, any tensors",
        function="mergetune.merging.compeft",
        base=True,
        most=1,
        options=(
            Option("density", "float", 0.2, "Share of the elements, those of largest magnitude, that keep their sign."),
            Option("alpha", "float", 1.0, "Factor of the standard deviation that replaces the magnitudes."),
        ),
    ),
    Method(
        "dare",
        title="DARE",
        source="arXiv 2311.03099",
        needs="no data",
        meaningful="one or several experts, any tensors; for small tau only (the paper: below 0.002)",
        function="mergetune.merging.dare",
        base=True,
        options=(
            Option("density", "float", 0.1, "Share of the elements that are kept, chosen at random."),
            _SCALE,
            _WEIGHTS,
            Option("rescale", "str", "density", "Divide by the density, restore a norm (l1, l2, linf), or do neither.",
                   none=True, choices=("density", "l1", "l2", "linf")),
            Option("consensus", "str", None, "Elect signs by sum or count as TIES does; none adds the task vectors.",
                   none=True, choices=("sum", "count")),
            _DIVIDE,
            Option("seed", "int", 0, "Seed of the random masks."),
        ),
    ),
    Method(
        "delta_guided",
        title="Delta-guided fusion",
        source="arXiv 2508.11442",
        needs="no data",
        meaningful="several experts, any tensors",
        function="mergetune.merging.delta_guided",
        base=True,
        least=2,
        options=(
            Option("power", "float", 1.0,
                   "Exponent: 0 is the plain average; a large power takes the expert that moved furthest."),
            Option("per", "str", "tensor", "Compute one weight per tensor or per element.",
                   choices=("tensor", "element")),
        ),
    ),
    Method(
        "evolve",
        title="Evolutionary merging",
        source="arXiv 2403.13187",
        needs="a score, which needs labelled validation data",
        meaningful="the same inputs as the method whose options are searched",
        function="mergetune.merging.evolve",
        base=None,
        options=(
            Option("score", "object", help="Function of the merged weights whose value is maximised."),
            Option("space", "ranges", help="Range of each searched option."),
            Option("method", "method", "task_arithmetic", "Merging method whose options are searched."),
            Option("fixed", "object", None, "Options of the method that are not searched.", none=True),
            Option("start", "starts", None, "Start of the search for each option; default: middle of the range.",
                   none=True),
            Option("trials", "int", 100, "Number of merged models to score."),
            Option("backend", "str", "cma", "Package that runs the search.", choices=("cma", "optuna")),
            Option("seed", "int", 0, "Seed of the search."),
        ),
        from_images=("score",),
        images=LABELLED,
    ),
    Method(
        "expert_merging",
        title="Expert Merging",
        source="arXiv 2509.25712",
        needs="the model and unlabelled inputs of every expert's task",
        meaningful="one or several experts, any tensors",
        function="mergetune.merging.expert_merging",
        base=True,
        options=(
            _PREDICT,
            _DATA,
            _PER,
            Option("start", "float", 0.1, "Initial value of every coefficient, within (0, 1)."),
            Option("steps", "int", 50, "Number of AdamW steps."),
            Option("batch_size", "int", 16, "Inputs of each task per step."),
            Option("lr", "float", 0.5, "Learning rate of AdamW at the start of each cosine."),
            Option("temperature", "float", 1.0, "Temperature that divides the logits."),
            Option("hidden", "float", 1.0, "Weight of the difference between hidden features."),
            Option("stay", "float", 5.0, "Weight of the distance of the coefficients from their start."),
            Option("task_weights", "floats", None, "Weight of each expert's task.", none=True),
            Option("exclude", "strs", (), "Name patterns of the tensors that keep the base."),
            Option("seed", "int", 0, "Seed of the batches."),
        ),
        from_images=("predict", "data"),
        images=UNLABELLED,
    ),
    Method(
        "fisher_average",
        title="Fisher-weighted average",
        source="arXiv 2111.09832",
        needs="the Fisher diagonals, which need data (fisher_diagonal for class weights, with unit_mean=False)",
        meaningful="several experts, including the zero-shot solution; any tensors",
        function="mergetune.merging.fisher_average",
        base=None,
        least=2,
        options=(
            Option("fishers", "states", help="Diagonal Fisher information of each expert."),
            _WEIGHTS,
            Option("floor", "float", 1e-6, "Smaller Fisher values are raised to this value."),
            Option("favor_first", "bool", True, "Raise only the first expert's Fisher values to the floor."),
            Option("normalize", "str", None, "norm divides each weight by the norm of the expert's Fisher diagonal.",
                   none=True, choices=("norm",)),
        ),
        from_images=("fishers",),
        images=UNLABELLED,
    ),
    Method(
        "layerwise",
        title="Task arithmetic with coefficients for each tensor",
        source="arXiv 2310.02575",
        needs="coefficients, no data",
        meaningful="one or several experts, any tensors",
        function="mergetune.merging.layerwise",
        base=True,
        options=(Option("coefficients", "object", help="Name of each tensor -> one number per expert."),),
    ),
    Method(
        "lines",
        title="LiNeS",
        source="arXiv 2410.17146",
        needs="no data (the paper chooses alpha or beta on validation images)",
        meaningful="one or several experts whose tensor names hold block numbers; not prompts and heads",
        function="mergetune.merging.lines",
        base=True,
        options=(
            Option("alpha", "float", None, "Scale of the task vector in the first block.", none=True),
            Option("beta", "float", None, "Amount by which the scale grows from the first block to the last.",
                   none=True),
            Option("layer", "object", None, "Function from tensor name to (block, number of blocks).", none=True),
        ),
    ),
    Method(
        "lora_lego",
        title="LoRA-LEGO",
        source="arXiv 2409.16167",
        needs="no data; scikit-learn",
        meaningful="several experts that hold only LoRA factors, pairs of *lora_A* [r, n] and *lora_B* [m, r] "
        "(PEFT's names); ranks may differ",
        function="mergetune.merging.subspace.lora_lego",
        base=False,
        least=2,
        options=(
            Option("rank", "int", None, "Rank of the result; default: the largest rank of the experts.", none=True),
            Option("scales", "floats", None, "LoRA's factor alpha / r of each expert.", none=True),
            Option("norms", "bool", True, "Restore the norms that averaging within a cluster reduces."),
            Option("outputs", "bool", True, "Correct the variance of the output for the changed rank."),
            Option("seed", "int", 0, "Seed of k-means."),
        ),
    ),
    Method(
        "metrics_average",
        title="Metrics-weighted averaging",
        source="arXiv 2504.18580",
        needs="one number per expert, no data",
        meaningful="several checkpoints of one run, any tensors",
        function="mergetune.merging.metrics_average",
        base=None,
        options=(
            Option("metrics", "floats", help="One positive number per expert: loss, steps or accuracy."),
            Option("higher_is_better", "bool", False, "Larger metrics give larger weights."),
            Option("penalty", "float", 1.0, "Exponent: 0 is the plain average; a large penalty takes the best expert."),
        ),
        from_images=("metrics",),
        images=LABELLED,
    ),
    Method(
        "model_stock",
        title="Model Stock",
        source="arXiv 2403.19522",
        needs="no data",
        meaningful="two or more experts fine-tuned from one base in the same way, for example with several seeds; "
        "any tensors",
        function="mergetune.merging.model_stock",
        base=True,
        least=2,
    ),
    Method(
        "natural_niches",
        title="M2N2",
        source="arXiv 2508.16204",
        needs="a score for each of N labelled examples, none of which may be used for reported results",
        meaningful="two or more models, including the base if given; any tensors",
        function="mergetune.merging.natural_niches",
        base=None,
        options=(
            Option("score", "object", help="Function of the merged weights that returns N scores, not negative."),
            Option("population", "int", 20, "Maximum number of models in the population."),
            Option("steps", "int", 1000, "Number of children."),
            Option("alpha", "float", 1.0, "Strength of the competition; 0 is no competition."),
            Option("mutation", "float", 0.0, "Standard deviation of the noise added to children."),
            Option("seed", "int", 0, "Seed of all random draws."),
        ),
        from_images=("score",),
        images=LABELLED,
    ),
    Method(
        "negate",
        title="Forgetting by task-vector negation",
        source="arXiv 2212.04089",
        needs="no data (the paper chooses scale so that a control task keeps 95 % of its accuracy)",
        meaningful="one or several experts whose tasks are to be forgotten; any tensors",
        function="mergetune.merging.negate",
        base=True,
        options=(Option("scale", "float", 1.0, "Factor of the subtracted task vectors."),),
    ),
    Method(
        "opcm",
        title="OPCM",
        source="arXiv 2501.09522",
        needs="no data",
        meaningful="several experts with matrices; the order of the experts matters",
        function="mergetune.merging.subspace.opcm",
        base=True,
        least=2,
        options=(
            Option("alpha", "float", 0.5, "Share of the sum of singular values whose space is protected."),
            Option("project", "object", None, "Function from tensor name to whether the tensor is projected.",
                   none=True),
        ),
    ),
    Method(
        "ota_ffg",
        title="OTA merging with Fast Fisher Grafting",
        source="arXiv 2509.11167",
        needs="Adam's second moments exp_avg_sq of each expert's training, or squared gradients computed on data",
        meaningful="one expert (grafting alone) or several; any tensors",
        function="mergetune.merging.ota_ffg",
        base=True,
        options=(
            Option("second_moments", "states", help="Second moments of each expert's gradients."),
            Option("density", "float", 0.4, "Share of the elements, those of highest saliency, that is kept."),
            Option("power", "float", 0.5, "Exponent of the second moments in the weights."),
            Option("epsilon", "float", 1e-26, "Number added to every weight."),
            _TRIM,
            Option("rank_one", "bool", False, "Replace the second moments of matrices by a rank-one approximation."),
        ),
        from_images=("second_moments",),
        images=UNLABELLED,
    ),
    Method(
        "pcb",
        title="PCB-Merging",
        source="arXiv 2410.02396",
        needs="no data",
        meaningful="several experts, any tensors; for one expert it keeps the elements that moved most",
        function="mergetune.merging.pcb",
        base=True,
        options=(
            Option("ratio", "float", 0.1, "Share of an expert's elements that are merged."),
            _SCALE,
            Option("scope", "str", "global", "Rank all tensors of an expert together, or each tensor separately.",
                   choices=("global", "tensor")),
            Option("clip", "float", 1e-4, "Quantile at which magnitudes are clipped from below and from above."),
            Option("between", "str", "raw", "Form of the competition between experts.",
                   choices=("raw", "normalized", "pairs")),
        ),
    ),
    Method(
        "sce",
        title="SCE",
        source="arXiv 2408.07990",
        needs="no data",
        meaningful="several experts (one alone has no variance), any tensors",
        function="mergetune.merging.sce",
        base=True,
        least=2,
        options=(
            Option("density", "float", 0.1, "Share of the elements, those of highest variance, that is selected."),
            _SCALE,
            Option("select", "str", "vectors", "Apply the selection to the task vectors, or only to the weights.",
                   choices=("vectors", "weights")),
        ),
    ),
    Method(
        "slerp",
        title="Spherical interpolation",
        source="Shoemake, SIGGRAPH 1985",
        needs="no data",
        meaningful="two models: base (t = 0) and one expert (t = 1), or no base and two experts",
        function="mergetune.merging.slerp",
        base=None,
        most=2,
        options=(Option("t", "float", 0.5, "Position on the way from the first model (0) to the second (1)."),),
    ),
    Method(
        "task_arithmetic",
        title="Task arithmetic",
        source="arXiv 2212.04089",
        needs="no data (scale may be chosen on validation images)",
        meaningful="one or several experts, any tensors",
        function="mergetune.merging.task_arithmetic",
        base=True,
        options=(Option("scale", "float", 0.4, "Factor of the sum of the task vectors."), _WEIGHTS),
    ),
    Method(
        "ties",
        title="TIES",
        source="arXiv 2306.01708",
        needs="no data",
        meaningful="several experts, any tensors; one expert is only trimmed",
        function="mergetune.merging.ties",
        base=True,
        options=(
            Option("density", "float", 0.2, "Share of the elements, those of largest magnitude, that is kept."),
            _SCALE,
            _WEIGHTS,
            _TRIM,
            Option("sign", "str", "sum", "Elect signs by the sum of the values or by the count of the signs.",
                   choices=("sum", "count")),
            _DIVIDE,
        ),
    ),
    Method(
        "tsv_m",
        title="TSV-Merge",
        source="arXiv 2412.00081",
        needs="no data",
        meaningful="several experts with matrices",
        function="mergetune.merging.subspace.tsv_m",
        base=True,
        least=2,
        options=(_SCALE,),
    ),
    Method(
        "widen",
        title="WIDEN",
        source="arXiv 2408.03092",
        needs="no data",
        meaningful="several experts with matrices and vectors; larger tensors count as matrices [m, n x ...]",
        function="mergetune.merging.subspace.widen",
        base=True,
        least=2,
        options=(
            Option("ratio", "float", 1.0, "Columns ranked above this multiple of the mean rank are calibrated."),
            Option("calibration", "float", 1.0, "Score of the calibrated columns."),
            _SCALE,
            Option("normalize", "bool", False, "Divide the scores by their sum over the experts."),
            Option("rows", "strs", ("model.embed_tokens.weight", "token_embedding.weight"),
                   "Name endings of matrices that are scored by row instead of by column."),
        ),
    ),
    Method(
        "wise_ft",
        title="WiSE-FT",
        source="arXiv 2109.01903",
        needs="no data (alpha may be chosen on validation images)",
        meaningful="the zero-shot base and one expert",
        function="mergetune.merging.wise_ft",
        base=True,
        most=1,
        options=(Option("alpha", "float", 0.5, "Weight of the expert: 0 is the base, 1 the expert."),),
    ),
)  # fmt: skip

METHODS: Final[dict[str, Method]] = {method.name: method for method in _ALL}
"""Every merging method by its name."""
