"""Bunny, which is on no package index."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region.errors import LlavaRegionError
from llava_region.patches.llava_family import LLaVAFamily, settings_without_tower, tokens_of_tower, vision_model
from llava_region.patches.seams import import_upstream, require
from llava_region.patches.tokenisation import Tokenisation, family_tokenisation
from llava_region.patches.vocabulary import check_vocabulary
from llava_region.training.flag_values import words
from llava_region.training.vision_files import CLIP, SIGLIP, TowerKind, check_tower

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from llava_region.patches.bunny_model import BunnyModels

# --model_type: (Bunny's class for it, model types of the config.json it can load, template it is trained with)
MODEL_TYPES = {
    "llama3-8b": ("BunnyLlamaForCausalLM", ("llama", "bunny-llama"), "llama"),
    "phi-3": ("BunnyPhi3ForCausalLM", ("phi3", "bunny-phi3"), "phi3"),
    "phi-2": ("BunnyPhiForCausalLM", ("phi", "phi-msft", "bunny-phi"), "bunny"),
    "phi-1.5": ("BunnyPhiForCausalLM", ("phi", "phi-msft", "bunny-phi"), "bunny"),
    "qwen1.5-1.8b": ("BunnyQwen2ForCausalLM", ("qwen2", "bunny-qwen2"), "bunny"),
    "stablelm-2": ("BunnyStableLMForCausalLM", ("stablelm", "stablelm_epoch", "bunny-stablelm"), "bunny"),
    "minicpm": ("BunnyMiniCPMForCausalLM", ("minicpm", "bunny-minicpm"), "minicpm"),
}
LLAMA3_EOS = 128001  # written into Bunny's train() for llama3-8b
SIGLIP_WIDTH = 1152  # of siglip-so400m, where the tower's config isn't on this machine
EVA_PATCHES = (336 // 14) ** 2  # written into Bunny's EVA tower
EVA_WIDTH = 1024  # Bunny knows one EVA-CLIP, whose weights are a file
# Bunny tells a vision tower's kind by these in its path, in this order
TOWERS: dict[str, TowerKind | None] = {"sig": SIGLIP, "eva": None, "clip": CLIP}
BY_FOUR = ("minigpt", "vanilla")  # projectors that lay four patches side by side


class Bunny(LLaVAFamily):
    """Bunny's seven model types, on SigLIP, EVA and CLIP towers."""

    name = "bunny"
    title = "Bunny"
    commit = "08273ac"
    tested = f"Bunny {commit}"
    how_to_get = f"put a checkout of BAAI-DCAI/Bunny at {commit} on PYTHONPATH, or give the path of bunny/train/train.py in it"
    variables = ("BUNNY_ROOT",)
    distributions = ("bunny",)
    architectures = {
        "bunny-llama": "BunnyLlamaForCausalLM", "bunny-minicpm": "BunnyMiniCPMForCausalLM", "bunny-phi": "BunnyPhiForCausalLM",
        "bunny-phi3": "BunnyPhi3ForCausalLM", "bunny-qwen2": "BunnyQwen2ForCausalLM", "bunny-stablelm": "BunnyStableLMForCausalLM",
    }  # fmt: skip
    supported = {
        "python": ">=3.10,<3.13", "torch": ">=2.1", "transformers": ">=4.39.3,<4.42", "tokenizers": ">=0.14,<0.20", "peft": ">=0.10,<0.13",
        "accelerate": ">=0.21,<1.0", "deepspeed": ">=0.16,<0.19.8", "numpy": "<2", "bitsandbytes": ">=0.41", "flash-attn": ">=2.3",
    }  # fmt: skip
    pinned = {
        "torch": "2.13.0", "transformers": "4.40.2", "tokenizers": "0.19.1", "peft": "0.10.0", "accelerate": "0.30.1",
        "deepspeed": "0.18.9", "numpy": "1.26.4",
    }  # fmt: skip
    probe = "import bunny.train.train"
    train_module_name = "bunny.train.train"
    data_module_name = "bunny.util.data_utils"
    default_projector = "mlp2x_gelu"
    trainer = "BunnyTrainer"
    model_fields = (
        "model_name_or_path", "model_type", "version", "vision_tower", "unfreeze_vision_tower", "use_s2", "tune_mm_mlp_adapter",
        "freeze_backbone", "pretrain_mm_mlp_adapter", "mm_projector_type",
    )  # fmt: skip

    values = {
        "mm_projector_type": words(
            ("linear", "identity", "spp_v1", "spp_v2", "spp_v3", "ldp", "vanilla", "minigpt"),
            pattern=r"mlp\d+x_gelu|spp.*v[123].*",
            further="mlp2x_gelu (or another depth)",
        ),
        "model_type": words(MODEL_TYPES, "is unknown to Bunny"),
    }

    def get_command(self, environment: Mapping[str, str]) -> str:
        if root := environment.get("BUNNY_ROOT"):  # the checkout that this package's own tests run against
            return f"export PYTHONPATH={root}"
        return f"clone github.com/BAAI-DCAI/Bunny at {self.commit}, and put it on PYTHONPATH"

    def check(self, args: Namespace, config: Mapping[str, Any]) -> None:
        """Besides what the family checks: model type, template and tower have to fit each other and the model."""
        super().check(args, config)
        if args.model_type is None:
            raise LlavaRegionError(f"--model_type is missing; allowed: {', '.join(MODEL_TYPES)}")
        _, kinds, template = MODEL_TYPES[args.model_type]
        if config.get("model_type") not in kinds:
            raise LlavaRegionError(
                f"--model_type {args.model_type} does not fit {args.model_name_or_path}, whose config.json says "
                f"'{config.get('model_type')}'; allowed for it: {', '.join(kinds)}"
            )
        if args.model_type == "llama3-8b" and config.get("vocab_size", 0) <= LLAMA3_EOS:
            raise LlavaRegionError(
                f"--model_type llama3-8b ends answers with token {LLAMA3_EOS}, but {args.model_name_or_path} has "
                f"{config.get('vocab_size')} tokens; give a Llama 3"
            )
        templates = self.train_module().conversation_lib.conv_templates
        if args.version not in templates:
            raise LlavaRegionError(
                f"--version {args.version} is not a conversation template, and Bunny would silently take 'bunny'; "
                f"allowed: {', '.join(templates)}; --model_type {args.model_type} is trained with {template}"
            )
        _check_tower(args)
        if config.get("mm_vision_tower"):
            _check_continued(args, config)

    def tower_of(self, args: Namespace, config: Mapping[str, Any]) -> tuple[str, TowerKind | None]:
        tower = config.get("mm_vision_tower") or args.vision_tower
        return tower, TOWERS.get(_kind_of(tower) or "")

    def check_tower(self, args: Namespace, config: Mapping[str, Any]) -> None:
        flag = f"'mm_vision_tower' in {args.model_name_or_path}/config.json:" if config.get("mm_vision_tower") else "--vision_tower"
        tower, tower_kind = self.tower_of(args, config)
        if _required_kind(tower, flag) == "eva":
            if not Path(tower).is_file():
                raise LlavaRegionError(f"{flag} {tower}: Bunny takes it for EVA-CLIP by 'eva' in its path; give the file of its weights")
            return
        assert tower_kind is not None, "EVA alone is not one of transformers'"
        found = check_tower(tower, flag, tower_kind, resized=args.use_s2)
        patches = (found.image_size // found.patch_size) ** 2
        if args.mm_projector_type in BY_FOUR and patches % 4:
            raise LlavaRegionError(
                f"--mm_projector_type {args.mm_projector_type} takes patches by four, and {tower} makes {patches}; give mlp2x_gelu"
            )

    def load_tokenizer(self, args: Namespace) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        code = {"trust_remote_code": True} if args.model_type == "stablelm-2" else {}
        return AutoTokenizer.from_pretrained(
            args.model_name_or_path, cache_dir=args.cache_dir, model_max_length=args.model_max_length, padding_side="right", use_fast=True,
            **code,
        )  # fmt: skip

    def check_tokenizer(self, args: Namespace, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        model = f"--model_name_or_path {args.model_name_or_path}"
        if tokenizer.pad_token is None and tokenizer.unk_token is None and args.model_type != "llama3-8b":
            raise LlavaRegionError(
                f"{model}: its tokenizer has neither a padding nor an unknown token, and Bunny pads with one; set 'pad_token' in its "
                "tokenizer_config.json"
            )
        check_vocabulary(tokenizer, model, rows, [], lora=args.lora_enable)

    def empty_model(self, args: Namespace, config: Mapping[str, Any]) -> nn.Module:
        from bunny.model.multimodal_projector.builder import build_vision_projector

        model_class = require(self.train_module(), MODEL_TYPES[args.model_type][0], self.tested)
        model = model_class(model_class.config_class(**settings_without_tower(config)))
        inner = model.get_model()
        path, _ = self.tower_of(args, config)
        eva = _kind_of(path) == "eva" and not Path(path).is_dir()
        tower = None if eva else vision_model(path)
        model.config.mm_projector_type = args.mm_projector_type
        scales = 3 if args.use_s2 else 1  # S2 lays the features of three resolutions side by side
        unknown = EVA_WIDTH if eva else SIGLIP_WIDTH
        model.config.mm_hidden_size = scales * (tower.config.hidden_size if tower is not None else unknown)
        inner.mm_projector = build_vision_projector(model.config)
        if tower is not None:
            inner.vision_tower = tower
        return model

    def tokenisation(self, args: Namespace, config: Mapping[str, Any]) -> AbstractContextManager[Tokenisation]:
        """With the tokenizer that train() builds: fast, padded with the unknown token where it has none, Llama 3's with its own end."""
        tokenizer = self.load_tokenizer(args)
        if tokenizer.unk_token is not None and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token
        if args.model_type == "llama3-8b":
            tokenizer.eos_token_id = LLAMA3_EOS
            tokenizer.pad_token = tokenizer.eos_token
        conversation = self.train_module().conversation_lib
        per_image = _tokens_per_image(args, config.get("mm_vision_tower") or args.vision_tower)
        multimodal = getattr(args, "is_multimodal", True)
        return family_tokenisation(
            self.data_module(), conversation, tokenizer, self.template(args), per_image, config.get("vocab_size"), is_multimodal=multimodal
        )

    def loading_code(self, model: str, base: str | None, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Bunny is told the kind of model, and decides by the words in the third argument whether it is a LoRA run."""
        kind = next((name for name, (_, kinds, _) in MODEL_TYPES.items() if config.get("model_type") in kinds), "phi-2")
        name = "bunny-lora" if base else "bunny"
        return (
            "from bunny.model.builder import load_pretrained_model",
            "",
            f"tokenizer, model, image_processor, _ = load_pretrained_model({model!r}, {base!r}, {name!r}, {kind!r})",
        )

    def picture_problem(self, args: Namespace, width: int, height: int) -> str | None:
        """EVA's processor is Bunny's own, and takes every size."""
        return None if _kind_of(args.vision_tower) == "eva" else super().picture_problem(args, width, height)

    def model_side(self) -> BunnyModels:
        return import_upstream("llava_region.patches.bunny_model", self.title, self.how_to_get).BunnyModels()


def _kind_of(tower: str) -> str | None:
    """The kind that Bunny takes a vision tower for."""
    return next((kind for kind in TOWERS if kind in tower.lower()), None)


def _required_kind(tower: str, flag: str) -> str:
    """The same, where there has to be one.

    Raises:
        LlavaRegionError: Bunny would not know it.
    """
    kind = _kind_of(tower)
    if kind is None:
        raise LlavaRegionError(f"{flag} {tower} is of no kind that Bunny can tell; allowed: a path that contains {', '.join(TOWERS)}")
    return kind


def _check_tower(args: Namespace) -> None:
    if not args.vision_tower:
        raise LlavaRegionError("--vision_tower is missing; give google/siglip-so400m-patch14-384")
    kind = _required_kind(args.vision_tower, "--vision_tower")
    if args.use_s2 and kind != "sig":
        raise LlavaRegionError(f"--use_s2 True works with SigLIP alone, not with {args.vision_tower}; leave it out")
    if args.unfreeze_vision_tower and not args.bf16 and not args.deepspeed:
        raise LlavaRegionError(
            "--unfreeze_vision_tower True without bf16 would train the tower in plain fp16, where its updates vanish; add --bf16 True"
        )


def _tokens_per_image(args: Namespace, tower: str) -> int:
    """Patches of the tower; 1 for projectors that merge patches, which so are never said to be cut where they are not."""
    if args.mm_projector_type not in ("linear", "identity") and not args.mm_projector_type.startswith("mlp"):
        return 1
    return EVA_PATCHES if _kind_of(tower) == "eva" else tokens_of_tower(tower)


def _check_continued(args: Namespace, config: Mapping[str, Any]) -> None:
    """Training goes on from a Bunny checkpoint: its own tower and projector are used, whatever the flags say of theirs."""
    tower, model = config["mm_vision_tower"], args.model_name_or_path
    if Path(tower).is_absolute() and not Path(tower).exists():
        raise LlavaRegionError(f"the vision tower {tower} that {model}/config.json names is not there; fix 'mm_vision_tower' in it")
    if config.get("unfreeze_vision_tower") and not config.get("continuous_training"):
        raise LlavaRegionError(
            f"{model} has a vision tower of its own, trained with --unfreeze_vision_tower, which Bunny would leave out; "
            'set "continuous_training": true in its config.json'
        )
    for name, ours in (("mm_projector_type", "mlp2x_gelu"), ("use_s2", False)):
        if getattr(args, name) != config.get(name, ours):
            raise LlavaRegionError(f"--{name} {getattr(args, name)} does not fit {model}; give --{name} {config.get(name, ours)}")


UPSTREAM = Bunny()
applied = UPSTREAM.applied
