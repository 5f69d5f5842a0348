"""Which backbone feature caches and solutions were made with: its recorded name, and whether a CLIP is that one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from mergetune.clip import FrozenClip
from mergetune.clip.backbone_files import CONFIG
from mergetune.data import FeatureCache
from mergetune.facts.backbones import FOLDER, HUB, recorded_parts, spelled, tags_by_model
from mergetune.solutions.base import Solution
from mergetune.solutions.prompt_tokens import OtherClasses
from mergetune.solutions.stack import Stack

Named = Mapping[str, Solution] | Sequence[Solution]
"""Solutions, or {path: solution}; the paths name them in messages."""


@dataclass(frozen=True)
class Origin:
    """What a cache or a solution records of its backbone.

    Attributes:
        owner: the cache or the solution, in words.
        backbone: recorded name of the backbone; empty if there is none.
    """

    owner: str
    backbone: str

    def parts(self) -> tuple[str, str | None]:
        """Name and weights for :func:`mergetune.load_clip`.

        A record may come from a stranger. It alone never starts a download from the Hub: a repository is used only if
        this computer has downloaded it before.

        Raises:
            ValueError: the recorded name cannot be loaded, its folder or checkpoint does not exist, or its repository
                was never downloaded here.
        """
        name, weights = recorded_parts(self.backbone)
        said = f"{self.owner} records the backbone {self.backbone}"
        if name.startswith(FOLDER) and not Path(name.removeprefix(FOLDER)).is_dir():
            raise ValueError(f"{said}, which is no folder any more: give --backbone {FOLDER}PATH with its place now")
        if name.startswith(HUB) and not isinstance(try_to_load_from_cache(name.removeprefix(HUB), CONFIG), str):
            raise ValueError(
                f"{said}, which was never downloaded here, and a record alone starts no download from the Hub: if you "
                f"trust this repository, give --backbone {name}"
            )
        file = weights is not None and weights not in tags_by_model().get(name, ()) and bool(Path(weights).suffix)
        if file and not Path(str(weights)).exists():
            raise ValueError(
                f"{said}, and the checkpoint {weights} does not exist any more: give --backbone {name} --pretrained "
                "PATH with its place now"
            )
        try:
            return spelled(name, weights)
        except ValueError as error:
            raise ValueError(f"{said}, which cannot be loaded by this name: give --backbone ({error})") from error


def origins(caches: Sequence[FeatureCache] = (), solutions: Named = ()) -> tuple[Origin, ...]:
    """Returns what the caches, then the solutions record."""
    found = [
        Origin("the feature cache" if cache.path is None else f"feature cache {cache.path}", cache.backbone)
        for cache in caches
    ]
    for words, solution in _named(solutions):
        inside = solution.parts if isinstance(solution, Stack) else ()
        names = [part.backbone for part in (solution, *inside) if part.backbone]
        found.append(Origin(words, names[0] if names else ""))
    return tuple(found)


def check_origins(clip: FrozenClip, named_by: str, caches: Sequence[FeatureCache] = (), solutions: Named = ()) -> None:
    """Checks that a CLIP is the one with which caches and solutions were made: weights are compared, names are told.

    Args:
        clip: the CLIP.
        named_by: who chose the CLIP, in words, for example "--backbone".
        caches: feature caches.
        solutions: solutions, or {path: solution}.

    Raises:
        ValueError: a cache or a solution was made with another backbone; the message names both. Or class names are
            not those of a solution's file.
    """
    listed = origins(caches, solutions)
    for origin, cache in zip(listed, caches, strict=False):
        foreign = cache.fingerprint and not clip.has_fingerprint("image", cache.fingerprint)
        if foreign or cache.dim != clip.embed_dim:
            raise _other_backbone(origin, clip, named_by)
    for origin, (_, solution) in zip(listed[len(caches) :], _named(solutions), strict=True):
        try:
            solution.for_clip(clip)
        except OtherClasses as error:
            raise OtherClasses(f"{origin.owner}: {error}") from error
        except ValueError as error:
            raise _other_backbone(origin, clip, named_by, error) from error


def _named(solutions: Named) -> list[tuple[str, Solution]]:
    if isinstance(solutions, Mapping):
        return [(f"solution {path}", solution) for path, solution in solutions.items()]
    return [(f"the {solution.kind}", solution) for solution in solutions]


def _other_backbone(origin: Origin, clip: FrozenClip, named_by: str, reason: ValueError | None = None) -> ValueError:
    if not origin.backbone:
        why = "" if reason is None else f": {reason}"
        return ValueError(
            f"{origin.owner} was made with another backbone than {clip.name}, which {named_by} names{why}"
        )
    if recorded_parts(origin.backbone) == recorded_parts(clip.name):
        return ValueError(
            f"{origin.owner} was made with {clip.name}, but that backbone's weights are others now: use the weights of "
            "that time, or make it again"
        )
    return ValueError(
        f"{origin.owner} was made with {origin.backbone}, but {named_by} names {clip.name}: use one backbone for all"
    )
