"""Sizes in bytes, as people write them."""

import pytest

from llava_region.errors import LlavaRegionError
from llava_region.training.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8), ("4096", 4096), (".5KB", 500)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "two GB", "2 GBit", "-1GB", "0", "1e9", "2GB 3MB", "nan"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(LlavaRegionError, match="is not a memory size; allowed"):
        parse_size(text)
