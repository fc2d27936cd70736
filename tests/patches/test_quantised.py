"""QLoRA's loading: the versions of transformers, PEFT and bitsandbytes that the tests run with, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llava_region.decoder import layer_index
from llava_region.patches.quantised import quantised_loading
from llava_region.training.model_states import in_few_bits
from tests.helpers.training_runs import environment


@pytest.mark.parametrize(("bits", "layer"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_lora_on_a_region_of_quantised_layers(tmp_path, bits, layer):
    """transformers from 4.38 on refused what the upstreams give it; PEFT 0.10 missed a field of bitsandbytes' 8-bit layers."""
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=4, vocab_size=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    script = Path(__file__).with_name("quantised_load.py")
    done = subprocess.run([sys.executable, script, str(bits), tmp_path], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kind"] == f"bitsandbytes.nn.modules.{layer}" and found["wrapped"] == ["peft.tuners.lora.bnb"]
    model = LlamaForCausalLM(config)  # of which a dry run counts the bytes
    assert (
        found["quantised"] == sorted(name for name, p in model.named_parameters() if in_few_bits(name, p)) and len(found["quantised"]) == 29
    )
    assert len(found["trained"]) == 28 and {layer_index(name) for name in found["trained"]} == {1, 3}


def test_other_models_load_as_ever(tmp_path, monkeypatch):
    given = {}

    class Model(PreTrainedModel):
        pass

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda cls, *args, **kwargs: given.update(cls=cls, **kwargs)))
    before = vars(PreTrainedModel)["from_pretrained"]
    with quantised_loading():
        Model.from_pretrained("folder", load_in_4bit=True)
        assert given == {"cls": Model, "load_in_4bit": True}
        given.clear()
        Model.from_pretrained("folder", load_in_4bit=True, quantization_config=None)
        assert given == {"cls": Model, "load_in_4bit": True, "quantization_config": None}
        given.clear()
        asked = BitsAndBytesConfig(load_in_4bit=True)
        Model.from_pretrained("folder", load_in_4bit=True, load_in_8bit=False, quantization_config=asked)
        assert given == {"cls": Model, "quantization_config": asked}
    assert vars(PreTrainedModel)["from_pretrained"] is before
