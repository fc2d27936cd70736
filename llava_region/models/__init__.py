"""Load a finished model of any upstream and put questions and images to it: `load(folder)`."""

from llava_region.models.loaded import Embedded, LoadedModel
from llava_region.models.loading import DTYPES, load

__all__ = ["DTYPES", "Embedded", "LoadedModel", "load"]
