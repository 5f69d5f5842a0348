"""FrozenClip: one frozen view of any open_clip model, image and text side alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import Tensor, nn
from torchvision.transforms import Compose, RandomHorizontalFlip

from mergetune.clip.packed_blocks import Layout, run_blocks
from mergetune.clip.text_tower import (
    ClipModel,
    TextParts,
    checked_model,
    context_length,
    obstacle,
    output_dim,
    pooled,
    text_parts,
    working_dtype,
)
from mergetune.clip.texts import PLAIN, check_classnames, check_templates, fill
from mergetune.io import jsonable

EMBEDDED = 16  # sets of class embeddings that are remembered
COOP_CROP_SCALE = (0.08, 1.0)  # CoOp trains on random resized crops of this share of the area, and flips


@dataclass(frozen=True, eq=False)
class FrozenClip:
    """A CLIP that is never trained. Make one with :func:`load_clip`, or from a model of your own.

    Attributes:
        model: open_clip's ``CLIP``, ``CustomTextCLIP`` or ``CoCa``, or another with ``encode_image``, ``encode_text``,
            ``logit_scale`` and ``visual``; put into eval mode, gradients off.
        tokenizer: (texts, context_length=L) -> LongTensor [n, L].
        name: the backbone's name, kept with every solution.
        preprocess_cfg: open_clip's preprocessing settings (JSON-able); empty takes those that open_clip keeps with the
            model.
    """

    model: nn.Module
    tokenizer: Callable[..., Tensor]
    name: str
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self._model  # another model is refused here, before any image is encoded
        self.model.eval().requires_grad_(False)
        cfg = self.preprocess_cfg or open_clip.get_model_preprocess_cfg(self.model)
        cfg = jsonable(merge_preprocess_dict(PreprocessCfg(), cfg))
        object.__setattr__(self, "preprocess_cfg", cfg)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> ClipModel:
        """:attr:`model`, refused by name if it is no CLIP."""
        return checked_model(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self._model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """The text tower's precision."""
        return self.text.dtype if self.takes_prompts else working_dtype(self._model)

    @cached_property
    def embed_dim(self) -> int:
        """D, the width of image and class embeddings."""
        told = output_dim(self._model)
        return self.encode_text([""]).shape[-1] if told is None else told

    @cached_property
    def context_length(self) -> int:
        """L, tokens in a text."""
        return self.text.context_length if self.takes_prompts else context_length(self._model, self.tokenizer)

    @cached_property
    def takes_prompts(self) -> bool:
        """Whether context vectors can be put into the text tower: all but CoCa's and Hugging Face's text models.

        Without it everything else works: class embeddings come from the model's own ``encode_text``.
        """
        return obstacle(self._model) is None

    @cached_property
    def logit_scale(self) -> float:
        """exp of the model's learned log-temperature; 100 for OpenAI's."""
        return self._model.logit_scale.detach().float().exp().item()

    @cached_property
    def logit_bias(self) -> float:
        """SigLIP's bias; the same for every class, so that softmax and argmax do not see it. 0 elsewhere."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else bias.detach().float().item()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all the weights."""
        return _fingerprint(self.model.state_dict())

    @cached_property
    def image_fingerprint(self) -> str:
        """SHA-256 of the image tower's weights: the key of cached features."""
        return _fingerprint(self._model.visual.state_dict())

    @cached_property
    def text_fingerprint(self) -> str:
        """SHA-256 of everything but the image tower: what a prompt depends on."""
        return _fingerprint({k: v for k, v in self.model.state_dict().items() if not k.startswith("visual.")})

    # -- images -------------------------------------------------------------------------------------------------------

    @cached_property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """The evaluation transform: PIL image -> [3, H, W]."""
        transform = image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=False)
        return cast(Callable[[Any], Tensor], transform)  # open_clip declares what it gives with other arguments too

    @cached_property
    def augment(self) -> Callable[[Any], Tensor]:
        """CoOp's training transform: crop, resize, flip, drawn from torch's global RNG. PIL image -> [3, H, W]."""
        crop = image_transform_v2(
            PreprocessCfg(**self.preprocess_cfg), is_train=True, aug_cfg={"scale": COOP_CROP_SCALE}
        )
        return Compose([RandomHorizontalFlip(), crop])

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image features. pixels [B, 3, H, W] -> [B, D] float32, unit norm."""
        # The convolution that takes the pixels: in open_clip's mixed precision the parameters before it are float32.
        weight = max(self._model.visual.parameters(), key=Tensor.dim)
        features = self._model.encode_image(pixels.to(device=weight.device, dtype=weight.dtype))
        return F.normalize(pooled(features).float(), dim=-1)

    # -- texts --------------------------------------------------------------------------------------------------------

    @cached_property
    def text(self) -> TextParts:
        """The text tower's parts, which prompts are made of.

        Raises:
            TypeError: a tower that takes no prompts, naming it.
        """
        return text_parts(self._model)

    @cached_property
    def _text_copies(self) -> dict[torch.dtype, TextParts]:
        return {self.text.dtype: self.text}

    def text_as(self, dtype: torch.dtype) -> TextParts:
        """The text tower in another precision, copied once."""
        if dtype not in self._text_copies:
            self._text_copies[dtype] = self.text.astype(dtype)
        return self._text_copies[dtype]

    @cached_property
    def first_token(self) -> int:
        """Where a text's own tokens begin: 1 if the tokenizer puts a start token first, 0 if not (SigLIP)."""
        # Against no text at all: two words may begin alike, as a sentencepiece "▁" before each.
        empty, word = self.tokenizer(["", "cat"], context_length=self.context_length)
        return int((empty != word).int().argmax())

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids. texts -> LongTensor [n, L].

        Raises:
            ValueError: a text is longer than the tower's context; tokenizers would cut it in silence.
        """
        length = self.context_length
        # Given twice the room, a text that fits has no more tokens. What stands in the middle of no text is padding.
        tokens, roomy = (self.tokenizer(list(texts), context_length=room) for room in (length, 2 * length))
        padding = self.tokenizer([""], context_length=2 * length)[0, length]
        too_long = (roomy != padding).sum(-1) > (tokens != padding).sum(-1)
        if too_long.any():
            text = texts[int(too_long.int().argmax())]
            raise ValueError(f"texts must fit the text tower's {length} tokens, got {text!r}")
        return tokens.to(self.device)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """The model's own text features. texts -> [n, D] float32; of unit norm for CoCa alone.

        Raises:
            TypeError: a model that does not give one row for each text.
        """
        tokens = self.tokenize(texts)
        features = torch.cat([pooled(self._model.encode_text(chunk)).float() for chunk in tokens.split(batch_size)])
        if features.ndim != 2 or len(features) != len(tokens):
            raise TypeError(
                f"model.encode_text must give [n, D] for {len(tokens)} texts, got {list(features.shape)} from "
                f"{type(self.model).__name__}"
            )
        return features

    @torch.no_grad()
    def class_embeddings(self, classnames: Sequence[str], templates: str | Sequence[str] = PLAIN) -> Tensor:
        """Zero-shot class embeddings: the mean over templates of unit features, made unit again (Radford et al. 2021).

        Args:
            classnames: C names.
            templates: one or more texts with ``{}`` where the name goes.

        Returns:
            [C, D] float32, unit norm.
        """
        key = check_classnames(classnames), check_templates(templates)
        if key not in self._embedded:
            if len(self._embedded) >= EMBEDDED:
                self._embedded.pop(next(iter(self._embedded)))
            names, templates = key
            total = torch.zeros(len(names), self.embed_dim, device=self.device)
            for template in templates:
                total += F.normalize(self._packed_features([fill(template, name) for name in names]), dim=-1)
            self._embedded[key] = F.normalize(total / len(templates), dim=-1)
        return self._embedded[key].clone()

    @cached_property
    def _embedded(self) -> dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor]:
        """The latest results of :meth:`class_embeddings`: a run asks for the same ones again and again."""
        return {}

    def _packed_features(self, texts: Sequence[str], *, batch_size: int = 128) -> Tensor:
        """:meth:`encode_text` without the padding: in a causal tower nothing behind a text's last token reaches it."""
        if not (self.takes_prompts and self.text.causal):
            return self.encode_text(texts)
        text = self.text
        tokens = self.tokenize(texts)
        lengths = text.pooled_position(tokens) + 1
        order = lengths.argsort(stable=True)
        features = []
        for chunk in order.split(batch_size):
            inside = torch.arange(tokens.shape[1], device=self.device) < lengths[chunk, None]
            x = text.token_embedding(tokens[chunk]).to(text.dtype) + text.positional_embedding.to(text.dtype)
            pooled = lengths[chunk].cumsum(0) - 1
            layout = Layout(0, tuple(lengths[chunk].tolist()), pooled, text.heads, causal=True)
            features.append(text.project(run_blocks(text.blocks, x[inside][None], layout))[0])
        return torch.cat(features)[order.argsort()]


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
