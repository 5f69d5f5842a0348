"""The verdict of `fit` on images: one sentence, by explicit rules, from paired differences on test images."""

from __future__ import annotations

from collections.abc import Mapping

from mergetune.experiments.paired import HM, Estimate, Labels, Right, accuracies, gains

POOR = 10.0  # points that zero-shot CLIP lies below the fine-tuned solution, from which on it is a poor anchor


def verdict(
    right: Mapping[str, Right],
    labels: Labels,
    *,
    row: str,
    tuned: str,
    zero_shot: str,
    title: str,
    head: bool = False,
) -> str:
    """One sentence about a solution; ± is half of a 95 % interval of the paired difference.

    The first rule that holds decides. "Surely" means that the whole interval lies on one side of 0.

    1. Zero-shot CLIP is more than 10 points below the fine-tuned solution on the learned classes, and the solution is
       surely below the fine-tuned one there: zero-shot is poor, a head is advised.
    2. The solution is surely below the fine-tuned one in the harmonic mean: it is not to be used.
    3. The solution is surely below zero-shot CLIP in the harmonic mean: it is not to be used.
    4. No difference among the three is sure: tuning changed nothing measurable; the simplest, zero-shot, may be kept.
    5. No difference to the fine-tuned solution is sure: that is said; the simpler one, the fine-tuned, may be kept.
    6. Otherwise the differences are told.

    Args:
        right: row -> part -> which test images are classified correctly. Parts are "base" and "novel"; or one part, if
            new classes were not measured.
        labels: class number of each test image.
        row, tuned, zero_shot: rows of the solution, of the fine-tuned solution and of zero-shot CLIP.
        title: name of the fine-tuned solution in the sentence.
        head: whether the fine-tuned solution is a head, so that none needs to be advised.
    """
    learned = next(iter(labels))
    to_tuned, to_zero = (gains(right[row], right[other], labels) for other in (tuned, zero_shot))
    whole = HM if HM in to_tuned else learned
    zero, best = (accuracies(right[other])[learned] for other in (zero_shot, tuned))
    if row == zero_shot:
        return f"Zero-shot CLIP is the best choice here: {_told(to_tuned, whole, title)}."
    if best - zero > POOR and to_tuned[learned].below:
        loss, way_on = to_tuned[learned], "keep the head" if head else "use --method head or --method auto"
        return (
            f"Zero-shot CLIP is poor here ({zero:.1f} % on your classes): {row} repairs towards it and loses "
            f"{-loss.value:.1f} ± {loss.reach:.1f} points on them against {title}; {way_on}."
        )
    if row != tuned and to_tuned[whole].below:
        return f"Do not use {row} here: {_told(to_tuned, whole, title)}; keep the fine-tuned solution."
    if to_zero[whole].below:
        return f"Do not use {row} here: {_told(to_zero, whole, 'zero-shot CLIP')}; zero-shot CLIP alone is better."
    beside = f"{to_zero[whole]} {_unit(whole)} against zero-shot CLIP"
    if row == tuned:
        return f"The {tuned} solution is the best choice here: {beside}."
    if not any(gain.above or gain.below for gain in to_tuned.values()):
        from_zero = gains(right[tuned], right[zero_shot], labels)
        if not any(gain.above or gain.below for gain in (*to_zero.values(), *from_zero.values())):
            return (
                f"Tuning changed nothing measurable here: {_told(to_tuned, whole, title)}; {beside}; keep the simplest "
                "one, zero-shot CLIP."
            )
        same = f"{row} and {title} cannot be told apart here: {_told(to_tuned, whole, title)}"
        return f"{same}; {beside}; keep the simpler one, {title}."
    return f"{row}: {_told(to_tuned, whole, title)}; {beside}."


def _told(found: Mapping[str, Estimate], whole: str, title: str) -> str:
    if whole != HM:
        return f"{found[whole]} points on your classes against {title} (new classes were not measured)"
    base, novel, both = found["base"], found["novel"], found[HM]
    return f"{novel} points on new classes and {base} on yours, {both} HM, against {title}"


def _unit(whole: str) -> str:
    return "HM" if whole == HM else "points"
