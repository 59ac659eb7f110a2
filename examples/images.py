"""Describe images by their edges: decode and resize on CPUs, convolve on whatever accelerator there is.

The first command draws a few PNG files into a folder, so that there is something to read.

python examples/images.py photos
headrace run examples/images.py --input photos --output edges --keep path
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

import headrace as hr

SIDE = 64  # pixels; every image is cropped and resized to a square
GRID = 4  # the vector tells the edges of each of 4 x 4 tiles, in two directions


@hr.stage(out={"pixels": hr.Vector(SIDE * SIDE, dtype="uint8")}, batch=64)
def decode(image: hr.Column[hr.Image]):
    squares = [ImageOps.fit(Image.open(io.BytesIO(i)).convert("L"), (SIDE, SIDE)) for i in image]
    return {"pixels": [np.asarray(square).ravel() for square in squares]}


@hr.stage(out={"edges": float, "vector": hr.Vector(2 * GRID * GRID)}, on=[hr.gpu(1), hr.cpu(1)], batch=256)
class Edges:
    blur: int = 3  # pixels that are averaged before edges are looked for; an odd number

    def setup(self, device: str):
        import torch

        self.device = device
        across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])  # Sobel's kernel
        self.kernels = torch.stack([across, across.T]).unsqueeze(1).to(device)

    def __call__(self, pixels: hr.Column[hr.Vector(SIDE * SIDE, dtype="uint8")]):
        import torch
        from torch.nn import functional as F

        with torch.inference_mode():
            images = torch.tensor(pixels, device=self.device).view(-1, 1, SIDE, SIDE).float() / 255
            smooth = F.avg_pool2d(images, self.blur, stride=1, padding=self.blur // 2)
            strength = F.conv2d(smooth, self.kernels).abs()
            tiles = F.adaptive_avg_pool2d(strength, GRID).flatten(1)
            return {"edges": strength.mean(dim=(1, 2, 3)), "vector": F.normalize(tiles)}


images = hr.Pipeline("images", decode, Edges(), outputs=["edges", "vector"])  # the pixels stay inside


def draw(folder: Path, count: int = 12):
    """Stripes in different directions and widths, as PNG files."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        picture = Image.new("RGB", (160, 120), "white")
        pen = ImageDraw.Draw(picture)
        step = 6 + 4 * number
        for at in range(0, 160, step):
            line = [(at, 0), (at, 120)] if number % 2 else [(0, at), (160, at)]
            pen.line(line, fill=(20 * number, 60, 120), width=3)
        picture.save(folder / f"stripes-{number:02}.png")
    print(f"{count} images in {folder}")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
