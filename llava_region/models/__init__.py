"""Load a finished model of any upstream and put questions and images to it: `load(folder)`."""

from llava_region.models.loading import DTYPES, Embedded, LoadedModel, load

__all__ = ["DTYPES", "Embedded", "LoadedModel", "load"]
