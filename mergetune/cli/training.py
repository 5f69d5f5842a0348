"""`mergetune tune` runs stage 1, fine-tuning; `mergetune fit` runs stage 2, MERGETUNE."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.options import (
    AllowTorchscript,
    Backbone,
    Cache,
    Classes,
    Device,
    Json,
    MaxPixels,
    Position,
    Pretrained,
    Root,
    Shots,
    Workers,
    keywords,
    read_tuning,
    takes,
)
from mergetune.cli.own_images import left_out_files, open_retained, print_result
from mergetune.cli.shared import (
    announce,
    errors,
    finish,
    first_rank,
    open_cache,
    open_images,
    print_json,
    read_solution,
)
from mergetune.facts import FitOptions, TuneOptions
from mergetune.facts.function_options import MAX_PIXELS

Val = Annotated[
    Path | None,
    typer.Option(
        "--val", help="Feature cache of validation images; the best epoch is chosen on it. Never use test images."
    ),
]


@takes(TuneOptions)
def tune(
    features: Cache,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the solution and the training report.")],
    backbone: Backbone,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    classes: Classes = "all",
    shots: Shots = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="Solution that a residual or a map is put on; zero-shot if not given."),
    ] = None,
    val: Val = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Stage 1: fine-tune a prompt (CoOp, KgCoOp), a linear head, a class residual or an image map on cached features.

    A residual or a map is put on a solution, which does not change: mergetune tune --method residual --base out/fit ...

    If the command is interrupted, run it again: it continues from the last finished epoch.
    """
    import mergetune as mt

    with errors():
        clip = mt.load_clip(backbone, pretrained, device=device, allow_torchscript=allow_torchscript)
        data = open_cache(features, classes, shots=shots, seed=options["seed"])
        chosen_on = None if val is None else open_cache(val, classes)
        below = None if base is None else read_solution(str(base), data)
        result = mt.tune(clip, data, base=below, val=chosen_on, resume=folder, **keywords(TuneOptions, options))
        result.save(folder)
    _finish(as_json, result, folder)


