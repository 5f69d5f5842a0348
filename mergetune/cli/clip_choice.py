"""The CLIP of a command: the one that is named, or the one that its caches and solutions record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from mergetune.cli.running import first_rank
from mergetune.cli.shared import err
from mergetune.cli.terminal import visible


def clip_for(
    backbone: str | None,
    pretrained: str | None,
    *,
    device: str = "cpu",
    precision: str = "float32",
    allow_torchscript: bool = False,
    caches: Sequence[Any] = (),
    solutions: Mapping[str, Any] | Sequence[Any] = (),
    only_heads: bool = False,
) -> Any:
    """Returns the backbone that --backbone names, or the one that a cache or a solution records (told in a line).

    Where none is named and none can be loaded, heads and caches are enough for commands that need no tower.

    Args:
        backbone: value of --backbone; None takes the first record, of caches before solutions.
        pretrained: value of --pretrained.
        device: device of the model.
        precision: precision of the model, see :func:`mergetune.load_clip`.
        allow_torchscript: see :func:`mergetune.load_clip`.
        caches: feature caches that the command uses.
        solutions: solutions that the command uses, or {path: solution}, so that messages can name them.
        only_heads: whether the command needs no tower if all solutions are heads.

    Raises:
        ValueError: no name is given or recorded, or the caches and solutions were made with different backbones.
    """
    import mergetune as mt
    from mergetune.solutions.origins import check_origins

    if backbone is None and pretrained is not None:
        raise ValueError(f"--pretrained needs --backbone, the name of the model, got {pretrained!r} alone")
    loading = {"device": device, "precision": precision, "allow_torchscript": allow_torchscript}
    if backbone is not None:
        clip, named_by = mt.load_clip(backbone, pretrained, **loading), "--backbone"
    else:
        try:
            clip, named_by = _recorded_clip(caches, solutions, loading)
        except ValueError as error:
            clip, named_by = _feature_space(caches, solutions, device) if only_heads else None, "the cache"
            if clip is None:
                raise
            if first_rank():
                said = f"no backbone is loaded, heads need none: logit scale {clip.logit_scale:.6g} ({error})"
                err.print(f"[dim]{escape(visible(said))}[/]", soft_wrap=True, highlight=False)
    check_origins(clip, named_by, caches, solutions)
    return clip


def _recorded_clip(
    caches: Sequence[Any], solutions: Mapping[str, Any] | Sequence[Any], loading: dict[str, Any]
) -> tuple[Any, str]:
    """The backbone that a cache or a solution records, which is told in a line, and who records it.

    Raises:
        ValueError: none is recorded, or the recorded one cannot be loaded.
    """
    import mergetune as mt
    from mergetune.solutions.origins import origins

    listed = origins(caches, solutions)
    recorded = [origin for origin in listed if origin.backbone]
    if not recorded:
        owners = " nor ".join(origin.owner for origin in listed)
        reason = f": no backbone is recorded by {owners}" if owners else ""
        raise ValueError(f"--backbone is needed{reason}; `mergetune models` lists the names")
    named_by, (name, weights) = recorded[0].owner, recorded[0].parts()
    if first_rank():
        said = f"backbone {recorded[0].backbone}, recorded by {named_by}"
        err.print(f"[dim]{escape(visible(said))}[/]", soft_wrap=True, highlight=False)
    try:
        return mt.load_clip(name, weights, **loading), named_by
    except (ValueError, TypeError, LookupError, OSError) as error:
        said = str(error) if isinstance(error, ValueError | OSError) else repr(error)
        raise ValueError(
            f"{named_by} records the backbone {str(recorded[0].backbone)!r}, which cannot be loaded: {said}; "
            "--backbone names another"
        ) from error


def _feature_space(caches: Sequence[Any], solutions: Mapping[str, Any] | Sequence[Any], device: str) -> Any:
    """The space of the features of a cache, if all solutions are heads; else None.

    Its logit scale is the largest of the heads: others, such as scikit-learn's, hold the factor in their rows.
    """
    import mergetune as mt

    heads = list(solutions.values() if isinstance(solutions, Mapping) else solutions)
    if not (caches and heads and all(isinstance(head, mt.Head) for head in heads)):
        return None
    origin = {"name": caches[0].backbone, "fingerprint": caches[0].fingerprint}
    return mt.FeatureSpace(caches[0].dim, max(head.logit_scale for head in heads), **origin, device=device)
