"""Space: class features, image features and logits as functions of a stacked state; loss and accuracy at its points.

Shapes: M points (the settings of a stacked state), K solutions, B images, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip, TextEncoder, prepare_classes, prepare_images
from mergetune.data import Batches
from mergetune.facts.brief import brief
from mergetune.facts.function_options import SPACES
from mergetune.solutions.base import Solution
from mergetune.solutions.kinds import check_compatible, in_one_form
from mergetune.solutions.states import State, inputs, stack_states, weighted_sums

CHUNK = 1 << 25  # class-weight values computed at once: 128 MB in float32
ROWS = 2048  # images per batch
SHARES = "image shares"  # state entry with the weights that mix the ends' image features; no coordinate of the space


@brief()
@dataclass(frozen=True, eq=False)
class Space:
    """A space of solutions for fixed classes: what an edited CLIP computes as a function of a stacked state.

    The M settings of a stacked state are points of the space. Training objective, paths, planes, spectra, merging and
    accuracy use these functions alone, so they work for every kind of solution. :func:`space_of` makes a space whose
    points are states of one form; :func:`span` makes a space that holds given solutions.

    Attributes:
        classes: states -> class features as they are interpolated, [M, C, D] or [M, C, D + 1] (with a bias), not
            normalised.
        images: states and the inputs of B images -> unit-norm image features, [M, B, D]. None if image features do not
            depend on the state: then the inputs are the features, [B, D].
        between: function that gives points on the line between two stacked states, see :meth:`Solution.between`.
        scale: factor on the logits.
        normalize: whether class features are scaled to unit norm before the product with image features.
        width: D.
        encoder: the packed text tower if class features come from context vectors, else None.
        mixture: function that mixes several states, see :meth:`Solution.mixture`.
        weights: number of values in the tower weights that one point replaces.
    """

    classes: Callable[[State], Tensor]
    images: Callable[[State, Tensor], Tensor] | None
    between: Callable[[State, State, float | Tensor], State]
    scale: float
    normalize: bool
    width: int
    encoder: TextEncoder | None = None
    mixture: Callable[[State, Tensor], State] = weighted_sums
    weights: int = 0

    def unit(self, weights: Tensor) -> Tensor:
        """Class features as the logits use them: scaled to unit norm if ``normalize``."""
        return F.normalize(weights, dim=-1) if self.normalize else weights

    def features(self, states: State, x: Tensor) -> Tensor:
        """Unit-norm image features, [M, B, D]; x itself, [B, D], if features do not depend on the state."""
        return x if self.images is None else self.images(states, x)

    def logits(self, states: State, x: Tensor) -> Tensor:
        """Logits [M, B, C] for the inputs of B images."""
        weights = self.unit(self.classes(states))
        return self.scale * inputs(self.features(states, x.to(weights)), weights) @ weights.mT


def space_of(
    clip: FrozenClip,
    form: Solution,
    classnames: Sequence[str],
    *,
    precision: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Space:
    """The space whose points are states of the same form as the state of ``form``.

    Args:
        clip: the CLIP that the solution was made for.
        form: a solution; its texts, logit scale and classes hold for all points.
        classnames: C names; for a solution with ``classnames``, these names in the same order.
        precision: precision of the towers.
        backend: "torch" runs the text tower with plain autograd, differentiable any number of times. None runs the
            fused text tower, differentiable once.

    Raises:
        ValueError: the CLIP or the class names do not belong to the solution.

    Example:
        >>> import mergetune as mt
        >>> from mergetune.solutions import space_of, stack_states
        >>> clip = mt.load_clip("icon-clip")
        >>> prompts = [mt.Prompt.random(clip, n_ctx=2, seed=seed) for seed in (1, 2, 3)]
        >>> space = space_of(clip, prompts[0], ["cat", "dog"])
        >>> space.classes(stack_states([prompt.state() for prompt in prompts])).shape  # [M, C, D]
        torch.Size([3, 2, 128])
    """
    form.check(clip)
    form.check_classes(classnames)
    edit = form.edit(clip, stack_states([form.state()], clip.device))
    classes = prepare_classes(clip, edit, classnames, precision=precision, backend=backend)
    images = prepare_images(clip, edit, form.image_input, precision=precision)
    return Space(
        classes=lambda states: classes(form.edit(clip, states)),
        images=None if images is None else lambda states, x: images(form.edit(clip, states), x),
        between=form.between,
        mixture=form.mixture,
        scale=clip.logit_scale if edit.scale is None else edit.scale,
        normalize=edit.normalize,
        width=clip.embed_dim,
        encoder=classes.encoder,
        weights=sum(weight[0].numel() for weight in edit.weights.values()),
    )


# -- given solutions as points of one space ----------------------------------------------------------------------------


@brief()
@dataclass(frozen=True, eq=False)
class Span:
    """K solutions as points of one space, which also contains their mixtures: the points of lines and planes.

    Attributes:
        space: the space that holds the solutions.
        ends: the K solutions as one stacked state of the space.
    """

    space: Space
    ends: State

    def points(self, mixtures: Tensor) -> State:
        """M points that mix the ends, as a stacked state.

        Args:
            mixtures: weight of each end in each point, [M, K] float64; each row sums to 1.
        """
        return self.space.mixture(self.ends, mixtures.to(next(iter(self.ends.values())).device))

    @property
    def size(self) -> int:
        """Number of values in the state of one point."""
        return sum(end[0].numel() for end in self.ends.values())


def span(
    clip: FrozenClip,
    solutions: Sequence[Solution],
    classnames: Sequence[str],
    *,
    space: str = "embedding",
    precision: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Span:
    """Put solutions into one space. Texts and logit scale of the last solution hold for all points.

    Args:
        clip: the frozen CLIP of all solutions.
        solutions: K solutions; of one kind in space "parameter", and of one logit scale in space "embedding".
        classnames: C names.
        space: "embedding" interpolates class features before their normalisation, and image features if the solutions
            change them; "parameter" interpolates the states.
        precision: precision of the states and of the towers.
        backend: see :func:`space_of`.

    Raises:
        ValueError: an unknown ``space``, or solutions that no line joins.
        TypeError: solutions of several kinds.
    """
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    solutions = [solution.for_clip(clip) for solution in solutions]
    solutions = in_one_form(solutions, solutions[-1])
    last = solutions[-1]
    for solution in solutions[:-1]:
        alike = (solution.normalize, solution.logit_scale) == (last.normalize, last.logit_scale)
        if space == "parameter" or type(solution) is type(last) or not alike:
            check_compatible(solution, last, space=space)
    if space == "parameter":
        if not last.state():
            raise ValueError(
                f"solutions must have a state in space 'parameter', got {last.kind}: use space='embedding'"
            )
        found = space_of(clip, last, classnames, precision=precision, backend=backend)
        return Span(found, _to(precision, last.stack(solutions, clip.device)))
    return _embedded(clip, solutions, classnames, precision)


def _embedded(
    clip: FrozenClip, solutions: Sequence[Solution], classnames: Sequence[str], precision: torch.dtype
) -> Span:
    """The span in space "embedding". Its state holds class features, and mixing weights if image features change."""
    last = solutions[-1]
    own = [image_features(clip, solution) for solution in solutions]
    state = {"classes": torch.stack([s.class_weights(clip, classnames).to(clip.device) for s in solutions])}

    def images(states: State, x: Tensor) -> Tensor:
        ends = [x if function is None else function(x) for function in own]
        return F.normalize(torch.tensordot(states[SHARES], torch.stack(ends).to(states[SHARES]), 1), dim=-1)

    change = any(function is not None for function in own)
    if change:
        state[SHARES] = torch.eye(len(solutions), device=clip.device)

    edit = last.edit(clip, stack_states([last.state()], clip.device))
    scale = clip.logit_scale if edit.scale is None else edit.scale
    found = Space(
        lambda states: states["classes"],
        images if change else None,
        last.straight,
        scale,
        edit.normalize,
        clip.embed_dim,
    )
    return Span(found, _to(precision, state))


def image_features(clip: FrozenClip, solution: Solution) -> Callable[[Tensor], Tensor] | None:
    """Function for a solution's unit-norm image features, [B, ...] -> [B, D]; None if cached features are unchanged."""
    edit = solution.edit(clip, stack_states([solution.state()], clip.device))
    images = prepare_images(clip, edit, solution.image_input)
    return None if images is None else lambda x: images(edit, x)[0]


