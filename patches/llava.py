"""LLaVA, which PyPI has as llava-torch."""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from llava_region import processes
from llava_region.errors import LlavaRegionError
from llava_region.patches.llava_family import LLaVAFamily, settings_without_tower, tokens_of_tower, vision_model
from llava_region.patches.seams import import_upstream, require
from llava_region.patches.tokenisation import Tokenisation, family_tokenisation
from llava_region.patches.vocabulary import Growth, check_vocabulary
from llava_region.training.flag_values import words
from llava_region.training.vision_files import CLIP, TowerKind, check_tower, read_tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from llava_region.patches.llava_model import LLaVAModels

RELEASE = "1.2.2.post1"  # of llava-torch, made from the commit
BACKBONES = ("llama", "llava", "llava_llama", "mistral", "llava_mistral")  # model types that compute as Llama does
MPT = ("mpt", "llava_mpt")
HUB_TOWERS = ("openai", "laion")  # LLaVA knows a hub name as a CLIP by how it begins, or by ShareGPT4V in it
# settings that a LLaVA checkpoint keeps when training goes on from it, while its config.json gets what the flags say
KEPT = {"mm_projector_type": "linear", "mm_vision_select_layer": -1, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat"}


class LLaVA(LLaVAFamily):
    """LLaVA-1.5 on Llama and Vicuna, LLaVA-Mistral; the layer names of LLaVA-MPT, which its commit cannot run, are known."""

    name = "llava"
    title = "LLaVA"
    commit = "c121f04"
    tested = f"LLaVA {commit} (llava-torch {RELEASE})"
    how_to_get = f"install it with 'pip install --no-deps llava-torch=={RELEASE}', or give the path of llava/train/train.py in a checkout"
    distributions = ("llava-torch", "llava")
    # `llava` is what LLaVA called its Llama models before transformers took that name for a model of its own
    architectures = {
        "llava": "LlavaLlamaForCausalLM", "llava_llama": "LlavaLlamaForCausalLM", "llava_mistral": "LlavaMistralForCausalLM",
        "llava_mpt": "LlavaMptForCausalLM",
    }  # fmt: skip
    supported = {
        "python": ">=3.10,<3.13", "torch": ">=2.1", "transformers": ">=4.36,<4.42", "tokenizers": ">=0.14,<0.20", "peft": ">=0.10,<0.14",
        "accelerate": ">=0.21,<2", "deepspeed": ">=0.12.6,<0.19.8", "numpy": "<2", "bitsandbytes": ">=0.41", "flash-attn": ">=2.3",
    }  # fmt: skip
    pinned = {
        "torch": "2.13.0", "transformers": "4.37.2", "tokenizers": "0.15.1", "peft": "0.10.0", "accelerate": "0.34.2",
        "deepspeed": "0.16.9", "numpy": "1.26.4",
    }  # fmt: skip
    also_tested = {
        "pinned": {  # by LLaVA itself; of peft, which it leaves open, the newest that transformers 4.37 lets import
            "torch": "2.1.2", "transformers": "4.37.2", "tokenizers": "0.15.1", "peft": "0.13.2", "accelerate": "0.21.0",
            "deepspeed": "0.12.6", "numpy": "1.26.4",
        },
        "newest": {
            "torch": "2.13.0", "transformers": "4.41.2", "tokenizers": "0.19.1", "peft": "0.13.2", "accelerate": "1.15.0",
            "deepspeed": "0.19.7", "numpy": "1.26.4",
        },
    }  # fmt: skip
    without = {"flash-attn": "train with LLaVA's train.py, as train_mem.py asks for flash attention"}
    probe = "import llava.train.train; from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM"
    train_module_name = "llava.train.train"
    data_module_name = "llava.train.train"
    default_projector = "linear"
    trainer = "LLaVATrainer"
    scripts = ("train.py", "train_mem.py", "train_xformers.py")
    model_fields = (
        "model_name_or_path", "version", "vision_tower", "tune_mm_mlp_adapter", "freeze_backbone", "pretrain_mm_mlp_adapter",
        "mm_use_im_start_end", "mm_use_im_patch_token", "mm_vision_select_feature", *KEPT,
    )  # fmt: skip
    train_parameters = ("attn_implementation",)
    values = {
        "mm_projector_type": words(("linear", "identity"), pattern=r"mlp\d+x_gelu", further="mlp2x_gelu (or another depth)"),
        "mm_vision_select_feature": words(("patch", "cls_patch")),
        "mm_patch_merge_type": words(("flat", "spatial", "spatial_unpad")),
    }

    def get_command(self, environment: Mapping[str, str]) -> str:
        return f"pip install --no-deps llava-torch=={RELEASE}"

    def transformers_finding(self, version: str) -> str | None:
        from packaging.version import Version

        pinned = self.pinned["transformers"]
        if Version(version).release[:2] < Version(pinned).release[:2]:
            return f"{self.title} pins transformers {pinned}; {version} was not tested with it"
        if Version(version).release[:2] > Version(pinned).release[:2]:
            why = f"transformers {version} passes cache_position to forward, which {self.title} does not take"
            return f"{why}: its own scripts cannot generate, llava-region can"
        return None

    def check(self, args: Namespace, config: Mapping[str, Any]) -> None:
        """Besides what the family checks: no vision tower, so that LLaVA would train a text-only model; an unknown template."""
        super().check(args, config)
        if not args.vision_tower:
            raise LlavaRegionError(
                "--vision_tower is missing, without which LLaVA trains a text-only model; give openai/clip-vit-large-patch14-336"
            )
        templates = self.train_module().conversation_lib.conv_templates
        if args.version not in templates and args.version != "v0.5":  # which LLaVA knows as well
            raise LlavaRegionError(
                f"--version {args.version} is not a conversation template, and LLaVA would silently take vicuna_v1; "
                f"allowed: {', '.join(templates)}, v0.5"
            )
        _check_backbone(args, config)
        if config.get("mm_vision_tower"):
            _check_continued(args, config)

    def tower_of(self, args: Namespace, config: Mapping[str, Any]) -> tuple[str, TowerKind]:
        return config.get("mm_vision_tower") or args.vision_tower, CLIP

    def check_tower(self, args: Namespace, config: Mapping[str, Any]) -> None:
        tower = args.vision_tower
        if not (os.path.exists(tower) or tower.startswith(HUB_TOWERS) or "ShareGPT4V" in tower):
            raise LlavaRegionError(
                f"--vision_tower {tower} is no folder, and LLaVA knows no hub name like it; allowed: a folder with a CLIP, or a name that "
                f"begins with {' or '.join(HUB_TOWERS)}, such as openai/clip-vit-large-patch14-336"
            )
        found = check_tower(tower, "--vision_tower", CLIP)
        kept = config.get("mm_vision_tower") or tower
        if kept != tower:
            its = check_tower(kept, f"'mm_vision_tower' in {args.model_name_or_path}/config.json:", CLIP)
            if its.to_dict() != found.to_dict():
                raise LlavaRegionError(
                    f"--vision_tower {tower} is another tower than the one that {args.model_name_or_path} was trained with, and LLaVA "
                    f"would go on with that one; give --vision_tower {kept}"
                )
        states, layer = found.num_hidden_layers + 1, args.mm_vision_select_layer
        if not -states <= layer < states:
            raise LlavaRegionError(
                f"--mm_vision_select_layer {layer}: {tower} has {found.num_hidden_layers} layers; allowed: {-states} to {states - 1}"
            )

    def load_tokenizer(self, args: Namespace) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        slow = {} if "mpt" in args.model_name_or_path else {"use_fast": False}
        return AutoTokenizer.from_pretrained(
            args.model_name_or_path, cache_dir=args.cache_dir, model_max_length=args.model_max_length, padding_side="right", **slow
        )

    def check_tokenizer(self, args: Namespace, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        model = f"--model_name_or_path {args.model_name_or_path}"
        if args.version != "v0" and tokenizer.unk_token is None:
            raise LlavaRegionError(
                f"{model}: its tokenizer has no unknown token, which LLaVA pads with; set 'unk_token' in its tokenizer_config.json"
            )
        growths = _growths(args, tokenizer)
        check_vocabulary(tokenizer, model, rows, growths, lora=args.lora_enable)
        if args.mm_use_im_start_end and args.pretrain_mm_mlp_adapter:
            new = [token for token in growths[-1].tokens if token not in tokenizer.get_vocab()]
            stored = read_tensors(args.pretrain_mm_mlp_adapter, "--pretrain_mm_mlp_adapter").get("model.embed_tokens.weight")
            if len(new) != 2 or stored is None or stored.shape[0] not in (2, len(tokenizer.get_vocab()) + 2 + args.mm_use_im_patch_token):
                raise LlavaRegionError(
                    "--mm_use_im_start_end True takes the rows of its two tokens from --pretrain_mm_mlp_adapter, whose pretraining has to "
                    "have had that flag, and which the model must not have yet; give --mm_use_im_start_end False"
                )

    def empty_model(self, args: Namespace, config: Mapping[str, Any]) -> nn.Module:
        from llava.model.multimodal_projector.builder import build_vision_projector

        mpt = "mpt" in args.model_name_or_path  # as LLaVA's train() tells it
        model_class = require(self.train_module(), "LlavaMptForCausalLM" if mpt else "LlavaLlamaForCausalLM", self.tested)
        model = model_class(model_class.config_class(**settings_without_tower(config)))
        inner = model.get_model()
        tower = vision_model(args.vision_tower)
        model.config.mm_projector_type = args.mm_projector_type
        model.config.mm_hidden_size = tower.config.hidden_size if tower is not None else 1024
        inner.mm_projector = build_vision_projector(model.config)
        if tower is not None:
            inner.vision_tower = tower
        return model

    def template(self, args: Namespace) -> Any:
        """LLaVA looks up no template for these two, and keeps the one that its module has at first."""
        return self.train_module().conversation_lib.default_conversation if args.version in ("v0", "v0.5") else super().template(args)

    def tokenisation(self, args: Namespace, config: Mapping[str, Any]) -> AbstractContextManager[Tokenisation]:
        """With the tokenizer that train() builds: slow but for MPT, padded with the unknown token, with the image tokens added."""
        from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN

        tokenizer = self.load_tokenizer(args)
        rows = None if _growths(args, tokenizer) else config.get("vocab_size")
        if args.version != "v0":
            tokenizer.pad_token = tokenizer.unk_token
        elif tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        if args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
        if args.mm_use_im_start_end:
            tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
        continued = config.get("mm_vision_tower")  # whose tower stays, whatever the flags say
        class_token = (config if continued else vars(args)).get("mm_vision_select_feature") == "cls_patch"
        per_image = tokens_of_tower(continued or args.vision_tower, class_token)
        settings = {"is_multimodal": True, "mm_use_im_start_end": args.mm_use_im_start_end}
        module = self.train_module()
        return family_tokenisation(
            self.data_module(), module.conversation_lib, tokenizer, self.template(args), per_image, rows, **settings
        )  # fmt: skip

    def loading_code(self, model: str, base: str | None, config: Mapping[str, Any]) -> tuple[str, ...]:
        """LLaVA decides by the words in the third argument."""
        name = "-".join(("llava", *(["mpt"] if "mpt" in config.get("model_type", "") else []), *(["lora"] if base else [])))
        return (
            "from llava.model.builder import load_pretrained_model",
            "",
            f"tokenizer, model, image_processor, _ = load_pretrained_model({model!r}, {base!r}, {name!r})",
        )

    def check_script(self, script: str) -> None:
        needs = {"train_mem.py": ("flash_attn", "flash attention", "flash-attn")}
        if not _has_sdpa():
            needs["train_xformers.py"] = ("xformers", "xformers", "xformers")
        package, title, name = needs.get(script, (None, "", ""))
        if package and importlib.util.find_spec(package) is None:
            raise LlavaRegionError(
                f"{script} asks for {title}, which is not installed; install {name}, or give train.py or 'llava' instead"
            )

    def entry(self, script: str) -> Callable[[], None]:
        """Each of LLaVA's scripts asks for another attention implementation."""
        super().entry(script)  # refuses an unknown one
        if script == "train_xformers.py" and _has_sdpa():
            if processes.is_first():
                print(
                    f"{script}: attention is torch's own (SDPA); LLaVA's patch for xformers has no effect with this transformers",
                    flush=True,
                )
        elif script == "train_xformers.py":
            # replaces Llama's attention, and has to run before the model classes are used
            patch = import_upstream("llava.train.llama_xformers_attn_monkey_patch", self.title, "install xformers, or use train_mem.py")
            patch.replace_llama_attn_with_xformers_attn()
        attention = "flash_attention_2" if script == "train_mem.py" else None
        return lambda: self.train_module().train(attn_implementation=attention)

    def model_side(self) -> LLaVAModels:
        return import_upstream("llava_region.patches.llava_model", self.title, self.how_to_get).LLaVAModels()


def _has_sdpa() -> bool:
    """Whether transformers' Llama computes attention by torch's SDPA, in a class of its own that LLaVA's patch for xformers misses."""
    from transformers.utils import is_torch_sdpa_available

    return is_torch_sdpa_available()


def _check_backbone(args: Namespace, config: Mapping[str, Any]) -> None:
    """LLaVA loads any model as Llama, or as MPT where its path says so."""
    model, kind = args.model_name_or_path, config.get("model_type")
    if "mpt" in model and kind not in MPT:
        raise LlavaRegionError(
            f"--model_name_or_path {model} has 'mpt' in it, for which LLaVA would load it as MPT, but it is '{kind}'; give a path without "
            "these letters: rename or link a folder, or give it relative to where you start"
        )
    if kind not in (None, *BACKBONES) and not (kind in MPT and "mpt" in model):
        raise LlavaRegionError(
            f"--model_name_or_path {model} is of model type '{kind}', which LLaVA would load as Llama, whatever it computes; allowed: "
            f"{', '.join(BACKBONES)} (a model that computes as Llama does can say so in its config.json)"
        )


def _check_continued(args: Namespace, config: Mapping[str, Any]) -> None:
    """Training goes on from a LLaVA checkpoint: its own vision part stays as it is, and the flags say only what config.json records."""
    for name, default in KEPT.items():
        ours, given = config.get(name, default), getattr(args, name)
        if given != ours:
            raise LlavaRegionError(
                f"--{name} {given} does not fit {args.model_name_or_path}, which stays with {ours}, while the result's config.json would "
                f"say {given}; give --{name} {ours}"
            )


def _growths(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Growth]:
    """What LLaVA adds to the vocabulary, in its order."""
    growths = []
    if args.version == "v0" and tokenizer.pad_token is None:
        growths.append(Growth("--version v0", ("[PAD]",), "give another template, such as v1", True))
    if args.mm_use_im_patch_token:
        give = "give --mm_use_im_patch_token False, as LLaVA's own scripts do"
        growths.append(Growth("--mm_use_im_patch_token True (the default)", ("<im_patch>",), give, False))
    if args.mm_use_im_start_end:
        growths.append(Growth("--mm_use_im_start_end True", ("<im_start>", "<im_end>"), "give --mm_use_im_start_end False", True))
    return growths


UPSTREAM = LLaVA()
applied = UPSTREAM.applied
