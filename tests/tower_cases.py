"""Text towers of every kind, and the class features that open_clip gives."""

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, convert_weights_to_lp
from torch import Tensor, nn

from mergetune.clip import FrozenClip

LENGTH, VOCABULARY, PAD, EOS, START = 13, 40, 0, 1, 2
FIRST, CONTEXT = 1, 3
NAMES = ("k", "a b c", "d", "g h i j k", "l m")  # of lengths 1 to 5, not in their order


class Words:
    """A word is a token: [start, words, end, padding], cut like open_clip's tokenizers. The end has the highest id."""

    def __init__(self, start: bool = True, end: int = VOCABULARY - 1, length: int = LENGTH) -> None:
        self.start, self.end, self.length = [START] if start else [], end, length

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.length
        tokens = torch.full((len(texts), length), PAD)
        for row, text in zip(tokens, texts, strict=True):
            words = [3 + ord(word[0]) % 32 for word in text.split()]
            ids = [*self.start, *words, self.end]
            ids = ids if len(ids) <= length else [*ids[: length - 1], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def tower(
    kind: type = open_clip.CLIP,
    *,
    quick_gelu: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    half: torch.dtype | None = None,
    **text,
) -> nn.Module:
    """A small CLIP, every text parameter random, so that a bias or scale left out shows."""
    torch.manual_seed(seed)
    settings = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2, "eos_id": EOS}
    vision = CLIPVisionCfg(layers=1, width=16, head_width=16, patch_size=8, image_size=8)
    model = kind(8, vision, CLIPTextCfg(**{**settings, **text}), quick_gelu=quick_gelu, cast_dtype=half)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("visual."):
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.ndim == 1 else 0.1)
    if half is not None:
        convert_weights_to_lp(model, half)
    else:
        model.to(dtype)
    return model.eval().requires_grad_(False)


def clip_and_tokens(model: nn.Module, names: tuple[str, ...] = NAMES) -> tuple[FrozenClip, Tensor]:
    """The view of a tower, and the tokens "x x x <name>" in the tokenizer that its pooling needs."""
    pool = getattr(model, "text_pool_type", None) or model.text.pool_type
    clip = FrozenClip(model, Words(end=EOS if pool == "eos" else VOCABULARY - 1), "tiny")
    return clip, clip.tokenize([f"x x x {name}" for name in names])


def contexts(clip: FrozenClip, prompts: int, classes: int | None = None, seed: int = 7) -> Tensor:
    """Random context vectors [M, n, W], or [M, C, n, W]."""
    shape = (prompts, CONTEXT, clip.text.width) if classes is None else (prompts, classes, CONTEXT, clip.text.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
