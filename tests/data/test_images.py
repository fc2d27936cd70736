"""Pictures read and decoded, in order and not too far ahead."""

import io
import threading

import pytest
from PIL import Image

from llava_region.data.images import UnreadableImage, image_problem, prefetch, read_image, read_pixels
from tests.helpers.broken_pictures import BROKEN, MAX_PIXELS


def test_a_file_and_its_bytes_are_the_same_picture_in_rgb(tmp_path):
    Image.new("P", (5, 3), 7).save(tmp_path / "a.png")
    file, encoded = read_image(tmp_path / "a.png"), read_image((tmp_path / "a.png").read_bytes())
    assert file.mode == encoded.mode == "RGB" and file.size == (5, 3) and file.tobytes() == encoded.tobytes()


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path):
    with pytest.raises(UnreadableImage, match=r"cannot read .*/none.png \(it is missing\); fix"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UnreadableImage, match=r"cannot read an image of 4 bytes \(UnidentifiedImageError: "):
        read_image(b"text")
    assert image_problem(tmp_path / "none.png") == image_problem(tmp_path) == "missing"


@pytest.mark.parametrize(("name", "problem"), [("bomb.png", "DecompressionBombError"), ("text.jpg", "UnidentifiedImageError")])
def test_the_check_names_the_kind_of_error(tmp_path, monkeypatch, name, problem):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS)
    BROKEN[name](tmp_path / name)
    assert image_problem(tmp_path / name) == f"corrupt: {problem}"


def test_the_check_knows_the_size_as_stored(tmp_path):
    """JPEG is decoded at a fraction of its size, and EXIF may say to turn it, which the upstreams do not do."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (640, 3)).save(tmp_path / "a.jpg", exif=exif)
    assert image_problem(tmp_path / "a.jpg", lambda width, height: f"{width} x {height}") == "640 x 3"
    assert image_problem(tmp_path / "a.jpg") is None


def test_a_picture_that_the_image_processor_refuses_is_named():
    def refuse(image):
        raise ValueError("mean must have 1 elements")

    buffer = io.BytesIO()
    Image.new("RGB", (3, 1)).save(buffer, "PNG")
    with pytest.raises(UnreadableImage, match="mean must have 1 elements"):
        read_pixels(buffer.getvalue(), refuse)


@pytest.mark.parametrize("workers", [1, 3])
def test_prefetch_keeps_the_order_and_is_at_most_two_calls_a_worker_ahead(workers):
    started, taken = [], []
    for item, result in prefetch(lambda i: started.append(i) or i * i, iter(range(20)), workers):
        assert result == item * item
        taken.append(item)
        assert len(started) <= len(taken) + 2 * workers
    assert taken == list(range(20))


def test_prefetch_raises_where_the_items_turn_comes_and_starts_nothing_after():
    def double(i):
        if i == 3:
            raise UnreadableImage("3.png", ValueError("no"))
        return 2 * i

    seen, before = [], threading.active_count()
    with pytest.raises(UnreadableImage):
        seen.extend(result for _, result in prefetch(double, range(100), 2))
    assert seen == [0, 2, 4] and threading.active_count() == before
