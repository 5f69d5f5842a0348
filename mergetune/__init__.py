"""mergetune: give a fine-tuned CLIP its zero-shot ability back (MERGETUNE, arXiv 2601.10497)."""

from typing import TYPE_CHECKING

from mergetune.facts import make_lazy
from mergetune.facts.source_tree import complete_source_tree

if TYPE_CHECKING:
    from mergetune import merging
    from mergetune.clip import FeatureSpace, FrozenClip, load_clip
    from mergetune.data import (
        DATASETS,
        CoOpDataset,
        Dataset,
        FeatureCache,
        ImageFolder,
        ImageList,
        cache_features,
        check_dataset,
        coop_split,
        image_table,
        read_features,
        templates_for,
    )
    from mergetune.evaluation import (
        Prediction,
        Predictor,
        accuracy,
        base_to_novel,
        classifier,
        confusion,
        connectivity,
        evaluate,
        fit_temperature,
        harmonic_mean,
        logit_ensemble,
        path,
        plane,
        plot,
        plot_confusion,
        plot_plane,
        plot_spectrum,
        plot_wrong_answers,
        predict_features,
        spectrum,
        summarise,
        temperature_of,
        weight_average,
        with_temperature,
        wrong_answers,
    )
    from mergetune.evaluation import report as connectivity_report
    from mergetune.experiments import FolderResult, fit_dataset, merge_solutions
    from mergetune.serving import to_onnx, to_torch_export
    from mergetune.solutions import (
        Head,
        LinearMap,
        LoRA,
        Parameters,
        Prompt,
        Residual,
        Stack,
        Templates,
        interpolate,
        load_solution,
        open_solution,
        open_taskres,
        push_to_hub,
        to_clip_lora,
        to_coop,
        to_head,
        to_hub,
        to_open_clip,
        to_peft,
        zero_shot_classifier,
    )
    from mergetune.training import FitResult, fisher_diagonal, fit, tune

__version__ = "0.1.0"

__all__ = [
    "DATASETS",
    "CoOpDataset",
    "Dataset",
    "FeatureCache",
    "FeatureSpace",
    "FitResult",
    "FolderResult",
    "FrozenClip",
    "Head",
    "ImageFolder",
    "ImageList",
    "LinearMap",
    "LoRA",
    "Parameters",
    "Prediction",
    "Predictor",
    "Prompt",
    "Residual",
    "Stack",
    "Templates",
    "accuracy",
    "base_to_novel",
    "cache_features",
    "check_dataset",
    "classifier",
    "confusion",
    "connectivity",
    "connectivity_report",
    "coop_split",
    "evaluate",
    "fisher_diagonal",
    "fit",
    "fit_dataset",
    "fit_temperature",
    "harmonic_mean",
    "image_table",
    "interpolate",
    "load_clip",
    "load_solution",
    "logit_ensemble",
    "merge_solutions",
    "merging",
    "open_solution",
    "open_taskres",
    "path",
    "plane",
    "plot",
    "plot_confusion",
    "plot_plane",
    "plot_spectrum",
    "plot_wrong_answers",
    "predict_features",
    "push_to_hub",
    "read_features",
    "spectrum",
    "summarise",
    "temperature_of",
    "templates_for",
    "to_clip_lora",
    "to_coop",
    "to_head",
    "to_hub",
    "to_onnx",
    "to_open_clip",
    "to_peft",
    "to_torch_export",
    "tune",
    "weight_average",
    "with_temperature",
    "wrong_answers",
    "zero_shot_classifier",
]

make_lazy(
    __name__,
    {
        "mergetune.clip": "FeatureSpace FrozenClip load_clip",
        "mergetune.data": (
            "Dataset ImageFolder ImageList coop_split image_table DATASETS CoOpDataset check_dataset read_features "
            "FeatureCache cache_features templates_for"
        ),
        "mergetune.evaluation": (
            "accuracy base_to_novel classifier evaluate harmonic_mean logit_ensemble summarise weight_average "
            "connectivity connectivity_report=report path plane plot plot_plane plot_spectrum spectrum Prediction "
            "Predictor predict_features confusion wrong_answers plot_confusion plot_wrong_answers fit_temperature "
            "temperature_of with_temperature"
        ),
        "mergetune.experiments": "merge_solutions FolderResult fit_dataset",
        "mergetune.serving": "to_onnx to_torch_export",
        "mergetune.solutions": (
            "push_to_hub to_clip_lora to_coop to_head to_hub to_open_clip to_peft zero_shot_classifier Head LinearMap "
            "LoRA Parameters Prompt Residual Stack Templates interpolate load_solution open_solution open_taskres"
        ),
        "mergetune.training": "fisher_diagonal FitResult fit tune",
    },
    packages=("clip", "data", "merging", "ops", "solutions"),
)
complete_source_tree()
