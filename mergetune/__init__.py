"""mergetune: give a fine-tuned CLIP its zero-shot ability back (MERGETUNE, arXiv 2601.10497)."""

from typing import TYPE_CHECKING

from mergetune.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune import merging
    from mergetune.catalogue import merge_solutions
    from mergetune.clip import FrozenClip, load_clip
    from mergetune.curvature import fisher_diagonal
    from mergetune.data import Dataset, ImageFolder, ImageList, coop_split, image_table
    from mergetune.datasets import DATASETS, CoOpDataset, check_dataset
    from mergetune.evaluate import (
        accuracy,
        base_to_novel,
        classifier,
        evaluate,
        harmonic_mean,
        logit_ensemble,
        summarise,
        weight_average,
    )
    from mergetune.exports import push_to_hub, to_coop, to_head, to_hub, zero_shot_classifier
    from mergetune.feature_files import read_features
    from mergetune.features import FeatureCache, cache_features
    from mergetune.fit import FitResult, fit, tune
    from mergetune.folder import FolderResult, fit_dataset
    from mergetune.geometry import connectivity, path, plane, plot, plot_plane, plot_spectrum, spectrum
    from mergetune.geometry import report as connectivity_report
    from mergetune.solutions import Head, Prompt, interpolate, load_solution, open_solution
    from mergetune.templates import templates_for

__version__ = "0.1.0"

__all__ = [
    "DATASETS",
    "CoOpDataset",
    "Dataset",
    "FeatureCache",
    "FitResult",
    "FolderResult",
    "FrozenClip",
    "Head",
    "ImageFolder",
    "ImageList",
    "Prompt",
    "accuracy",
    "base_to_novel",
    "cache_features",
    "check_dataset",
    "classifier",
    "connectivity",
    "connectivity_report",
    "coop_split",
    "evaluate",
    "fisher_diagonal",
    "fit",
    "fit_dataset",
    "harmonic_mean",
    "image_table",
    "interpolate",
    "load_clip",
    "load_solution",
    "logit_ensemble",
    "merge_solutions",
    "merging",
    "open_solution",
    "path",
    "plane",
    "plot",
    "plot_plane",
    "plot_spectrum",
    "push_to_hub",
    "read_features",
    "spectrum",
    "summarise",
    "templates_for",
    "to_coop",
    "to_head",
    "to_hub",
    "tune",
    "weight_average",
    "zero_shot_classifier",
]

make_lazy(
    __name__,
    {
        "mergetune.catalogue": "merge_solutions",
        "mergetune.clip": "FrozenClip load_clip",
        "mergetune.curvature": "fisher_diagonal",
        "mergetune.data": "Dataset ImageFolder ImageList coop_split image_table",
        "mergetune.datasets": "DATASETS CoOpDataset check_dataset",
        "mergetune.evaluate": (
            "accuracy base_to_novel classifier evaluate harmonic_mean logit_ensemble summarise weight_average"
        ),
        "mergetune.exports": "push_to_hub to_coop to_head to_hub zero_shot_classifier",
        "mergetune.feature_files": "read_features",
        "mergetune.features": "FeatureCache cache_features",
        "mergetune.fit": "FitResult fit tune",
        "mergetune.folder": "FolderResult fit_dataset",
        "mergetune.geometry": (
            "connectivity connectivity_report=report path plane plot plot_plane plot_spectrum spectrum"
        ),
        "mergetune.solutions": "Head Prompt interpolate load_solution open_solution",
        "mergetune.templates": "templates_for",
    },
    packages=("clip", "data", "merging", "ops", "solutions"),
)
