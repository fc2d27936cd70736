"""A Phi that sees: image features stand where the ids say -200. One image a sample, or none."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PhiConfig, PhiForCausalLM, PhiModel, SiglipImageProcessor, SiglipVisionModel

from bunny.model.multimodal_projector.builder import build_vision_projector


class BunnyPhiConfig(PhiConfig):
    model_type = "bunny-phi"


class VisionTower(nn.Module):
    def __init__(self, name, delay_load):
        super().__init__()
        self.name, self.is_loaded = name, False
        if not delay_load:
            self.load_model()

    def load_model(self):
        if not self.is_loaded:
            self.image_processor = SiglipImageProcessor.from_pretrained(self.name)
            self.vision_tower = SiglipVisionModel.from_pretrained(self.name).requires_grad_(False)
            self.is_loaded = True

    def forward(self, images):
        return self.vision_tower(images.to(self.vision_tower.dtype), output_hidden_states=True).hidden_states[-2].to(images.dtype)

    @property
    def num_patches(self):
        config = self.vision_tower.config
        return (config.image_size // config.patch_size) ** 2


class BunnyPhiModel(PhiModel):
    config_class = BunnyPhiConfig

    def __init__(self, config):
        super().__init__(config)
        if hasattr(config, "mm_vision_tower"):
            self.vision_tower = VisionTower(config.mm_vision_tower, delay_load=not getattr(config, "continuous_training", False))
            self.mm_projector = build_vision_projector(config)
            config.continuous_training = False

    def initialize_vision_modules(self, model_args):
        self.config.mm_vision_tower = model_args.vision_tower
        if not hasattr(self, "vision_tower"):
            self.vision_tower = VisionTower(model_args.vision_tower, delay_load=True)
        self.vision_tower.load_model()
        self.config.mm_hidden_size = self.vision_tower.vision_tower.config.hidden_size
        self.config.mm_projector_type = model_args.mm_projector_type
        if not hasattr(self, "mm_projector"):
            self.mm_projector = build_vision_projector(self.config)
        self.mm_projector.requires_grad_(True)


class BunnyPhiForCausalLM(PhiForCausalLM):
    config_class = BunnyPhiConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = BunnyPhiModel(config)
        self.post_init()

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return getattr(self.model, "vision_tower", None)

    def prepare_inputs_labels_for_multimodal(self, input_ids, position_ids, attention_mask, past_key_values, labels, images):
        features = self.model.mm_projector(self.get_vision_tower()(images))
        embeds, targets = [], []
        for ids, mask, target, seen in zip(input_ids, attention_mask, labels, features, strict=True):
            ids, target = ids[mask], target[mask]
            at = (ids == -200).nonzero().flatten().tolist()
            cut, image = (at[0], seen) if at else (len(ids), seen[:0])
            text = self.model.embed_tokens(torch.cat([ids[:cut], ids[cut + 1 :]]))
            embeds.append(torch.cat([text[:cut], image, text[cut:]]))
            targets.append(torch.cat([target[:cut], torch.full_like(image[:, 0], -100, dtype=torch.long), target[cut + 1 :]]))
        mask = pad_sequence([torch.ones_like(t, dtype=torch.bool) for t in targets], batch_first=True)
        return None, None, mask, past_key_values, pad_sequence(embeds, batch_first=True), pad_sequence(targets, True, -100)

    def forward(self, input_ids=None, attention_mask=None, labels=None, images=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            prepared = self.prepare_inputs_labels_for_multimodal(input_ids, None, attention_mask, None, labels, images)
            input_ids, _, attention_mask, _, inputs_embeds, labels = prepared
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels, **kwargs
        )  # fmt: skip
