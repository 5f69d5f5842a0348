"""Evaluation: accuracy of solutions, and the loss along paths, over planes and in its curvature, with figures."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.evaluation.classifiers import classifier, evaluate, logit_ensemble, weight_average
    from mergetune.evaluation.figures import plot, plot_plane, plot_spectrum
    from mergetune.evaluation.html_report import report
    from mergetune.evaluation.paths import Path, connectivity, cross_entropy, path
    from mergetune.evaluation.planes import plane
    from mergetune.evaluation.scores import (
        BaseNovel,
        Classifier,
        Hits,
        ImageMap,
        Report,
        Row,
        accuracy,
        base_to_novel,
        count_hits,
        harmonic_mean,
        right_answers,
        score,
        summarise,
    )
    from mergetune.evaluation.spectra import spectrum

__all__ = [
    "BaseNovel",
    "Classifier",
    "Hits",
    "ImageMap",
    "Path",
    "Report",
    "Row",
    "accuracy",
    "base_to_novel",
    "classifier",
    "connectivity",
    "count_hits",
    "cross_entropy",
    "evaluate",
    "harmonic_mean",
    "logit_ensemble",
    "path",
    "plane",
    "plot",
    "plot_plane",
    "plot_spectrum",
    "report",
    "right_answers",
    "score",
    "spectrum",
    "summarise",
    "weight_average",
]

make_lazy(
    __name__,
    {
        "mergetune.evaluation.classifiers": "classifier evaluate logit_ensemble weight_average",
        "mergetune.evaluation.figures": "plot plot_plane plot_spectrum",
        "mergetune.evaluation.html_report": "report",
        "mergetune.evaluation.paths": "Path connectivity cross_entropy path",
        "mergetune.evaluation.planes": "plane",
        "mergetune.evaluation.scores": (
            "BaseNovel Classifier Hits ImageMap Report Row accuracy base_to_novel count_hits harmonic_mean "
            "right_answers score summarise"
        ),
        "mergetune.evaluation.spectra": "spectrum",
    },
)
