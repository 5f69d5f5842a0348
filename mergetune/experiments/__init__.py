"""Whole experiments: own images, the demo, merging of solutions, the comparison, the paper's protocols."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.experiments.cells import Task
    from mergetune.experiments.comparison import compare
    from mergetune.experiments.icons import icons_task, run_demo
    from mergetune.experiments.own_images import FolderResult, checked_making, fit_dataset
    from mergetune.experiments.protocol_forecast import forecast
    from mergetune.experiments.protocol_plans import Experiment, check_data, plan
    from mergetune.experiments.protocol_tables import caption, save_table
    from mergetune.experiments.protocols import reproduce
    from mergetune.experiments.run_choice import cells_folder, dataset_cache, dataset_call
    from mergetune.experiments.run_list import RunRow, list_runs
    from mergetune.experiments.solution_merging import merge_solutions

__all__ = [
    "Experiment",
    "FolderResult",
    "RunRow",
    "Task",
    "caption",
    "cells_folder",
    "check_data",
    "checked_making",
    "dataset_cache",
    "dataset_call",
    "compare",
    "fit_dataset",
    "forecast",
    "icons_task",
    "list_runs",
    "merge_solutions",
    "plan",
    "reproduce",
    "run_demo",
    "save_table",
]

make_lazy(
    __name__,
    {
        "mergetune.experiments.cells": "Task",
        "mergetune.experiments.comparison": "compare",
        "mergetune.experiments.icons": "icons_task run_demo",
        "mergetune.experiments.own_images": "FolderResult checked_making fit_dataset",
        "mergetune.experiments.protocol_forecast": "forecast",
        "mergetune.experiments.protocol_plans": "Experiment check_data plan",
        "mergetune.experiments.protocol_tables": "caption save_table",
        "mergetune.experiments.protocols": "reproduce",
        "mergetune.experiments.run_choice": "cells_folder dataset_cache dataset_call",
        "mergetune.experiments.run_list": "RunRow list_runs",
        "mergetune.experiments.solution_merging": "merge_solutions",
    },
)
