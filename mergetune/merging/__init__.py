"""Merging of trained models: pure functions on state dicts, ``method(base, experts, *, options) -> state dict``."""

from typing import TYPE_CHECKING

from mergetune.facts import make_lazy

if TYPE_CHECKING:
    from mergetune.merging.averages import average, fisher_average, metrics_average, model_stock, slerp, wise_ft
    from mergetune.merging.balance import delta_guided, ota_ffg, pcb, sce
    from mergetune.merging.coefficients import adamerging, alignment_coefficients, entropy_coefficients, expert_merging
    from mergetune.merging.compression import CompressedSize, compeft, compeft_size
    from mergetune.merging.evolution import Evolved, evolve, evolve_options, natural_niches
    from mergetune.merging.matching import match
    from mergetune.merging.sources import Constant, StateDict, TensorFile
    from mergetune.merging.stream import merge_files
    from mergetune.merging.subspace import lora_lego, opcm, tsv_m, widen
    from mergetune.merging.task_vectors import dare, layerwise, lines, negate, task_arithmetic, ties
    from mergetune.merging.weight_files import open_weights

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
    "match",
    "merge_files",
    "metrics_average",
    "model_stock",
    "natural_niches",
    "negate",
    "opcm",
    "open_weights",
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
        "mergetune.merging.averages": "average fisher_average metrics_average model_stock slerp wise_ft",
        "mergetune.merging.balance": "delta_guided ota_ffg pcb sce",
        "mergetune.merging.coefficients": "adamerging alignment_coefficients entropy_coefficients expert_merging",
        "mergetune.merging.compression": "CompressedSize compeft compeft_size",
        "mergetune.merging.evolution": "Evolved evolve evolve_options natural_niches",
        "mergetune.merging.matching": "match",
        "mergetune.merging.sources": "Constant StateDict TensorFile",
        "mergetune.merging.stream": "merge_files",
        "mergetune.merging.subspace": "lora_lego opcm tsv_m widen",
        "mergetune.merging.task_vectors": "dare layerwise lines negate task_arithmetic ties",
        "mergetune.merging.weight_files": "open_weights",
    },
)
