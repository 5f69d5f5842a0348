"""Training: stage 1 (tune), stage 2 (fit), their objective and schedule, and runs that resume."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.training.curvature import fisher_diagonal
    from mergetune.training.jobs import Job
    from mergetune.training.loop import train_together
    from mergetune.training.run_folders import finished_epochs, forgotten_if_refused, has_begun, run_folder, run_title
    from mergetune.training.runs import FitResult, in_words_of, older_settings_of, settings_of
    from mergetune.training.stage_one import tune, tune_job
    from mergetune.training.stage_two import fit, fit_job

__all__ = [
    "FitResult",
    "Job",
    "finished_epochs",
    "fisher_diagonal",
    "fit",
    "fit_job",
    "forgotten_if_refused",
    "has_begun",
    "in_words_of",
    "older_settings_of",
    "run_folder",
    "run_title",
    "settings_of",
    "train_together",
    "tune",
    "tune_job",
]

make_lazy(
    __name__,
    {
        "mergetune.training.curvature": "fisher_diagonal",
        "mergetune.training.jobs": "Job",
        "mergetune.training.loop": "train_together",
        "mergetune.training.run_folders": "finished_epochs forgotten_if_refused has_begun run_folder run_title",
        "mergetune.training.runs": "FitResult in_words_of older_settings_of settings_of",
        "mergetune.training.stage_one": "tune tune_job",
        "mergetune.training.stage_two": "fit fit_job",
    },
)
