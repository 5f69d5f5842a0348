"""Merging models afterwards: pure functions on state dicts, ``method(base, experts, *, options) -> state dict``."""

from typing import TYPE_CHECKING

from mergetune.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.merging.average import average, fisher_average, metrics_average, model_stock, slerp, wise_ft
    from mergetune.merging.search import (
        Evolved,
        adamerging,
        alignment_coefficients,
        entropy_coefficients,
        evolve,
        evolve_options,
        expert_merging,
        natural_niches,
    )
    from mergetune.merging.stream import merge_files
    from mergetune.merging.subspace import lora_lego, opcm, tsv_m, widen
    from mergetune.merging.task_vectors import (
        CompressedSize,
        compeft,
        compeft_size,
        dare,
        delta_guided,
        layerwise,
        lines,
        negate,
        ota_ffg,
        pcb,
        sce,
        task_arithmetic,
        ties,
    )
    from mergetune.merging.tensors import Constant, StateDict, TensorFile

__all__ = [
    "CompressedSize",
    "Constant",
    "Evolved",
    "StateDict",
    "TensorFile",
    "adamerging",
    "alignment_coefficients",
    "average",
    "compeft",
    "compeft_size",
    "dare",
    "delta_guided",
    "entropy_coefficients",
    "evolve",
    "evolve_options",
    "expert_merging",
    "fisher_average",
    "layerwise",
    "lines",
    "lora_lego",
    "merge_files",
    "metrics_average",
    "model_stock",
    "natural_niches",
    "negate",
    "opcm",
    "ota_ffg",
    "pcb",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "widen",
    "wise_ft",
]

make_lazy(
    __name__,
    {
        "mergetune.merging.average": "average fisher_average metrics_average model_stock slerp wise_ft",
        "mergetune.merging.search": (
            "Evolved adamerging alignment_coefficients entropy_coefficients evolve evolve_options expert_merging "
            "natural_niches"
        ),
        "mergetune.merging.stream": "merge_files",
        "mergetune.merging.subspace": "lora_lego opcm tsv_m widen",
        "mergetune.merging.task_vectors": (
            "CompressedSize compeft compeft_size dare delta_guided layerwise lines negate ota_ffg pcb sce "
            "task_arithmetic ties"
        ),
        "mergetune.merging.tensors": "Constant StateDict TensorFile",
    },
)
