"""Evaluation: accuracy of solutions, and the loss along paths, over planes and in its curvature, with figures."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.evaluation.answer_figures import plot_confusion, plot_wrong_answers
    from mergetune.evaluation.answers import (
        ClassScores,
        Confusion,
        Mistake,
        WrongAnswer,
        confusion,
        most_confident,
        save_wrong_answers,
        wrong_answers,
    )
    from mergetune.evaluation.classifiers import classifier, evaluate, logit_ensemble, weight_average
    from mergetune.evaluation.figures import plot, plot_plane, plot_spectrum
    from mergetune.evaluation.html_report import report
    from mergetune.evaluation.paths import Path, connectivity, cross_entropy, path
    from mergetune.evaluation.planes import plane
    from mergetune.evaluation.predictions import Predictions, Reliability, predict_features
    from mergetune.evaluation.predictor import Prediction, Predictor, classes_of
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
    from mergetune.evaluation.temperatures import fit_temperature
    from mergetune.solutions import temperature_of, with_temperature

__all__ = [
    "BaseNovel",
    "ClassScores",
    "Classifier",
    "Confusion",
    "Hits",
    "ImageMap",
    "Mistake",
    "Path",
    "Prediction",
    "Predictions",
    "Predictor",
    "Reliability",
    "Report",
    "Row",
    "WrongAnswer",
    "accuracy",
    "base_to_novel",
    "classes_of",
    "classifier",
    "confusion",
    "connectivity",
    "count_hits",
    "cross_entropy",
    "evaluate",
    "fit_temperature",
    "harmonic_mean",
    "logit_ensemble",
    "most_confident",
    "path",
    "plane",
    "plot",
    "plot_confusion",
    "plot_plane",
    "plot_spectrum",
    "plot_wrong_answers",
    "predict_features",
    "report",
    "right_answers",
    "save_wrong_answers",
    "score",
    "spectrum",
    "summarise",
    "temperature_of",
    "weight_average",
    "with_temperature",
    "wrong_answers",
]

make_lazy(
    __name__,
    {
        "mergetune.evaluation.answer_figures": "plot_confusion plot_wrong_answers",
        "mergetune.evaluation.answers": (
            "ClassScores Confusion Mistake WrongAnswer confusion most_confident save_wrong_answers wrong_answers"
        ),
        "mergetune.evaluation.classifiers": "classifier evaluate logit_ensemble weight_average",
        "mergetune.evaluation.figures": "plot plot_plane plot_spectrum",
        "mergetune.evaluation.html_report": "report",
        "mergetune.evaluation.paths": "Path connectivity cross_entropy path",
        "mergetune.evaluation.planes": "plane",
        "mergetune.evaluation.predictions": "Predictions Reliability predict_features",
        "mergetune.evaluation.predictor": "Prediction Predictor classes_of",
        "mergetune.evaluation.scores": (
            "BaseNovel Classifier Hits ImageMap Report Row accuracy base_to_novel count_hits harmonic_mean "
            "right_answers score summarise"
        ),
        "mergetune.evaluation.spectra": "spectrum",
        "mergetune.evaluation.temperatures": "fit_temperature",
        "mergetune.solutions": "temperature_of with_temperature",
    },
)
