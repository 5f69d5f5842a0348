"""mergetune: give a fine-tuned CLIP its zero-shot ability back (MERGETUNE, arXiv 2601.10497)."""

from mergetune.clip import FrozenClip, load_clip
from mergetune.curvature import fisher_diagonal
from mergetune.data import Dataset, ImageFolder, ImageList, coop_split, image_table
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
from mergetune.features import FeatureCache, cache_features
from mergetune.fit import FitResult, fit, tune
from mergetune.geometry import connectivity, path, plot
from mergetune.solutions import Head, Prompt, interpolate, load_solution

__version__ = "0.1.0"

__all__ = [
    "Dataset",
    "FeatureCache",
    "FitResult",
    "FrozenClip",
    "Head",
    "ImageFolder",
    "ImageList",
    "Prompt",
    "accuracy",
    "base_to_novel",
    "cache_features",
    "classifier",
    "connectivity",
    "coop_split",
    "evaluate",
    "fisher_diagonal",
    "fit",
    "harmonic_mean",
    "image_table",
    "interpolate",
    "load_clip",
    "load_solution",
    "logit_ensemble",
    "path",
    "plot",
    "summarise",
    "tune",
    "weight_average",
]
