"""Classifiers for use without mergetune: one graph from pixels to logits, as ONNX or as a program of torch.export."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.serving.graph_files import PREDICTOR, require_packages, to_onnx, to_torch_export
    from mergetune.serving.graphs import check_supported, facts_of

__all__ = ["PREDICTOR", "check_supported", "facts_of", "require_packages", "to_onnx", "to_torch_export"]

make_lazy(
    __name__,
    {
        "mergetune.serving.graph_files": "PREDICTOR require_packages to_onnx to_torch_export",
        "mergetune.serving.graphs": "check_supported facts_of",
    },
)