@takes(FitOptions, but=("zero_shot",))
def fit(
    context: typer.Context,
    backbone: Backbone,
    images: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of class folders, or a .csv/.json list; caching, stage 1, stage 2 and testing all run."
        ),
    ] = None,
    features: Annotated[
        Path | None, typer.Option("--cache", help="Feature cache, instead of images; only stage 2 runs.")
    ] = None,
    tuned: Annotated[
        list[str],
        typer.Option(
            "--tuned",
            help="Fine-tuned solution or CoOp checkpoint; repeat the option for several. "
            "Needed with --cache; with images stage 1 trains one if none is given.",
        ),
    ] = [],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for the solution and the report. Default with images: out/ and the name of IMAGES."
        ),
    ] = None,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    classes: Classes = "all",
    shots: Shots = None,
    template: Annotated[
        list[str],
        typer.Option(
            "--template",
            "--zero-shot",
            help="Zero-shot template; {} stands for the class name. Several are averaged. "
            "With --cache this may also be one saved zero-shot solution.",
        ),
    ] = ["a photo of a {}."],
    position: Position = "end",
    method: Annotated[
        str,
        typer.Option(
            help="With images: method of stage 1, one of coop, kgcoop, head; or auto, which also chooses the kind of "
            "solution (prompt, head, residual, image map)."
        ),
    ] = "coop",
    no_measure: Annotated[
        bool,
        typer.Option("--no-measure", help="With images: skip the extra run that measures new classes, and the choice."),
    ] = False,
    no_choose: Annotated[
        bool, typer.Option("--no-choose", help="With images: measure, but take --lam and --tau without choosing them.")
    ] = False,
    retain: Annotated[
        Path | None,
        typer.Option("--retain", help="With images: pictures of other classes that the solution is tested on as well."),
    ] = None,
    tuning: Annotated[
        list[str],
        typer.Option("--tune", help="With images: option of stage 1 (mergetune.tune) as name=value; repeatable."),
    ] = [],
    val: Val = None,
    root: Root = None,
    workers: Workers = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Stage 2, MERGETUNE, on a feature cache; or all stages on a folder of images.

    mergetune fit photos/ --backbone ViT-B-32 --pretrained laion2b_s34b_b79k --shots 16

    This example caches the images, fine-tunes (stage 1), repairs (stage 2), tests, and writes solution, report and
    figure. An extra run trains on half of the classes: it measures what new classes lose or gain, and chooses --lam
    and --tau on validation images unless you give them. The solution itself is trained on all classes. If the command
    is interrupted, run it again: it continues from the last finished epoch. --epochs also sets the epochs of stage 1.
    """
    import mergetune as mt

    with errors():
        given, seed = keywords(FitOptions, options), options["seed"]
        stage_1 = read_tuning(tuning, but=("method", "template", "zero_shot", "seed"))
        if images is not None and features is None:
            opened = partial(open_images, images, root)
        elif features is not None and images is None:
            opened = partial(open_cache, features, classes, shots=shots, seed=seed)
        else:
            got = "neither" if images is None else f"{images} and --cache {features}"
            raise ValueError(f"give either a folder of images or --cache, got {got}")
        if images is None and not (tuned and folder):
            raise ValueError("--tuned and --out are needed with --cache")
        if images is None and tuning:
            raise ValueError(f"--tune is for stage 1 on images and cannot be used with --cache, got {tuning[0]!r}")
        for option, value in (("--no-measure", no_measure), ("--no-choose", no_choose), ("--retain", retain)):
            if images is None and value:
                raise ValueError(f"{option} needs images and cannot be used with --cache: leave it out")
        if images is not None and val is not None:
            raise ValueError(f"--val needs --cache, got images and --val {val}: leave --val out")
        folder = folder or Path("out") / (images.resolve().stem if images else "")
        data = opened()
        retained = None if retain is None else open_retained(retain)
        clip = mt.load_clip(backbone, pretrained, device=device, allow_torchscript=allow_torchscript)
        learned = data.base_novel()[0] if images and classes == "base" else data
        solutions = [read_solution(path, learned, position) for path in tuned]
        if images is None:
            zero_shot: Any = template
            if len(template) == 1 and "{}" not in template[0] and Path(template[0]).exists():
                zero_shot = read_solution(template[0], learned, position)
            chosen_on = None if val is None else open_cache(val, classes)
            result = mt.fit(clip, data, solutions, zero_shot=zero_shot, val=chosen_on, resume=folder, **given)
            result.save(folder)
            say = partial(_finish, as_json, result, folder)
        else:
            del given["seed"]
            for name in ("lam", "tau"):  # what the user did not set is chosen
                source = context.get_parameter_source(name)
                if source is not None and source.name == "DEFAULT":
                    del given[name]
            found = mt.fit_dataset(
                clip, data, folder, tuned=solutions, method=method, classes=classes, shots=shots,
                template=template[0] if len(template) == 1 else template, seed=seed,
                measuring=not no_measure, choosing=not no_choose, retain=retained,
                ignored=left_out_files(images) if images.is_dir() else None,
                tune_options={"epochs": given["epochs"]} | stage_1, fit_options=given,
                cache_options={"workers": workers, "max_pixels": max_pixels}, report=announce(as_json),
            )  # fmt: skip
            say = partial(_finish_images, as_json, found, folder, classes)
    say()


def _finish(as_json: bool, result: Any, folder: Path) -> None:
    record = {"settings": result.settings, "history": result.history, "timings": result.timings}
    finish(as_json, record, f"solution in {folder}", {"train": result.history[-1]})


def _finish_images(as_json: bool, found: Any, folder: Path, classes: str) -> None:
    if not first_rank():
        return
    if as_json:
        print_json(found.to_json())
    else:
        print_result(found, folder, classes=classes)
