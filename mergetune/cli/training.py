"""`mergetune tune` runs stage 1, fine-tuning; `mergetune fit` runs stage 2, MERGETUNE."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.clip_choice import clip_for
from mergetune.cli.dry_runs import DryRun, dry_run_of_fit, dry_run_of_images, dry_run_of_tune
from mergetune.cli.options import (
    CLASSNAMES_HELP,
    AllowTorchscript,
    BackboneIfNeeded,
    Background,
    Cache,
    Classes,
    Device,
    HeadClassNames,
    HeadName,
    Json,
    MaxPixels,
    Overwrite,
    Position,
    Pretrained,
    Root,
    Shots,
    SplitSeed,
    TestShare,
    ValShare,
    Workers,
    keywords,
    read_tuning,
    takes,
)
from mergetune.cli.own_images import open_retained, print_result
from mergetune.cli.running import suggest
from mergetune.cli.shared import (
    announce,
    check_folder,
    err,
    errors,
    finish,
    first_rank,
    ignored_in,
    is_saved,
    names_of_rows,
    open_cache,
    open_images,
    print_json,
    read_solution,
    refuse_out_inside,
    suggest_use,
    warn_of_few,
)
from mergetune.facts import FitOptions, TuneOptions
from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS, PROMPT_METHODS

Val = Annotated[
    Path | None,
    typer.Option(
        "--val", help="Feature cache of validation images; the best epoch is chosen on it. Never use test images."
    ),
]


@takes(TuneOptions)
def tune(
    features: Cache,
    out: Annotated[Path, typer.Option("--out", help="Folder for the solution and the training report.")],
    backbone: BackboneIfNeeded = None,
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
    weight: HeadName = None,
    names: HeadClassNames = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Stage 1: fine-tune a prompt (CoOp, KgCoOp), a linear head, a class residual or an image map on cached features.

    A residual or a map is put on a solution, which does not change: mergetune tune --method residual --base out/fit ...

    If the command is interrupted, run it again: it continues from the last finished epoch. With other settings and the
    same --out it works in a new folder, such as OUT/run-2-lam-4; `mergetune runs OUT` lists the runs.
    """
    from mergetune.clip import check_templates
    from mergetune.training import tune_job

    with errors():
        check_folder(out)
        texts = () if is_saved(keywords(TuneOptions, options)["zero_shot"]) else options["zero_shot"] or ()
        check_templates([options["template"], *texts])
        data = open_cache(features, classes, shots=shots, seed=options["seed"], split="train")
        chosen_on = None if val is None else open_cache(val, classes, split="val", option="--val")
        given = keywords(TuneOptions, options)
        opened = partial(read_solution, features=data, classnames=names_of_rows(names), name=weight)
        below = None if base is None else opened(str(base))
        known = {} if below is None else {str(base): below}
        if is_saved(given["zero_shot"]):
            path = given["zero_shot"]
            given["zero_shot"] = known[path] = opened(path)
        clip = clip_for(
            backbone, pretrained, device=device, allow_torchscript=allow_torchscript,
            caches=[cache for cache in (data, chosen_on) if cache is not None],
            solutions=known, only_heads=given["method"] not in PROMPT_METHODS,
        )  # fmt: skip
        if dry_run:
            stage_1 = {"base": below, **given}
            dry_run_of_tune(clip, data, stage_1, f"Would tune on {features} into {out}.", as_json)
            return
        job = tune_job(clip, data, base=below, val=chosen_on, **given)
        result, folder = _train(job, out, overwrite)
    if base is None:
        drawn = (("--classes", classes, "all"), ("--shots", shots, None), ("--seed", options["seed"], TuneOptions.seed))
        suggest(
            "fit", "--cache", features, "--tuned", folder, "--out", out.parent / "merged",
            *((option, None if value == usual else value) for option, value, usual in drawn),
        )  # fmt: skip
    else:
        suggest_use(folder, features, classes)
    _finish(as_json, result, folder)


