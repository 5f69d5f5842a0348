"""Print label and probability of pictures: python predict_onnx.py MODEL.onnx PICTURE ..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def as_rgb(image, background):
    if image.mode[0] in "IF":  # greys of more than 8 bits: scaled by the smallest depth that holds the largest value
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("the picture must have finite values, got NaN or infinity")
        tops = (1, 255) if image.mode[0] == "F" else [(1 << bits) - 1 for bits in (8, 10, 12, 14, 16)]
        top = next((top for top in tops if high <= top), None)
        low, high = (0, top) if low >= 0 and top else (low, high)
        grey = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / max(high - low, 1e-30))
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")
    if not np.ptp(np.asarray(flat), axis=(0, 1)).any() and np.ptp(np.asarray(picture), axis=(0, 1)).any():
        raise ValueError(f"the picture becomes one colour on a {background} background: export with another background")
    return flat


def pixels_of(image, size, mean, std, interpolation, resize, fill):
    (width, height), (H, W) = image.size, size
    if resize == "squash":
        width, height = W, H
    elif resize == "shortest" and H == W:
        width, height = max(W, int(W * width / height)), max(H, int(H * height / width))
    else:
        ratio = (min if resize == "shortest" else max)(height / H, width / W)
        width, height = round(width / ratio), round(height / ratio)
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    # Cut off what is too large and pad what is too small, around the centre.
    left, top = ((b - a) // 2 if a < b else -round((a - b) / 2) for a, b in ((width, W), (height, H)))
    canvas = Image.new("RGB", (W, H), (fill, fill, fill))
    canvas.paste(image, (left, top))
    x = np.asarray(canvas, np.float32) / np.float32(255)
    return ((x - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python predict_onnx.py MODEL.onnx PICTURE ...")
    session = onnxruntime.InferenceSession(sys.argv[1], providers=onnxruntime.get_available_providers())
    facts = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    failed = False
    for picture in sys.argv[2:]:
        try:
            with Image.open(picture) as image:
                pixels = pixels_of(as_rgb(image, facts["background"]), **facts["preprocess"])
        except Exception as error:  # decoders raise exceptions of any type
            print(f"{picture}: {error or type(error).__name__}", file=sys.stderr)
            failed = True
            continue
        logits = np.asarray(session.run(None, {"pixels": pixels[None]})[0], np.float64)[0]
        p = np.exp(logits - logits.max())
        row = (picture, facts["classnames"][p.argmax()], f"{p.max() / p.sum():.4f}")
        print(*(text if text.isprintable() else repr(text)[1:-1] for text in row), sep="\t")
    sys.exit(failed)
