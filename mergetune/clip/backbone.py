"""FrozenClip: any open_clip model, frozen, with its image and text features, tokenizer and fingerprints."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL.Image import Image
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
from mergetune.facts.brief import brief
from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS
from mergetune.io import Picture, jsonable, read_picture

EMBEDDED = 16  # number of class-embedding results that are cached
SHOWN_TEXT = 200  # characters of a text in a message
COOP_CROP_SCALE = (0.08, 1.0)  # area share of CoOp's random resized crops


@brief("name", "model", "embed_dim", "device", "takes_prompts")
@dataclass(frozen=True, eq=False)
class FrozenClip:
    """A CLIP whose weights are never trained. Make one with :func:`load_clip`, or from a model in memory.

    The constructor puts the model into eval mode and turns its gradients off.

    Attributes:
        model: open_clip's ``CLIP``, ``CustomTextCLIP`` or ``CoCa``, or another module with ``encode_image``,
            ``encode_text``, ``logit_scale`` and ``visual``.
        tokenizer: function of texts and ``context_length=L`` that returns token ids, LongTensor [n, L].
        name: name of the CLIP, saved with every solution.
        preprocess_cfg: open_clip's preprocessing settings (JSON-able); empty takes the settings of the model.
        fingerprints: fingerprints of the weights before they were rounded to another precision, under "both", "image"
            and "text"; empty takes those of the model. They let a CLIP in half precision use the caches and solutions
            of the same CLIP in float32.

    Example:
        >>> import mergetune as mt, open_clip
        >>> vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
        >>> text = {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        >>> clip = mt.FrozenClip(open_clip.CLIP(8, vision, text), open_clip.get_tokenizer("ViT-B-32"), "tiny")
        >>> clip.encode_text(["a cat", "a dog"]).shape  # [n, D]
        torch.Size([2, 8])
    """

    model: nn.Module
    tokenizer: Callable[..., Tensor]
    name: str
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _ = self._model  # raises TypeError for a model that is no CLIP
        self.model.eval().requires_grad_(False)
        cfg = self.preprocess_cfg or open_clip.get_model_preprocess_cfg(self.model)
        cfg = jsonable(merge_preprocess_dict(PreprocessCfg(), cfg))
        object.__setattr__(self, "preprocess_cfg", cfg)

    # -- properties of the model --------------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> ClipModel:
        """:attr:`model`, checked to be a CLIP; raises TypeError otherwise."""
        return checked_model(self.model)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision (dtype) of the text tower."""
        return self.text.dtype if self.takes_prompts else working_dtype(self._model)

    @cached_property
    def embed_dim(self) -> int:
        """D, width of image features and class embeddings."""
        told = output_dim(self._model)
        return self.encode_text([""]).shape[-1] if told is None else told

    @cached_property
    def context_length(self) -> int:
        """L, number of tokens per text, including padding."""
        return self.text.context_length if self.takes_prompts else context_length(self._model, self.tokenizer)

    @cached_property
    def takes_prompts(self) -> bool:
        """Whether prompts can be trained: the text tower accepts context vectors in place of tokens.

        False for the text towers of CoCa and of Hugging Face. Solutions that leave the text tower unchanged work with
        these, too: the class embeddings come from ``model.encode_text``.
        """
        return obstacle(self._model) is None

    @cached_property
    def logit_scale(self) -> float:
        """Factor on the logits: exp of ``model.logit_scale``, the learned log-scale. 100 for OpenAI's models."""
        return self._model.logit_scale.detach().float().exp().item()

    @cached_property
    def logit_bias(self) -> float:
        """Bias on the logits of SigLIP models, 0 for others. Equal for all classes, so softmax and argmax ignore it."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else bias.detach().float().item()

    @property
    def image_dtype(self) -> torch.dtype:
        """Precision (dtype) of the pixels that the image tower takes."""
        return self._first_weight.dtype

    @property
    def _first_weight(self) -> Tensor:
        # The weight with the most dimensions is the convolution that takes the pixels. Other parameters may have
        # another dtype: in open_clip's mixed precision, those before the convolution are float32.
        return max(self._model.visual.parameters(), key=Tensor.dim)

    def _fingerprint_of(self, part: str) -> str:
        return self.fingerprints.get(part) or weights_fingerprint(self.model, part)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all weights, before they were rounded to another precision."""
        return self._fingerprint_of("both")

    @cached_property
    def image_fingerprint(self) -> str:
        """SHA-256 of the image tower's weights; identifies cached features."""
        return self._fingerprint_of("image")

    @cached_property
    def text_fingerprint(self) -> str:
        """SHA-256 of all weights outside the image tower; identifies the CLIP of a prompt."""
        return self._fingerprint_of("text")

    def has_fingerprint(self, part: str, wanted: str) -> bool:
        """Whether ``wanted`` identifies these weights, as loaded or as rounded (as version 0.1 recorded them).

        Args:
            part: "both", "image" or "text".
            wanted: the recorded fingerprint.
        """
        known = {"both": self.fingerprint, "image": self.image_fingerprint, "text": self.text_fingerprint}[part]
        return wanted == known or (part in self.fingerprints and wanted == weights_fingerprint(self.model, part))

    # -- images -------------------------------------------------------------------------------------------------------

    @cached_property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """Evaluation transform: PIL image -> tensor [3, H, W]."""
        transform = image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=False)
        return cast(Callable[[Any], Tensor], transform)  # open_clip annotates a union of return types

    @cached_property
    def augment(self) -> Callable[[Any], Tensor]:
        """CoOp's training transform: random crop, resize and flip (torch's global RNG). PIL image -> [3, H, W]."""
        crop = image_transform_v2(
            PreprocessCfg(**self.preprocess_cfg), is_train=True, aug_cfg={"scale": COOP_CROP_SCALE}
        )
        return Compose([RandomHorizontalFlip(), crop])

    @torch.no_grad()
    def encode_image(
        self,
        images: Tensor | Picture | Sequence[Tensor | Picture],
        *,
        batch_size: int = 64,
        max_pixels: int = MAX_PIXELS,
        background: str = BACKGROUND,
    ) -> Tensor:
        """Unit-norm image features, [B, D] float32.

        Args:
            images: preprocessed pixels, [B, 3, H, W]; or a picture; or a list of B pictures. A picture is the path of a
                file, a PIL image or an array of uint8, [H, W, 3] or [H, W] (grey); in a list also the preprocessed
                pixels of one picture, [3, H, W]. Pictures are preprocessed with :attr:`preprocess`.
            batch_size: pictures of a list per call of the image tower. A tensor is encoded in one call.
            max_pixels: largest width times height of a picture.
            background: colour under transparent pixels.

        Raises:
            TypeError: an image of another type.
            ValueError: a file that cannot be read, a picture that is too large, or an array of another shape or dtype.

        Example:
            >>> import mergetune as mt, numpy as np
            >>> clip = mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")
            >>> grey = np.full((32, 40), 128, np.uint8)
            >>> clip.encode_image([grey, grey]).shape  # [B, D]
            torch.Size([2, 128])
        """
        if isinstance(images, Tensor):
            return self._encode_pixels(images)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        alone = isinstance(images, str | bytes | os.PathLike | Image | np.ndarray) or not isinstance(images, Iterable)
        pictures: list[Any] = [images] if alone else list(cast(Iterable[Any], images))

        def pixels(picture: Tensor | Picture) -> Tensor:
            if isinstance(picture, Tensor):
                return picture
            reading = {"preprocess_cfg": self.preprocess_cfg, "max_pixels": max_pixels, "background": background}
            return self.preprocess(read_picture(picture, **reading))

        batches = [pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size)]
        found = [self._encode_pixels(torch.stack([*map(pixels, batch)])) for batch in batches]
        return torch.cat(found) if found else torch.empty(0, self.embed_dim, device=self.device)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        weight = self._first_weight
        features = self._model.encode_image(pixels.to(device=weight.device, dtype=weight.dtype))
        return F.normalize(pooled(features).float(), dim=-1)

    # -- texts --------------------------------------------------------------------------------------------------------

    @cached_property
    def text(self) -> TextParts:
        """The parts of the text tower, for prompts and edits.

        Raises:
            TypeError: the text tower cannot be taken apart (see :attr:`takes_prompts`); the message names the tower.
        """
        return text_parts(self._model)

    @cached_property
    def _text_copies(self) -> dict[torch.dtype, TextParts]:
        return {self.text.dtype: self.text}

    def text_as(self, dtype: torch.dtype) -> TextParts:
        """The text tower in another precision; a copy is made once per precision."""
        if dtype not in self._text_copies:
            self._text_copies[dtype] = self.text.astype(dtype)
        return self._text_copies[dtype]

    @cached_property
    def first_token(self) -> int:
        """Position of the first word token: 1 if the tokenizer adds a start token, 0 if not (SigLIP)."""
        # A word is compared with the empty text: two words could start with the same token, the "▁" of sentencepiece.
        empty, word = self.tokenizer(["", "cat"], context_length=self.context_length)
        return int((empty != word).int().argmax())

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids of texts, LongTensor [n, L].

        Raises:
            ValueError: a text has more than L tokens. (Tokenizers would cut the text without notice.)
        """
        length = self.context_length
        # A text that fits has the same number of tokens with twice the room. The last half of an empty text is padding.
        tokens, roomy = (self.tokenizer(list(texts), context_length=room) for room in (length, 2 * length))
        padding = self.tokenizer([""], context_length=2 * length)[0, length]
        too_long = (roomy != padding).sum(-1) > (tokens != padding).sum(-1)
        if too_long.any():
            text = texts[int(too_long.int().argmax())]
            shown = text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..."
            raise ValueError(
                f"texts must fit the text tower's {length} tokens, got {shown!r}: take a shorter class name "
                "(classnames, on the command line --classnames FILE) or template"
            )
        return tokens.to(self.device)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Text features of ``model.encode_text``: texts -> [n, D] float32, not normalised (unit norm for CoCa).

        Args:
            texts: n texts.
            batch_size: texts per call of the model.

        Raises:
            ValueError: a text is too long.
            TypeError: the model does not return one row per text.
        """
        tokens = self.tokenize(texts)
        features = torch.cat([pooled(self._model.encode_text(chunk)).float() for chunk in tokens.split(batch_size)])
        if features.ndim != 2 or len(features) != len(tokens):
            raise TypeError(
                f"model.encode_text must return [n, D] for {len(tokens)} texts, got {list(features.shape)} from "
                f"{type(self.model).__name__}"
            )
        return features

    @torch.no_grad()
    def class_embeddings(self, classnames: Sequence[str], templates: str | Sequence[str] = PLAIN) -> Tensor:
        """Zero-shot class embeddings: unit-norm text features, averaged over templates and scaled to unit norm again.

        (Radford et al. 2021.) The latest results are cached.

        Args:
            classnames: C names.
            templates: one or more texts with ``{}`` in the place of the class name.

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
    def _checked_texts(self) -> set[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Class names and templates that :func:`mergetune.clip.class_texts.check_texts` has checked."""
        return set()

    @cached_property
    def _embedded(self) -> dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor]:
        """Cache of the latest results of :meth:`class_embeddings`, since a run needs the same ones many times."""
        return {}

    def _packed_features(self, texts: Sequence[str], *, batch_size: int = 128) -> Tensor:
        """:meth:`encode_text` without padding: in a causal tower, tokens after the pooled one cannot influence it."""
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


def weights_fingerprint(model: nn.Module, part: str) -> str:
    """SHA-256 of names, dtypes, shapes and values of weights.

    Args:
        model: the CLIP.
        part: "both" for all weights, "image" for the image tower, "text" for all others.
    """
    tensors = checked_model(model).visual.state_dict() if part == "image" else model.state_dict()
    if part == "text":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def check_clip(clip: Any) -> None:
    """Raise TypeError unless the argument ``clip`` of a function is a CLIP, or has the attributes of one."""
    if not (isinstance(clip, FrozenClip) or all(hasattr(clip, name) for name in ("encode_image", "image_fingerprint"))):
        got = repr(clip) if isinstance(clip, str) else f"a {type(clip).__name__}"
        raise TypeError(f"clip must be a FrozenClip, got {got}: mergetune.load_clip(NAME, WEIGHTS) loads one")