@takes(FitOptions, but=("zero_shot",))
def fit(
    context: typer.Context,
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
    backbone: BackboneIfNeeded = None,
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
    weight: HeadName = None,
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
    classnames: Annotated[
        Path | None,
        typer.Option(
            "--classnames",
            help=f"{CLASSNAMES_HELP} With --cache: class names of --tuned heads whose files name none, one per line.",
        ),
    ] = None,
    val_share: ValShare = None,
    test_share: TestShare = None,
    split_seed: SplitSeed = None,
    workers: Workers = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    background: Background = BACKGROUND,
    overwrite: Overwrite = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="With images: leave out images that cannot be read.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Stage 2, MERGETUNE, on a feature cache; or all stages on a folder of images.

    mergetune fit photos/ --backbone ViT-B-32 --pretrained laion2b_s34b_b79k --shots 16

    This example caches the images, fine-tunes (stage 1), repairs (stage 2), tests, and writes solution, report and
    figure. An extra run trains on half of the classes: it measures what new classes lose or gain, and chooses --lam
    and --tau on validation images unless you give them. The solution itself is trained on all classes. If the command
    is interrupted, run it again: it continues from the last finished epoch. With other settings and the same --out it
    works in a new folder, such as OUT/run-2-lam-4; `mergetune runs OUT` lists the runs. --epochs also sets the epochs
    of stage 1.
    """
    import mergetune as mt
    from mergetune.clip import check_templates
    from mergetune.data.image_files import describe_ignored
    from mergetune.experiments import checked_making, dataset_cache, dataset_call
    from mergetune.experiments.own_plan import check_names
    from mergetune.training import fit_job, forgotten_if_refused, has_begun, run_folder

    with errors(), ExitStack() as held:
        given, seed = keywords(FitOptions, options), options["seed"]
        stage_1 = read_tuning(tuning, but=("method", "template", "zero_shot", "seed"))
        if images is not None and features is None:
            reading = {"classnames": classnames, "val": val_share, "test": test_share, "seed": split_seed}
            opened = partial(open_images, images, root, **reading)
        elif features is not None and images is None:
            opened = partial(open_cache, features, classes, shots=shots, seed=seed, split="train")
        else:
            got = "neither" if images is None else f"{images} and --cache {features}"
            raise ValueError(f"give either a folder of images or --cache, got {got}")
        if images is None and not (tuned and folder):
            raise ValueError("--tuned and --out are needed with --cache")
        if images is None and tuning:
            raise ValueError(f"--tune is for stage 1 on images and cannot be used with --cache, got {tuning[0]!r}")
        for option, value in (
            ("--no-measure", no_measure), ("--no-choose", no_choose), ("--retain", retain),
            ("--val-share", val_share), ("--test-share", test_share), ("--split-seed", split_seed),
        ):  # fmt: skip
            if images is None and value is not None and value is not False:
                raise ValueError(f"{option} needs images and cannot be used with --cache: leave it out")
        if images is not None and val is not None:
            raise ValueError(f"--val needs --cache, got images and --val {val}: leave --val out")
        if folder is not None:
            check_folder(folder)
        folder = folder or Path("out") / (images.resolve().stem if images else "")
        if images is not None and root is None:
            refuse_out_inside(images, folder)
        data = opened()
        retained = None if retain is None else open_retained(retain)
        learned = data.base_novel()[0] if images and classes == "base" else data
        if images is not None:
            warn_of_few(shots, learned.few_shot(shots, seed))
        called = names_of_rows(classnames) if images is None else None
        hint = "" if images is not None else "; --classnames FILE names them"
        tuned_from = partial(
            read_solution, features=learned, position=position, classnames=called, name=weight, way_on=hint
        )
        solutions = [tuned_from(path) for path in tuned]
        zero_shot: Any = template
        known = dict(zip(tuned, solutions, strict=True))
        if images is None and len(template) == 1 and is_saved(template[0]):
            zero_shot = known[template[0]] = tuned_from(template[0])
        chosen_on = None if val is None else open_cache(val, classes, split="val", option="--val")
        ignored = {} if images is None or root is not None else ignored_in(images, data)
        if images is not None:  # what names and labels decide is said before the model is loaded
            check_names(data, tuned=solutions, classes=classes, template=template, retain=retained)
        elif zero_shot is template:
            check_templates(template)
        if ignored and first_rank():
            announce(as_json)(describe_ignored(ignored))
        clip = clip_for(
            backbone, pretrained, device=device, allow_torchscript=allow_torchscript,
            caches=[cache for cache in (None if images else data, chosen_on) if cache is not None], solutions=known,
            only_heads=zero_shot is not template,
        )  # fmt: skip
        if images is None:
            if dry_run:
                plan = f"Would run stage 2 on {features} and write into {folder}."
                dry_run_of_fit(clip, data, given | {"tuned": solutions, "zero_shot": zero_shot}, plan, as_json)
                return
            job = fit_job(clip, data, solutions, zero_shot=zero_shot, val=chosen_on, **given)
            result, folder = _train(job, folder, overwrite)
            say = partial(_finish, as_json, result, folder)
        else:
            del given["seed"]
            on_error = "skip" if skip_unreadable else "raise"
            for free in ("lam", "tau"):  # what the user did not set is chosen
                source = context.get_parameter_source(free)
                if source is not None and source.name == "DEFAULT":
                    del given[free]
            asked: dict[str, Any] = dict(
                tuned=solutions, method=method, classes=classes, shots=shots,
                template=template[0] if len(template) == 1 else template, seed=seed,
                measuring=not no_measure, choosing=not no_choose, retain=retained,
                ignored=ignored,
                tune_options={"epochs": given["epochs"]} | stage_1, fit_options=given,
            )  # fmt: skip
            if dry_run:
                dry_run_of_images(clip, data, asked, folder, workers, as_json)
                return
            checked_making(clip, data, **asked)  # a refused call makes no folder
            call = dataset_call(clip, data, **asked, background=background)
            run = run_folder(folder, **call, overwrite=overwrite, held=held)
            if (run / "report.json").is_file():
                announce(as_json)("this run was finished before: nothing is trained, only tested again")
            elif has_begun(run):
                announce(as_json)(f"continuing the run in {run} after its last finished epoch")
            with forgotten_if_refused(run):
                found = mt.fit_dataset(
                    clip, data, run, cache=dataset_cache(folder, run), **asked, report=announce(as_json),
                    cache_options={
                        "workers": workers, "max_pixels": max_pixels, "background": background, "on_error": on_error,
                        "overwrite": overwrite,
                    },
                )  # fmt: skip
            say = partial(_finish_images, as_json, found, run, dataset_cache(folder, run), classes)
    if features is not None:
        suggest_use(folder, features, classes)
    say()


def _train(job: Any, out: Path, overwrite: bool) -> tuple[Any, Path]:
    """Trains a job in the folder of its run, saves the result there, and returns both."""
    from mergetune.training import in_words_of, older_settings_of, run_folder, settings_of, train_together

    with ExitStack() as held:
        folder = run_folder(
            out, settings_of(job), in_words=in_words_of(job), older=older_settings_of(job), overwrite=overwrite,
            held=held,
        )  # fmt: skip
        _say_where(folder, job.training.epochs)
        (result,) = train_together([replace(job, resume=folder)])
        result.save(folder)
    return result, folder


def _say_where(folder: Path, epochs: int) -> None:
    """Says in a line on stderr that a run was finished before, or after which epoch it continues."""
    from mergetune.training import finished_epochs

    if (done := finished_epochs(folder)) and first_rank():
        finished = "this run was finished before: nothing is trained"
        said = finished if done >= epochs else f"continuing after epoch {done} of {epochs}"
        err.print(f"[dim]{said}[/]", highlight=False)


def _finish(as_json: bool, result: Any, folder: Path) -> None:
    from mergetune.training import run_title

    record = {"settings": result.settings, "history": result.history, "timings": result.timings, "out": str(folder)}
    finish(as_json, record, f"solution: {run_title(folder)}", {"train": result.history[-1]})


def _finish_images(as_json: bool, found: Any, run: Path, caches: Path, classes: str) -> None:
    if not first_rank():
        return
    if as_json:
        print_json(found.to_json())
    else:
        print_result(found, run, caches, classes=classes)
