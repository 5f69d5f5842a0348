"""``--dry-run`` of the commands: what would be done, and estimates of the time; nothing is written."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mergetune.cli.shared import first_rank, print_json, tell

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only say what would be done, with estimates from a few images and steps; write nothing."
    ),
]


def print_forecast(found: Any, as_json: bool, plan: str) -> None:
    """Prints a forecast.

    Args:
        found: :class:`mergetune.experiments.own_forecast.Forecast`.
        as_json: whether to print JSON.
        plan: what would be run, one sentence.
    """
    from mergetune.experiments.own_forecast import MEASURED_IMAGES, MEASURED_STEPS

    if not first_rank():
        return
    if as_json:
        print_json(found.to_json() | {"plan": plan})
        return
    tell(plan)
    if found.images:
        parts = ", ".join(f"{count:,} {part}" for part, count in found.images.items())
        tell(
            f"Encoding: {parts} images of {found.classes:,} classes, {_size(found.gib)} of features, about "
            f"{_time(found.seconds_encoding)}. Images that are cached already are counted, too."
        )
    for stage, steps in found.steps.items():
        title = {"tune": "Stage 1", "fit": "Stage 2"}[stage]
        tell(f"{title}: {found.classes:,} classes, {steps:,} steps, about {_time(found.seconds_training[stage])}.")
    tell(
        f"Together about {_time(found.seconds)} on this machine, estimated from {MEASURED_IMAGES} images and "
        f"{MEASURED_STEPS} steps per stage that were measured now. Nothing was written."
    )


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.01 else f"{gib * 1024:.2f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"


def dry_run_of_tune(clip: Any, data: Any, options: dict[str, Any], plan: str, as_json: bool) -> None:
    """Prints what `mergetune tune` would do on a cache.

    Args:
        clip: the backbone.
        data: the feature cache.
        options: keyword arguments of :func:`mergetune.tune`.
        plan: what would be run, one sentence.
        as_json: whether to print JSON.
    """
    import mergetune as mt
    from mergetune.experiments.own_forecast import nothing_to_encode, with_stages

    found = with_stages(nothing_to_encode(data), clip, data, {"tune": (mt.tune, options)})
    print_forecast(found, as_json, plan)


def dry_run_of_fit(
    clip: Any,
    data: Any,
    tuned: list[Any],
    folder: Any,
    as_json: bool,
    *,
    shots: int | None,
    test: Any = None,
    tune_options: dict[str, Any],
    fit_options: dict[str, Any],
    workers: int,
) -> None:
    """Prints what `mergetune fit` would do, on a cache or on images.

    Args:
        clip: the backbone.
        data: feature cache, or dataset of the classes that are trained.
        tuned: fine-tuned solutions; without any, stage 1 is part of the forecast.
        folder: folder for the results.
        as_json: whether to print JSON.
        shots: training images per class.
        test: test images; None with a feature cache.
        tune_options, fit_options: keyword arguments of :func:`mergetune.tune` and :func:`mergetune.fit`.
        workers: number of processes that decode images.
    """
    import mergetune as mt
    from mergetune.experiments.own_forecast import forecast_caches, nothing_to_encode, with_stages

    if test is not None:
        training = data.few_shot(shots, fit_options.get("seed", 1))
        parts = {"training": (training, 1), "test": (test, 1)}
        found = forecast_caches(clip, parts, workers=workers)
    else:
        training, found = data, nothing_to_encode(data)
    stages: dict[str, Any] = {} if tuned else {"tune": (mt.tune, tune_options)}
    stages["fit"] = (mt.fit, fit_options | ({"tuned": tuned} if tuned else {}))
    found = with_stages(found, clip, training, stages)
    encoding = "encode the images, " if found.images else ""
    plan = f"Would {encoding}{'' if tuned else 'run stage 1, '}run stage 2 and write into {folder}."
    print_forecast(found, as_json, plan)
