"""The projector."""

from torch import nn


def build_vision_projector(config):
    return nn.Sequential(nn.Linear(config.mm_hidden_size, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size))