def _to(precision: torch.dtype, state: State) -> State:
    return {name: tensor.to(precision) for name, tensor in state.items()}


@torch.no_grad()
def measure(at: Span, mixtures: Tensor, images: Batches) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean cross-entropy and accuracy at M mixtures of K solutions.

    Many points are encoded in one call of the text tower, and images are read once for all points of that call.

    Args:
        at: the K solutions.
        mixtures: weight of each solution in each point, [M, K] float64; each row sums to 1.
        images: images with labels.

    Returns:
        The M losses, and the M accuracies in percent.
    """
    losses, hits, space = [], [], at.space
    device = next(iter(at.ends.values())).device
    numbers = max(at.size, space.weights, len(images.classnames) * space.width)
    for chunk in mixtures.to(device).split(max(1, CHUNK // numbers)):
        states = at.points(chunk)
        weights = space.unit(space.classes(states))
        weights = weights.expand(len(chunk), -1, -1)  # one row of settings if class features do not depend on the state
        loss, right = torch.zeros(2, len(weights), dtype=torch.float64, device=device)
        for rows, labels, _ in images.batches(ROWS):
            x, labels = space.features(states, rows.to(weights)), labels.to(device)
            x = x if space.images is None else x.expand(len(weights), -1, -1)  # a frozen map gives one for all points
            for m, w in enumerate(weights):
                logits = space.scale * inputs(x if space.images is None else x[m], w) @ w.T
                loss[m] += F.cross_entropy(logits, labels, reduction="sum")
                right[m] += (logits.argmax(-1) == labels).sum()
        losses += (loss / len(images)).tolist()
        hits += (100 * (right / len(images))).tolist()
    return tuple(losses), tuple(hits)
