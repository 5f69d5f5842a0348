"""The merging methods as data: what each merges and needs, where it comes from, its options. Needs no torch.

A test holds every entry to its function: names and defaults of options, their kinds, and the choices it accepts.
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
        name: as ``mergetune merge`` takes it.
        title: as tables show it.
        source: paper.
        needs: data or none.
        meaningful: what it is meaningful for.
        function: dotted name.
        base: whether it needs a base; None where it works with and without.
        least: experts that it needs.
        most: experts that it takes; None is any number.
        options: its options.
        from_images: the options that are computed from cached features where solutions are merged.
        images: the images that these are computed from: "none", "images without labels" or "labelled images".
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
        """The function. Imports torch."""
        module, _, name = self.function.rpartition(".")
        return getattr(import_module(module), name)

    def option(self, name: str) -> Option:
        """One of its options."""
        return next(option for option in self.options if option.name == name)

    def missing(self, given: Any) -> list[str]:
        """The options without a default that are not among ``given`` names."""
        return [option.name for option in self.options if option.default is REQUIRED and option.name not in given]

    def shown(self) -> dict[str, str]:
        """Name of each option -> its default as text, or where it comes from."""
        return {o.name: "from the cache" if o.name in self.from_images else o.shown() for o in self.options}


def find(name: str) -> Method:
    """The method of a name; dashes are underscores.

    Raises:
        ValueError: no method has the name; lists all methods.
    """
    found = METHODS.get(name.replace("-", "_"))
    if found is None:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return found


_WEIGHTS = Option("weights", "floats", None, "Weight of each expert.", none=True)
_SCALE = Option("scale", "float", 1.0, "Factor of the merged task vector.")
_PREDICT = Option("predict", "object", help="Weights, inputs and the number of an expert -> logits.")
_DATA = Option("data", "object", help="Inputs of each expert's task, without labels.")
_PER = Option("per", "str", "tensor", "One coefficient for each tensor and expert, or for each expert.",
              choices=("tensor", "expert"))  # fmt: skip
_TRIM = Option("trim", "str", "global", "Trim all tensors of an expert together, or each tensor by itself.",
               choices=("global", "tensor"))  # fmt: skip
_DIVIDE = Option("divide", "str", "count", "Divide by the number of agreeing values, by their weight, or by nothing.",
                 choices=("count", "weight", "none"))  # fmt: skip

_ALL = (
    Method(
        "adamerging",
        title="AdaMerging",
        source="arXiv 2310.02575",
        needs="unlabelled inputs of every expert's task and the model",
        meaningful="one or several experts, any tensors",
        function="mergetune.merging.adamerging",
        base=True,
        options=(
            _PREDICT,
            _DATA,
            _PER,
            Option("start", "float", 0.3, "Value at which every coefficient starts."),
            Option("steps", "int", 500, "Steps of Adam."),
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
        needs="no data (the paper chooses alpha on validation)",
        meaningful="one expert, any tensors",
        function="mergetune.merging.compeft",
        base=True,
        most=1,
        options=(
            Option("density", "float", 0.2, "Share of the elements that keep their sign."),
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
            Option("density", "float", 0.1, "Share of the elements that are kept at random."),
            _SCALE,
            _WEIGHTS,
            Option("rescale", "str", "density", "Divide by the density, restore a norm, or do neither.",
                   none=True, choices=("density", "l1", "l2", "linf")),
            Option("consensus", "str", None, "Elect signs as TIES does, by sum or count; none adds.",
                   none=True, choices=("sum", "count")),
            _DIVIDE,
            Option("seed", "int", 0, "Seed of the masks."),
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
            Option("power", "float", 1.0, "0 is the plain average; a large power takes the one that moved furthest."),
            Option("per", "str", "tensor", "Weigh each tensor or each element.", choices=("tensor", "element")),
        ),
    ),
    Method(
        "evolve",
        title="Evolutionary merging",
        source="arXiv 2403.13187",
        needs="a score, which needs labelled validation data",
        meaningful="what the method is meaningful for",
        function="mergetune.merging.evolve",
        base=None,
        options=(
            Option("score", "object", help="Merged weights -> a number that is to be large."),
            Option("space", "ranges", help="Range of each option that is searched."),
            Option("method", "method", "task_arithmetic", "The merging method whose options are searched."),
            Option("fixed", "object", None, "Options of the method that are not searched.", none=True),
            Option("start", "starts", None, "Where the search of each option starts; none is mid-range.", none=True),
            Option("trials", "int", 100, "Number of merged models to score."),
            Option("backend", "str", "cma", "Package of the search.", choices=("cma", "optuna")),
            Option("seed", "int", 0, "Seed of the search."),
        ),
        from_images=("score",),
        images=LABELLED,
    ),
    Method(
        "expert_merging",
        title="Expert Merging",
        source="arXiv 2509.25712",
        needs="unlabelled inputs of every expert's task and the model",
        meaningful="one or several experts, any tensors",
        function="mergetune.merging.expert_merging",
        base=True,
        options=(
            _PREDICT,
            _DATA,
            _PER,
            Option("start", "float", 0.1, "Value at which every coefficient starts, within (0, 1)."),
            Option("steps", "int", 50, "Steps of AdamW."),
            Option("batch_size", "int", 16, "Inputs of each task per step."),
            Option("lr", "float", 0.5, "Learning rate of AdamW at the start of each cosine."),
            Option("temperature", "float", 1.0, "Temperature of the logits."),
            Option("hidden", "float", 1.0, "Weight of the difference of hidden features."),
            Option("stay", "float", 5.0, "Weight of the coefficients' distance from their start."),
            Option("task_weights", "floats", None, "Weight of each expert's task.", none=True),
            Option("exclude", "strs", (), "Patterns of tensor names that keep the base."),
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
        meaningful="several experts, the zero-shot solution may be one of them; any tensors",
        function="mergetune.merging.fisher_average",
        base=None,
        least=2,
        options=(
            Option("fishers", "states", help="Diagonal Fisher information of each expert."),
            _WEIGHTS,
            Option("floor", "float", 1e-6, "Fisher values below this count as this."),
            Option("favor_first", "bool", True, "Raise only the first expert's values to the floor."),
            Option("normalize", "str", None, "Divide each weight by the norm of its Fisher diagonal.",
                   none=True, choices=("norm",)),
        ),
        from_images=("fishers",),
        images=UNLABELLED,
    ),
    Method(
        "layerwise",
        title="Task arithmetic with coefficients for each tensor",
        source="arXiv 2310.02575",
        needs="the coefficients, no data",
        meaningful="one or several experts, any tensors",
        function="mergetune.merging.layerwise",
        base=True,
        options=(Option("coefficients", "object", help="Name of each tensor -> one number for each expert."),),
    ),
    Method(
        "lines",
        title="LiNeS",
        source="arXiv 2410.17146",
        needs="no data (the paper chooses one of alpha, beta on validation images)",
        meaningful="one or several experts whose names hold block numbers; prompts and heads have none and are refused",
        function="mergetune.merging.lines",
        base=True,
        options=(
            Option("alpha", "float", None, "Scale of the first block.", none=True),
            Option("beta", "float", None, "What the last block has more than the first.", none=True),
            Option("layer", "object", None, "Tensor name -> (block, number of blocks).", none=True),
        ),
    ),
    Method(
        "lora_lego",
        title="LoRA-LEGO",
        source="arXiv 2409.16167",
        needs="no data; scikit-learn",
        meaningful="several experts that hold LoRA factors only, *lora_A* [r, n] and *lora_B* [m, r] in pairs "
        "(PEFT's names), also of different ranks",
        function="mergetune.merging.subspace.lora_lego",
        base=False,
        least=2,
        options=(
            Option("rank", "int", None, "Rank of the result; none is the largest rank of an expert.", none=True),
            Option("scales", "floats", None, "LoRA's factor alpha / r of each expert.", none=True),
            Option("norms", "bool", True, "Restore the norms that averaging in a cluster loses."),
            Option("outputs", "bool", True, "Correct the variance of the output for the rank."),
            Option("seed", "int", 0, "Seed of k-means."),
        ),
    ),
    Method(
        "metrics_average",
        title="Metrics-weighted averaging",
        source="arXiv 2504.18580",
        needs="one number for each expert, no data",
        meaningful="several checkpoints of one run, any tensors",
        function="mergetune.merging.metrics_average",
        base=None,
        options=(
            Option("metrics", "floats", help="A positive number of each expert: loss, steps or accuracy."),
            Option("higher_is_better", "bool", False, "Larger numbers count more."),
            Option("penalty", "float", 1.0, "0 is the plain average; a large penalty takes the best alone."),
        ),
        from_images=("metrics",),
        images=LABELLED,
    ),
    Method(
        "model_stock",
        title="Model Stock",
        source="arXiv 2403.19522",
        needs="no data",
        meaningful="two or more experts fine-tuned from one base alike, such as with several seeds; any tensors",
        function="mergetune.merging.model_stock",
        base=True,
        least=2,
    ),
    Method(
        "natural_niches",
        title="M2N2",
        source="arXiv 2508.16204",
        needs="a score for each of N labelled examples (not those that are reported)",
        meaningful="two or more models, the base among them if it is given; any tensors",
        function="mergetune.merging.natural_niches",
        base=None,
        options=(
            Option("score", "object", help="Merged weights -> scores of N examples, not negative."),
            Option("population", "int", 20, "Number of models that are kept."),
            Option("steps", "int", 1000, "Number of children."),
            Option("alpha", "float", 1.0, "Strength of the competition; 0 is none."),
            Option("mutation", "float", 0.0, "Standard deviation of the noise on children."),
            Option("seed", "int", 0, "Seed of everything drawn."),
        ),
        from_images=("score",),
        images=LABELLED,
    ),
    Method(
        "negate",
        title="Forgetting by task-vector negation",
        source="arXiv 2212.04089",
        needs="no data (the paper chooses scale so that a control task keeps 95 % of its accuracy)",
        meaningful="one expert or several, all of which are forgotten; any tensors",
        function="mergetune.merging.negate",
        base=True,
        options=(Option("scale", "float", 1.0, "Factor of the task vectors that are subtracted."),),
    ),
    Method(
        "opcm",
        title="OPCM",
        source="arXiv 2501.09522",
        needs="no data",
        meaningful="several experts that share matrices; their order counts",
        function="mergetune.merging.subspace.opcm",
        base=True,
        least=2,
        options=(
            Option("alpha", "float", 0.5, "Share of the singular values whose space is protected."),
            Option("project", "object", None, "Tensor name -> whether it is projected.", none=True),
        ),
    ),
    Method(
        "ota_ffg",
        title="OTA merging with Fast Fisher Grafting",
        source="arXiv 2509.11167",
        needs="Adam's second moments exp_avg_sq of each expert's training, or squared gradients taken again (data)",
        meaningful="one expert (grafting alone) or several; any tensors",
        function="mergetune.merging.ota_ffg",
        base=True,
        options=(
            Option("second_moments", "states", help="Second moments of each expert's gradients."),
            Option("density", "float", 0.4, "Share of the elements with the highest saliency that is grafted."),
            Option("power", "float", 0.5, "Exponent of the second moments in the weights."),
            Option("epsilon", "float", 1e-26, "Added to the weights."),
            _TRIM,
            Option("rank_one", "bool", False, "Replace the moments of matrices by their rank-one form."),
        ),
        from_images=("second_moments",),
        images=UNLABELLED,
    ),
    Method(
        "pcb",
        title="PCB-Merging",
        source="arXiv 2410.02396",
        needs="no data",
        meaningful="several experts, any tensors; of one expert it keeps what moved most",
        function="mergetune.merging.pcb",
        base=True,
        options=(
            Option("ratio", "float", 0.1, "Share of an expert's elements that take part."),
            _SCALE,
            Option("scope", "str", "global", "Rank all tensors of an expert together, or each tensor by itself.",
                   choices=("global", "tensor")),
            Option("clip", "float", 1e-4, "Quantile at which magnitudes are clipped from below and above."),
            Option("between", "str", "raw", "How experts compete.", choices=("raw", "normalized", "pairs")),
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
            Option("select", "str", "vectors", "Select for the task vectors, or for the weights only.",
                   choices=("vectors", "weights")),
        ),
    ),
    Method(
        "slerp",
        title="Spherical interpolation",
        source="Shoemake, SIGGRAPH 1985",
        needs="no data",
        meaningful="two: base (t 0) and one expert (t 1), or no base and two experts",
        function="mergetune.merging.slerp",
        base=None,
        most=2,
        options=(Option("t", "float", 0.5, "Place on the way from the first (0) to the second (1)."),),
    ),
    Method(
        "task_arithmetic",
        title="Task arithmetic",
        source="arXiv 2212.04089",
        needs="no data (scale may be chosen on validation images)",
        meaningful="one or several experts, any tensors",
        function="mergetune.merging.task_arithmetic",
        base=True,
        options=(Option("scale", "float", 0.4, "Factor of the sum of task vectors."), _WEIGHTS),
    ),
    Method(
        "ties",
        title="TIES",
        source="arXiv 2306.01708",
        needs="no data",
        meaningful="several experts, any tensors; of one expert it only trims",
        function="mergetune.merging.ties",
        base=True,
        options=(
            Option("density", "float", 0.2, "Share of the elements, those of largest magnitude, that is kept."),
            _SCALE,
            _WEIGHTS,
            _TRIM,
            Option("sign", "str", "sum", "Elect signs by the sum of values or by the count of signs.",
                   choices=("sum", "count")),
            _DIVIDE,
        ),
    ),
    Method(
        "tsv_m",
        title="TSV-Merge",
        source="arXiv 2412.00081",
        needs="no data",
        meaningful="several experts that share matrices",
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
        meaningful="several experts; matrices, for tensors of more dimensions [m, n x ...], and vectors",
        function="mergetune.merging.subspace.widen",
        base=True,
        least=2,
        options=(
            Option("ratio", "float", 1.0, "Multiple of the mean rank above which a column is calibrated."),
            Option("calibration", "float", 1.0, "Score of the columns that are calibrated."),
            _SCALE,
            Option("normalize", "bool", False, "Divide the scores by their sum over the experts."),
            Option("rows", "strs", ("model.embed_tokens.weight", "token_embedding.weight"),
                   "Ends of the names of matrices whose rows are the units."),
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
        options=(Option("alpha", "float", 0.5, "0 is the base, 1 the expert."),),
    ),
)  # fmt: skip

METHODS: Final[dict[str, Method]] = {method.name: method for method in _ALL}
"""Every merging method by its name."""
