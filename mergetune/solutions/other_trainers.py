"""What the files and run folders of other trainers hold, recognised by names, for messages that say it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

DEEP = "prompts inside the towers, which no prompt before the class name equals"
MAPLE = f"MaPLe's {DEEP}"
PROMPTSRC = f"PromptSRC's or IVLP's {DEEP}"
PROMPTKD = "PromptKD's student, prompts in the image tower and a map to its teacher's features"
MMA = "MMA's adapters, which change the towers"
LORA = "CLIP-LoRA's low-rank weights: give the file itself"
PEFT = "a peft adapter without its adapter_config.json, which says its scale: put that file beside it"
LORA_ALONE = (
    "low-rank weights (LoRA) without their scale, which stands in 'metadata' of CLIP-LoRA's file, beside 'weights', or "
    "in PEFT's adapter_config.json"
)
CLIP_ADAPTER = "CLIP-Adapter's network on image features, which is no linear map"
TASKRES = "TaskRes's class residuals: mergetune.solutions.open_taskres reads them"
TIP = "the keys of Tip-Adapter-F, one per training image, not per class"

NAMES = (  # (pattern in the names of the tensors, what they are), the surest first
    (r"compound_prompts_text\.", MAPLE),
    (r"VPT_image_trans\.", PROMPTKD),
    (r"\bVPT(_shallow)?$|\bZS_image_encoder\.", PROMPTSRC),
    (r"^(text|visual|shared)_adapter\.", MMA),
    (r"lora_[AB]\b", LORA_ALONE),
    (r"\btext_feature_residuals$", TASKRES),
    (r"\bprompt_embeddings$", f"VPT's or ProVP's {DEEP}"),
    (r"\bmeta_net\.", "CoCoOp's or TCP's prompt with a network (meta_net) that changes it for each image or class"),
    (r"\bfc\.2\.weight$", CLIP_ADAPTER),
)

FOLDERS = {  # name of a folder or file in the folder of a run -> what it holds
    "VLPromptLearner": f"{PROMPTSRC} (or {PROMPTKD})",
    "MultiModalPromptLearner": MAPLE,
    "adapter_learner": MMA,
    "clip_adapter": CLIP_ADAPTER,
    "Prompt_learner": f"VPT's or ProVP's {DEEP}",
    "lora_weights.pt": LORA,
    "adapter_model.safetensors": PEFT,
    "adapter_model.bin": PEFT,
    "best_F_*shots.pt": TIP,
}


class OtherTrainers(ValueError):
    """A file is another trainer's, or of a whole model, and no solution."""


def tensors_of_other(names: Iterable[str]) -> str | None:
    """What tensors with these names are, in words, if they are of a trainer that is known; else None."""
    names = list(names)
    for pattern, words in NAMES:
        if (found := next((name for name in names if re.search(pattern, name)), None)) is not None:
            return f"{words} (such as {found[:60]})"
    return None


def folder_of_other(folder: Path) -> str | None:
    """What the folder of a run holds, in words, if it is of a trainer that is known; else None."""
    for pattern, words in FOLDERS.items():
        if found := next(iter(sorted(folder.glob(pattern))), None):
            return f"{found.name} holds {words}"
    return None
