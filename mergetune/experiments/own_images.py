"""Own images in one call: measured on held-out classes, chosen on validation images, trained on all, with a report."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mergetune.clip import PLAIN, FrozenClip, check_templates
from mergetune.clip.backbone import check_clip
from mergetune.clip.class_texts import check_texts
from mergetune.data import Dataset, FeatureCache, ImageList, cache_features
from mergetune.evaluation import BaseNovel, Report, accuracy, connectivity, plot
from mergetune.experiments.canary import Recognised, concept_names, recognised, tell_apart
from mergetune.experiments.cells import Fold
from mergetune.experiments.choosing import Choice, default_setting, settings_to_try
from mergetune.experiments.engine import Candidate, Together, counted, reports, tested, usual
from mergetune.experiments.making import HEAD, MERGETUNE, TUNED, ZERO_SHOT, Making
from mergetune.experiments.measuring import Measured, fold_of, measure
from mergetune.experiments.own_plan import check_names, kinds_of, plan_images, stage_1_of, why_not
from mergetune.experiments.paired import right_of
from mergetune.experiments.verdict import verdict
from mergetune.facts.brief import brief
from mergetune.facts.function_options import TUNE_METHODS
from mergetune.io import write_json, writing_in
from mergetune.solutions import Solution, zero_shot_like
from mergetune.training import FitResult


@brief("result", "reports", "figure")
@dataclass(frozen=True)
class FolderResult:
    """The result of :func:`fit_dataset`.

    Attributes:
        result: training result of the saved solution.
        reports: parts of the test images -> row -> accuracy. With ``classes="all"`` the part is "all"; with "base" the
            parts are "base" and "novel", and "seen" and "unseen" for the same images among all classes.
        figure: loss and accuracy on the paths between zero-shot, fine-tuned solution and MERGETUNE.
        row: row of the saved solution: "MERGETUNE", or the kind that method "auto" chose.
        measured: row -> accuracy on the learned half ("base") and on the other half ("novel") of the classes, of
            solutions that were trained on the learned half; None if this was not measured.
        halves: "base" and "novel" -> class names of both halves; empty if nothing was measured.
        settings: choice of ``lam`` and ``tau``; None if nothing was chosen.
        kinds: choice of the kind; None if nothing was chosen.
        left_out: what was not done ("measuring", "choosing") -> the reason.
        concept_names: row -> concept names that are recognised as before. Rows of fixed classes are left out.
        retained: row -> accuracy on the retained pictures; empty without ``retain``.
        verdict: one sentence.
        seconds: part of the work -> seconds that this call spent on it.
        ignored: files of the folder that are no images: type -> number.
    """

    result: FitResult
    reports: dict[str, dict[str, Report]]
    figure: Path
    row: str = MERGETUNE
    measured: dict[str, BaseNovel] | None = None
    halves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Choice | None = None
    kinds: Choice | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    concept_names: dict[str, Recognised] = field(default_factory=dict)
    retained: dict[str, Report] = field(default_factory=dict)
    verdict: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.result.settings,
            "reports": {part: _as_json(found) for part, found in self.reports.items()},
            "figure": str(self.figure),
            "row": self.row,
            "measured": self.measured
            and {row: found.to_json() | {"hm_error": found.hm_error} for row, found in self.measured.items()},
            "halves": self.halves,
            "choice": {
                "settings": None if self.settings is None else self.settings.to_json(),
                "kinds": None if self.kinds is None else self.kinds.to_json(),
            },
            "left_out": self.left_out,
            "concept_names": _as_json(self.concept_names),
            "retained": _as_json(self.retained),
            "verdict": self.verdict,
            "seconds": self.seconds,
            "ignored": self.ignored,
        }


def _as_json(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to_json() for name, value in found.items()}


def fit_dataset(
    clip: FrozenClip,
    data: Dataset,
    out: str | Path,
    *,
    tuned: Sequence[Solution] = (),
    method: str = "coop",
    classes: str = "all",
    shots: int | None = 16,
    template: str | Sequence[str] = PLAIN,
    seed: int = 1,
    measuring: bool = True,
    choosing: bool = True,
    retain: Dataset | None = None,
    cache: str | Path | None = None,
    ignored: Mapping[str, int] | None = None,
    tune_options: dict[str, Any] | None = None,
    fit_options: dict[str, Any] | None = None,
    cache_options: dict[str, Any] | None = None,
    progress: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> FolderResult:
    """Go from images to a saved solution, ``report.json`` and ``paths.png``. If killed, the same call continues.

    A measuring run first trains on a random half of the classes and is tested on both halves, because nothing can be
    learned about new classes from solutions that know all of them. ``lam`` and ``tau`` are chosen in this run, on
    validation images of both halves. The chosen setting is then trained on all classes: that solution is saved.
    Validation images are those of the val split, training images that were not drawn, and all images of the other half
    that are no test images. Test images decide nothing; they are looked at when everything is chosen and trained.

    Args:
        clip: the frozen CLIP.
        data: images with a training and a test split, for example from :func:`mergetune.ImageFolder`.
        out: folder for solutions, report and figure.
        tuned: fine-tuned solutions of the training classes; none: stage 1 trains one. With ``classes="all"`` they have
            learned all classes, so that nothing is left to measure new classes on, and nothing is measured or chosen.
        method: method of stage 1, see :func:`mergetune.tune`; or "auto", which also chooses the kind of solution:
            MERGETUNE, zero-shot, the fine-tuned solution, a head, and residuals with and without an image map.
        classes: "all" trains and tests on all classes; "base" trains on the first half and tests on both halves, and
            needs no measuring run.
        shots: training images per class; None takes all images.
        template: one or more zero-shot texts.
        seed: seed of the draws and the training.
        measuring: whether to do the measuring run.
        choosing: whether to choose. ``lam`` or ``tau`` in ``fit_options`` are taken as given in any case.
        retain: pictures of other classes, on which the solutions are tested beside zero-shot CLIP.
        cache: folder for the feature caches. None is ``out/cache``.
        ignored: files that were left out, by type, for the report.
        tune_options, fit_options, cache_options: more keyword arguments of :func:`mergetune.tune`,
            :func:`mergetune.fit` and :func:`mergetune.cache_features`.
        progress: show bars if stderr is a terminal.
        report: function that is told in one line what is about to be done.

    Raises:
        ValueError: an argument is out of range, or solutions, images and CLIP do not belong together.
        RuntimeError: another process works in ``out``.
    """
    out, clock, given = Path(out), _Clock(), dict(fit_options or {})
    making = checked_making(
        clip, data, tuned=tuned, method=method, classes=classes, template=template, seed=seed,
        retain=retain, tune_options=tune_options, fit_options=given, progress=progress,
    )  # fmt: skip
    stage_1, texts = making.method, making.templates
    images = plan_images(
        data, tuned=tuned, classes=classes, shots=shots, seed=seed, measuring=measuring, choosing=choosing,
        retain=retain,
    )  # fmt: skip
    halves, left_out = images.halves, dict(images.left_out)
    draw = f"{classes}-{'all' if shots is None else shots}-seed-{seed}"  # another draw is another cache
    with writing_in(out):
        with clock.part("encoding"):
            report(f"encoding {', '.join(f'{len(part)} {name}' for name, part in images.parts.items())} images once")
            encode = partial(
                _encoded, clip, Path(cache or out / "cache"), {**(cache_options or {}), "progress": progress}
            )
            features, test = encode(f"train-{draw}", images.training), encode("test", images.test)
            others, pictures = images.validation, images.retained
            validation = (
                None if others is None else encode(f"val-{draw}", others, views=1)
            )  # nothing is trained on these
            shown = None if pictures is None else encode(f"retained-{_short(pictures)}", pictures, views=1)

        fold = fold_of(features, validation, halves, texts, seed, hold_out=choosing) if halves else None
        reason = why_not(fold, left_out, choosing=choosing)
        left_out |= {"choosing": reason} if reason else {}
        found, row, setting = None, MERGETUNE, default_setting(given)
        if fold is not None and (classes == "all" or not reason):
            settings, kinds = settings_to_try(given), kinds_of(method, stage_1)
            report(_announced(fold, data, len(settings) if not reason else 1, kinds))
            with clock.part("measuring run"):
                found = measure(
                    making, fold, out / "measure", settings, kinds=kinds, tuned=tuned if classes == "base" else (),
                    stage_1=out / "tuned" if classes == "base" else None, choosing=not reason,
                )  # fmt: skip
            row, setting = found.row, found.setting
        with clock.part("training"):
            if found and classes == "base":
                final = found
                found.made.save(out)
            else:
                report(f"{row} on {len(features)} images of {len(features.classnames)} classes")
                final = _trained(making, features, tuned, row, setting, out)

        with clock.part("testing"):
            half_tests = {part: test.select_classes(own) for part, own in halves.items()}
            tests = half_tests if classes == "base" else {"all": test}
            table = _table(making, template, final)
            by_row = _scores(table, tests)
            by_part = {part: {line: parts[part] for line, parts in by_row.items()} for part in by_row[ZERO_SHOT]}
            judged = _table(making, template, found) if found and classes == "all" else table
            figure = _figure(making, template, final, tests, out)
            open_rows = [line for line in table if line.row not in _closed(final)]
            canary = tell_apart(clip, concept_names(data.classnames), texts)
            made = FolderResult(
                final.made,
                by_part,
                figure,
                row,
                {line: BaseNovel(**parts) for line, parts in _scores(judged, half_tests).items()} if halves else None,
                {part: images.classnames for part, images in half_tests.items()},
                found and found.settings,
                found and found.kinds,
                left_out,
                {line.row: recognised(clip, line.classify, canary, texts) for line in open_rows},
                {line.row: accuracy(line.classify, shown) for line in open_rows} if shown else {},
                _verdict(judged, half_tests or tests, row, tuned, stage_1),
                clock.seconds,
                dict(ignored or {}),
            )
        write_json(out / "report.json", made.to_json())
    return made


# -- what is done ------------------------------------------------------------------------------------------------------


def checked_making(
    clip: FrozenClip,
    data: Dataset,
    *,
    tuned: Sequence[Solution] = (),
    method: str = "coop",
    classes: str = "all",
    template: str | Sequence[str] = PLAIN,
    seed: int = 1,
    retain: Dataset | None = None,
    tune_options: Mapping[str, Any] | None = None,
    fit_options: Mapping[str, Any] | None = None,
    progress: bool = False,
    **_: Any,
) -> Making:
    """What the trainings of a call of :func:`fit_dataset` share. All values are checked; nothing is encoded or written.

    Args:
        clip, data: see :func:`fit_dataset`, and so are the other arguments. Those that change no training are ignored.

    Raises:
        TypeError, ValueError: an argument is out of range, or solutions, classes and CLIP do not belong together.
    """
    check_clip(clip)
    if not isinstance(data, Dataset):
        got = repr(data) if isinstance(data, str) else f"a {type(data).__name__}"
        raise TypeError(f"data must be a Dataset, got {got}: mergetune.ImageFolder(FOLDER) reads one")
    stage_1 = stage_1_of(clip, tuned, method, classes)
    texts = check_templates(template)
    making = Making(clip, texts, stage_1, seed, tune_options or {}, fit_options or {}, progress=progress)
    learned = check_names(data, tuned=tuned, classes=classes, template=texts, retain=retain)
    check_texts(clip, [*data.classnames, *(retain.classnames if retain else ())], texts)  # also those only tested on
    making.check(learned, tuned)
    return making


def _encoded(
    clip: FrozenClip, kept: Path, options: Mapping[str, Any], folder: str, images: ImageList, **more: Any
) -> FeatureCache:
    return cache_features(clip, images, kept / folder, **{**options, **more})


def _short(images: ImageList) -> str:
    """Short name of a list of images: another folder of retained pictures is another cache."""
    return f"{zlib.crc32(repr((str(images.root.resolve()), images.files)).encode()):08x}"


def _announced(fold: Fold, data: Dataset, settings: int, kinds: Sequence[str]) -> str:
    tried = f"{settings} settings" if settings > 1 else "1 setting"
    tried += f" and {len(kinds) - 1} other kinds" if len(kinds) > 1 and settings > 1 else ""
    return f"measuring run: learns {len(fold.train.classnames)} of {len(data.classnames)} classes, {tried}"


def _trained(
    making: Making,
    features: FeatureCache,
    tuned: Sequence[Solution],
    row: str,
    setting: dict[str, float],
    out: Path,
) -> Measured:
    """The final solutions: fine-tuned, MERGETUNE and the chosen kind, which is saved in ``out``."""
    anchors = list(tuned) or [making.tuned(features, out / "tuned").solution]
    (merged,) = making.merged(features, anchors, {out if row == MERGETUNE else out / "mergetune": setting})
    made = making.kind(row, features, anchors[0], merged, out)
    made.save(out)
    return Measured(anchors[0], merged, made, row, setting, None, None, {})


# -- what is shown -----------------------------------------------------------------------------------------------------


def _table(making: Making, template: str | Sequence[str], found: Measured) -> list[Candidate]:
    """The rows of a table: the usual ones, and the chosen kind."""
    together = Together(making.clip)

    def classify(solution: Solution):
        return together.classifier(solution if solution.classnames is None else making.classifier(solution))

    table = usual(together.classifier(template), classify(found.tuned), classify(found.merged.solution), name=TUNED)
    if found.row not in [candidate.row for candidate in table]:
        table.append(Candidate(found.row, making.classifier(found.made.solution)))
    return table


def _scores(table: Sequence[Candidate], tests: Mapping[str, FeatureCache]) -> dict[str, dict[str, Report]]:
    """Row -> part -> accuracy."""
    return reports(counted(tested(table, tests)), {part: images.classnames for part, images in tests.items()})


def _verdict(
    table: Sequence[Candidate], tests: Mapping[str, FeatureCache], row: str, tuned: Sequence[Solution], stage_1: str
) -> str:
    return verdict(
        {line.row: right_of(line.classify, tests) for line in table},
        {part: images.labels for part, images in tests.items()},
        row=row,
        tuned=TUNED,
        zero_shot=ZERO_SHOT,
        title="the fine-tuned solution" if tuned else TUNE_METHODS[stage_1],
        head=stage_1 == HEAD,
    )


def _closed(found: Measured) -> set[str]:
    """Rows of solutions that know only their own classes; zero-shot CLIP answers for them about other classes."""
    closed = {TUNED, "weight average", "logit ensemble", MERGETUNE} if found.tuned.classnames is not None else set()
    return closed | ({found.row} if found.made.solution.classnames is not None else set())


def _figure(
    making: Making, template: str | Sequence[str], final: Measured, tests: Mapping[str, FeatureCache], out: Path
) -> Path:
    merged, clip = final.merged.solution, making.clip
    start = zero_shot_like(clip, merged, template)
    if merged.classnames is not None:  # its paths exist for its own classes only
        tests = dict(list(tests.items())[:1])
    walks = {
        f"{part} classes, test images": connectivity(clip, start, final.tuned, merged, images)
        for part, images in tests.items()
    }
    plot(walks, out / "paths.png")
    return out / "paths.png"


class _Clock:
    """Seconds that parts of the work took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
