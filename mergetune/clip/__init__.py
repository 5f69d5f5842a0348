"""The frozen CLIP: loading, texts and templates, the packed text tower, and edits of both towers."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.clip.backbone import FrozenClip
    from mergetune.clip.edited_classes import ClassFeatures, prepare_classes, words_before_name
    from mergetune.clip.edited_images import (
        ImageFeatures,
        ImageInput,
        TokensBefore,
        earliest_input,
        image_tokens,
        prepare_images,
    )
    from mergetune.clip.edited_towers import block_prefix
    from mergetune.clip.edits import ClassRows, Context, Edit, TokenMap
    from mergetune.clip.feature_space import FeatureSpace
    from mergetune.clip.loading import load_clip
    from mergetune.clip.packed_texts import TextEncoder, arrange, text_encoder
    from mergetune.clip.precisions import PRECISIONS
    from mergetune.clip.text_tower import TextParts
    from mergetune.clip.texts import (
        PLAIN,
        check_classnames,
        check_same_classes,
        check_templates,
        fill,
        words_before,
    )

__all__ = [
    "PLAIN",
    "PRECISIONS",
    "ClassFeatures",
    "ClassRows",
    "Context",
    "Edit",
    "FeatureSpace",
    "FrozenClip",
    "ImageFeatures",
    "ImageInput",
    "TextEncoder",
    "TextParts",
    "TokenMap",
    "TokensBefore",
    "arrange",
    "block_prefix",
    "check_classnames",
    "check_same_classes",
    "check_templates",
    "earliest_input",
    "fill",
    "image_tokens",
    "load_clip",
    "prepare_classes",
    "prepare_images",
    "text_encoder",
    "words_before",
    "words_before_name",
]

make_lazy(
    __name__,
    {
        "mergetune.clip.backbone": "FrozenClip",
        "mergetune.clip.edited_classes": "ClassFeatures prepare_classes words_before_name",
        "mergetune.clip.edited_images": (
            "ImageFeatures ImageInput TokensBefore earliest_input image_tokens prepare_images"
        ),
        "mergetune.clip.edited_towers": "block_prefix",
        "mergetune.clip.edits": "ClassRows Context Edit TokenMap",
        "mergetune.clip.feature_space": "FeatureSpace",
        "mergetune.clip.loading": "load_clip",
        "mergetune.clip.packed_texts": "TextEncoder arrange text_encoder",
        "mergetune.clip.precisions": "PRECISIONS",
        "mergetune.clip.text_tower": "TextParts",
        "mergetune.clip.texts": "PLAIN check_classnames check_same_classes check_templates fill words_before",
    },
)
