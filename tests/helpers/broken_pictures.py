"""Pictures that a folder of downloaded images holds sooner or later, and that no model can be shown."""

from pathlib import Path

from PIL import Image

MAX_PIXELS = 10_000  # for `Image.MAX_IMAGE_PIXELS`: PIL refuses a picture of more than twice as many


def bomb(path: Path) -> None:
    Image.new("RGB", (200, 200)).save(path)


def truncated(path: Path) -> None:
    Image.effect_noise((90, 90), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:3000])


def one_pixel_high(path: Path) -> None:
    """Decodes well, but the image processor takes its height for channels, where the model does not pad to a square."""
    Image.new("RGB", (64, 1)).save(path)


def text(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>")


# file name -> who writes it; `missing.png` is written by nobody
BROKEN = {"bomb.png": bomb, "truncated.png": truncated, "flat.png": one_pixel_high, "text.jpg": text}
