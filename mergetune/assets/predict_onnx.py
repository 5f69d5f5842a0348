"""Print label and probability of pictures: python predict_onnx.py MODEL.onnx PICTURE ..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


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
    session = onnxruntime.InferenceSession(sys.argv[1], providers=onnxruntime.get_available_providers())
    facts = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    for picture in sys.argv[2:]:
        pixels = pixels_of(Image.open(picture).convert("RGB"), **facts["preprocess"])
        logits = np.asarray(session.run(None, {"pixels": pixels[None]})[0], np.float64)[0]
        p = np.exp(logits - logits.max())
        row = (picture, facts["classnames"][p.argmax()], f"{p.max() / p.sum():.4f}")
        print(*(text if text.isprintable() else repr(text)[1:-1] for text in row), sep="\t")
