"""The graph of a classifier, from pixels to logits: the module, its facts for other programs, and its check.

Shapes: B images, H and W their height and width, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from mergetune.clip import FrozenClip
from mergetune.clip.backbone import check_clip
from mergetune.clip.edited_towers import privately
from mergetune.clip.text_tower import pooled
from mergetune.evaluation import classifier, temperature_of
from mergetune.facts.function_options import BACKGROUND
from mergetune.io import installed_version
from mergetune.solutions import Solution, image_features, inputs
from mergetune.solutions.exports import classnames_of
from mergetune.solutions.published import public_backbone

BATCHES = (1, 3)  # numbers of images that a file is checked with
RTOL, ATOL = 1e-4, 1e-3  # allowed difference of logits: runtimes add in another order

Run = Callable[[Tensor], Tensor]
"""Function of pixels, [B, 3, H, W], that returns logits, [B, C]."""


class ClassifierGraph(nn.Module):
    """Pixels [B, 3, H, W] -> logits [B, C] of a solution, with its class embeddings as constants.

    The logits are those of the solution, plus the logit bias of a SigLIP model, divided by the temperature: their
    softmax gives the probabilities of the classes. For a SigLIP model their sigmoid gives the probability that each
    class is in the picture. The text tower is not part of the graph.

    Args:
        clip: the CLIP that the solution was made for.
        solution: the solution.
        classnames: C names.
    """

    weights: Tensor

    def __init__(self, clip: FrozenClip, solution: Solution, classnames: Sequence[str]) -> None:
        super().__init__()
        self.visual = privately(cast(nn.Module, clip.model.visual)).requires_grad_(False)
        self.image_map = image_features(clip, solution)
        temperature = temperature_of(solution)
        self.register_buffer("weights", classifier(clip, solution)(classnames) / temperature)
        self.shift = clip.logit_bias / temperature

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.normalize(pooled(self.visual(pixels)).float(), dim=-1)
        x = x if self.image_map is None else self.image_map(x)
        logits = inputs(x, self.weights) @ self.weights.T
        return logits + self.shift if self.shift else logits


def image_size(clip: FrozenClip) -> tuple[int, int]:
    """Height and width of the images that the CLIP takes."""
    size = clip.preprocess_cfg["size"]
    height, width = size if isinstance(size, list) else (size, size)
    return height, width


def facts_of(
    clip: FrozenClip, solution: Solution, classnames: Sequence[str], background: str = BACKGROUND
) -> dict[str, Any]:
    """What a program must know of the graph, JSON-able: its classes, its logits, its pixels and the background."""
    cfg = clip.preprocess_cfg
    size = image_size(clip)
    bicubic = cfg["interpolation"] != "bilinear" or (cfg["resize_mode"] == "shortest" and size[0] != size[1])
    return {
        "classnames": list(classnames),
        "probabilities": "softmax",
        "logit_scale": clip.logit_scale if solution.logit_scale is None else solution.logit_scale,
        "logit_bias": clip.logit_bias,
        "temperature": temperature_of(solution),
        "preprocess": {
            "size": list(size),
            "mean": _three(cfg["mean"]),
            "std": _three(cfg["std"]),
            "interpolation": "bicubic" if bicubic else "bilinear",  # as open_clip's transform resizes
            "resize": cfg["resize_mode"],
            "fill": cfg["fill_color"],
        },
        "background": background,  # under transparent pixels
        "solution": solution.kind,
        "backbone": public_backbone(solution.backbone or clip.name),
        "mergetune": installed_version("mergetune"),
    }


def traced(clip: FrozenClip, solution: Solution, classnames: Sequence[str] | None) -> tuple[ExportedProgram, list[str]]:
    """The graph as a program of torch.export with any number of images, without paths of files, and its class names.

    Raises:
        ValueError: class names are missing, the CLIP is not a float32 model on the CPU, or the solution takes more of
            an image than its features.
        RuntimeError: torch.export cannot follow the image tower.
    """
    check_clip(clip)
    check_supported(solution)
    names = list(classnames_of(solution, classnames))
    solution = solution.for_clip(clip)
    tower = cast(nn.Module, clip.model.visual)
    if found := {f"{t.dtype} on {t.device}" for t in tower.parameters()} - {"torch.float32 on cpu"}:
        raise ValueError(
            f"clip must be a float32 model on the CPU, got {found.pop()}: load it so with mergetune.load_clip"
        )
    graph = ClassifierGraph(clip, solution, names).eval()
    # `eval` also resets MultiheadAttention, whose kernel for inference has no place in other runtimes.
    for part in graph.modules():
        part.training = isinstance(part, nn.MultiheadAttention)
    example = torch.zeros(2, 3, *image_size(clip))
    try:
        with torch.no_grad():
            program = export(graph, (example,), dynamic_shapes={"pixels": {0: Dim("batch")}}, strict=False)
    except Exception as error:  # torch.export raises many types of error
        reason = str(error).strip().split("\n")[0]
        raise RuntimeError(f"the image tower of {clip.name} cannot be written as one graph: {reason}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the files of this machine
    return program, names


def check_supported(solution: Solution) -> None:
    """Raise TypeError for what is no solution, ValueError for a solution that takes more of an image than features."""
    if not isinstance(solution, Solution):
        raise TypeError(f"solution must be a solution, got {solution!r}: of texts, mergetune.Templates makes one")
    if solution.image_input != "feature":
        raise ValueError(f"solution must take image features, got a {solution.kind} that takes {solution.image_input}")


@torch.no_grad()
def check_logits(run: Run, clip: FrozenClip, solution: Solution, classnames: Sequence[str], what: str) -> None:
    """Compare the logits of a written graph with those of the solution on random pixels.

    Raises:
        RuntimeError: the logits differ.
    """
    generator = torch.Generator().manual_seed(0)
    temperature, own = temperature_of(solution), classifier(clip, solution)
    for batch in BATCHES:
        pixels = torch.randn(batch, 3, *image_size(clip), generator=generator)
        expected = own.logits(classnames, clip.encode_image(pixels)) + clip.logit_bias
        got, expected = run(pixels), expected / temperature
        if got.shape != expected.shape or not torch.allclose(got, expected, rtol=RTOL, atol=ATOL):
            apart = f"{(got - expected).abs().max():.3g}" if got.shape == expected.shape else f"shape {list(got.shape)}"
            raise RuntimeError(
                f"the {what} does not give the logits of the solution for {batch} images (difference {apart}); "
                "nothing was written"
            )


def _three(value: Any) -> list[float]:
    """Mean or deviation of each of the three colours."""
    return [float(v) for v in (value if isinstance(value, list) else [value] * 3)]
