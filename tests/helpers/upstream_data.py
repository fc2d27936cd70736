"""The data that an upstream's own train() builds, caught where it hands it to its trainer."""

import sys
from types import ModuleType
from typing import Any

import pytest


class Caught(Exception):
    """Ends train() once its trainer was to be made."""


def what_train_builds(module: ModuleType, trainer: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run `module.train()` up to its trainer; returns what that gets: model, tokenizer, train_dataset, data_collator, args.

    Args:
        trainer: the name of the trainer class in the module.
    """
    caught = {}

    def catch(**given: Any) -> None:
        caught.update(given)
        raise Caught

    conversation = module.conversation_lib
    before = conversation.default_conversation
    with monkeypatch.context() as patch:
        patch.setattr(module, trainer, catch)
        patch.setattr(sys, "argv", ["train", *flags])
        try:
            with pytest.raises(Caught):
                module.train()
            # the dataset looks the template up when it is asked for a record
            caught["train_dataset"] = [caught["train_dataset"][i] for i in range(len(caught["train_dataset"]))]
        finally:
            conversation.default_conversation = before
    return caught
