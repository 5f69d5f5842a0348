"""Solutions, named states that edit a frozen CLIP: their kinds, their files and the spaces that hold them."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.solutions.base import Solution
    from mergetune.solutions.checkpoints import PromptFile, read_prompt
    from mergetune.solutions.coop_files import to_coop
    from mergetune.solutions.exports import to_head, zero_shot_classifier
    from mergetune.solutions.head import Head
    from mergetune.solutions.head_files import HeadFile, read_head
    from mergetune.solutions.hub import push_to_hub, recorded_metrics, to_hub
    from mergetune.solutions.kinds import (
        KINDS,
        check_compatible,
        interpolate,
        known_classes,
        load_solution,
        open_solution,
        zero_shot_like,
    )
    from mergetune.solutions.linear_map import LinearMap
    from mergetune.solutions.lora import LoRA
    from mergetune.solutions.lora_files import read_clip_lora, to_clip_lora
    from mergetune.solutions.parameters import Parameters, layer_norms, read_model
    from mergetune.solutions.peft_files import read_peft, to_peft
    from mergetune.solutions.prompt import Prompt
    from mergetune.solutions.resaving import TEMPERATURE
    from mergetune.solutions.residual import Residual, open_taskres
    from mergetune.solutions.solution_folders import write_notes
    from mergetune.solutions.space import Space, Span, image_features, measure, space_of, span
    from mergetune.solutions.stack import Stack
    from mergetune.solutions.states import State, check_same_shapes, inputs, stack_states, stacked
    from mergetune.solutions.temperatures import temperature_of, with_temperature
    from mergetune.solutions.templates import Templates
    from mergetune.solutions.whole_models import to_open_clip

__all__ = [
    "KINDS",
    "TEMPERATURE",
    "Head",
    "HeadFile",
    "LinearMap",
    "LoRA",
    "Parameters",
    "Prompt",
    "PromptFile",
    "Residual",
    "Solution",
    "Space",
    "Span",
    "Stack",
    "State",
    "Templates",
    "check_compatible",
    "check_same_shapes",
    "image_features",
    "inputs",
    "interpolate",
    "known_classes",
    "layer_norms",
    "load_solution",
    "measure",
    "open_solution",
    "open_taskres",
    "push_to_hub",
    "read_clip_lora",
    "read_head",
    "read_model",
    "read_peft",
    "read_prompt",
    "recorded_metrics",
    "space_of",
    "span",
    "stack_states",
    "stacked",
    "temperature_of",
    "to_clip_lora",
    "to_coop",
    "to_head",
    "to_hub",
    "to_open_clip",
    "to_peft",
    "with_temperature",
    "write_notes",
    "zero_shot_classifier",
    "zero_shot_like",
]

make_lazy(
    __name__,
    {
        "mergetune.solutions.base": "Solution",
        "mergetune.solutions.checkpoints": "PromptFile read_prompt",
        "mergetune.solutions.coop_files": "to_coop",
        "mergetune.solutions.exports": "to_head zero_shot_classifier",
        "mergetune.solutions.head": "Head",
        "mergetune.solutions.head_files": "HeadFile read_head",
        "mergetune.solutions.hub": "push_to_hub recorded_metrics to_hub",
        "mergetune.solutions.kinds": (
            "KINDS check_compatible interpolate known_classes load_solution open_solution zero_shot_like"
        ),
        "mergetune.solutions.linear_map": "LinearMap",
        "mergetune.solutions.lora": "LoRA",
        "mergetune.solutions.lora_files": "read_clip_lora to_clip_lora",
        "mergetune.solutions.parameters": "Parameters layer_norms read_model",
        "mergetune.solutions.peft_files": "read_peft to_peft",
        "mergetune.solutions.prompt": "Prompt",
        "mergetune.solutions.residual": "Residual open_taskres",
        "mergetune.solutions.space": "Space Span image_features measure space_of span",
        "mergetune.solutions.stack": "Stack",
        "mergetune.solutions.states": "State check_same_shapes inputs stack_states stacked",
        "mergetune.solutions.resaving": "TEMPERATURE",
        "mergetune.solutions.solution_folders": "write_notes",
        "mergetune.solutions.temperatures": "temperature_of with_temperature",
        "mergetune.solutions.templates": "Templates",
        "mergetune.solutions.whole_models": "to_open_clip",
    },
)
