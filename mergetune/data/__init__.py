"""Images and features: image lists, the benchmark datasets and their templates, and feature caches."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.data.batches import Batches, TensorBatches
    from mergetune.data.benchmarks import DATASETS, Benchmark, CoOpDataset, benchmark, check_dataset, few_shot_path
    from mergetune.data.cache import FeatureCache
    from mergetune.data.cache_building import cache_features
    from mergetune.data.decoding import DecodedPictures, decode_pictures
    from mergetune.data.feature_files import read_features
    from mergetune.data.image_lists import Dataset, ImageList
    from mergetune.data.own_images import ImageFolder, coop_split, image_table, listed_images
    from mergetune.data.pictures import FoundPicture, find_pictures, is_one_picture
    from mergetune.data.pixel_batches import PixelBatches
    from mergetune.data.templates import TEMPLATES, templates_for
    from mergetune.io import image_extensions, load_image

__all__ = [
    "DATASETS",
    "TEMPLATES",
    "Batches",
    "Benchmark",
    "CoOpDataset",
    "Dataset",
    "DecodedPictures",
    "FeatureCache",
    "FoundPicture",
    "ImageFolder",
    "ImageList",
    "PixelBatches",
    "TensorBatches",
    "benchmark",
    "cache_features",
    "check_dataset",
    "coop_split",
    "decode_pictures",
    "few_shot_path",
    "find_pictures",
    "image_extensions",
    "image_table",
    "is_one_picture",
    "listed_images",
    "load_image",
    "read_features",
    "templates_for",
]

make_lazy(
    __name__,
    {
        "mergetune.data.batches": "Batches TensorBatches",
        "mergetune.data.benchmarks": "DATASETS Benchmark CoOpDataset benchmark check_dataset few_shot_path",
        "mergetune.data.cache": "FeatureCache",
        "mergetune.data.cache_building": "cache_features",
        "mergetune.data.decoding": "DecodedPictures decode_pictures",
        "mergetune.data.feature_files": "read_features",
        "mergetune.data.image_lists": "Dataset ImageList",
        "mergetune.data.own_images": "ImageFolder coop_split image_table listed_images",
        "mergetune.data.pixel_batches": "PixelBatches",
        "mergetune.data.pictures": "FoundPicture find_pictures is_one_picture",
        "mergetune.data.templates": "TEMPLATES templates_for",
        "mergetune.io": "image_extensions load_image",
    },
)
