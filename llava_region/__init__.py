"""Train, examine and prune the visual region of LLaVA-style models (Wang et al., ACL 2025).

Importing the package is cheap and never imports torch, LLaVA or Bunny.
"""

from llava_region.errors import LlavaRegionError, UnsupportedUpstream
from llava_region.region import Region

__version__ = "0.1.0"

__all__ = ["LlavaRegionError", "Region", "UnsupportedUpstream", "__version__"]
