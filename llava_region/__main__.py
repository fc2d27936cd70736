"""`python -m llava_region`, and `torchrun -m llava_region` for the commands that use several GPUs."""

import sys

from llava_region.cli import main

sys.exit(main())
