"""Everything that this package has to be told about `toy_codebase` to train a region of its models."""

from contextlib import nullcontext
from pathlib import Path

from llava_region.decoder import Parts
from llava_region.errors import LlavaRegionError
from llava_region.patches.seams import import_upstream, require, require_fields
from llava_region.patches.tokenisation import Tokenisation
from llava_region.patches.upstream import Lora, Recipe, Upstream


class Toy(Upstream):
    name = title = "toy"
    commit = tested = "0.0"
    how_to_get = "put tests/patches/toy_codebase on PYTHONPATH"
    distributions = ("toy",)
    parts = Parts(layers=("stack",), projector=("bridge",), vision=("eye",), embeddings=("words",), head=("answer",))
    architectures = {"toy": "ToyModel"}
    supported = pinned = {}
    probe = "import toy.train"
    train_module_name, trainer, linear_names = "toy.train", "ToyTrainer", "lora_targets"

    def train_module(self):
        module = import_upstream(self.train_module_name, self.title, self.how_to_get)
        require_fields(module, "ModelArguments", self.tested, ("start_from",))
        require_fields(module, "TrainingArguments", self.tested, ("rank",))
        require(module, self.linear_names, self.tested, ("model",))
        require(module, "ids_and_labels", self.tested, ("record",))
        require(module, self.trainer, self.tested)
        return module

    def recipe(self, args):
        rank = getattr(args, "rank", 0)
        return Recipe(
            model=getattr(args, "start_from", None),
            data=getattr(args, "talk", None),
            images=getattr(args, "pictures", None),
            lora=Lora(rank, 2 * rank, 0.0, "none") if rank else None,
            max_length=21,
            flags={"model": "--start_from"},
        )

    def check(self, args, config):
        if args.rank < 0:
            raise LlavaRegionError(f"--rank {args.rank} is negative; allowed: 0 (full tuning) or more")

    def empty_model(self, args, config):
        module = self.train_module()
        return module.ToyModel(module.ToyConfig(**config))

    def tokenisation(self, args, config):
        return nullcontext(Tokenisation(self.train_module().ids_and_labels))

    def trained_besides_lora(self, named_parameters):
        return {name: p.detach().clone() for name, p in named_parameters if p.requires_grad and "lora_" not in name}

    def image_tokens(self, inputs):
        return inputs["input_ids"] < 0

    def features_per_image(self, model):
        return 1

    def checkout_of(self, script: Path):
        return script.resolve().parents[1] if script.resolve().parent.name == "toy" else None


UPSTREAM = Toy()
