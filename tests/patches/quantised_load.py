"""Load a tiny Llama in 4 or 8 bits as the upstreams do, and train LoRA on one of its layers: python quantised_load.py BITS FOLDER

transformers quantises on GPUs alone, and asks torch whether there is one: while the model is loaded it is told so. From 4.40 on it refuses
layers on a CPU besides: that check is left out. The quantised layers are bitsandbytes' own, which compute on a CPU too.
"""

import contextlib
import json
import sys

import bitsandbytes  # noqa: F401  looks for a GPU itself, so before torch pretends
import torch

bits, folder = int(sys.argv[1]), sys.argv[2]
there = torch.cuda.is_available
torch.cuda.is_available = lambda: True

from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from transformers import BitsAndBytesConfig, LlamaForCausalLM  # noqa: E402

from llava_region.decoder import linear_modules  # noqa: E402
from llava_region.patches.quantised import quantised_loading  # noqa: E402

with contextlib.suppress(ImportError):  # transformers before 4.38 has no such classes
    from transformers.quantizers import quantizer_bnb_4bit, quantizer_bnb_8bit

    quantizer_bnb_4bit.Bnb4BitHfQuantizer.validate_environment = lambda *_, **__: None
    quantizer_bnb_8bit.Bnb8BitHfQuantizer.validate_environment = lambda *_, **__: None

half = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
config = BitsAndBytesConfig(
    **half, llm_int8_skip_modules=["mm_projector"], bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_type="nf4",
)  # fmt: skip
with quantised_loading():
    model = LlamaForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, torch_dtype=torch.float32, quantization_config=config, **half
    )  # fmt: skip
torch.cuda.is_available = there
kind = type(model.model.layers[1].mlp.up_proj)
quantised = sorted(name for name, p in model.named_parameters() if type(p).__name__ in ("Params4bit", "Int8Params"))
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, LoraConfig(r=4, target_modules=linear_modules(model, [1, 3]), task_type="CAUSAL_LM"))
wrapped = {type(module).__module__ for name, module in model.named_modules() if name.endswith("layers.1.mlp.up_proj")}
ids = torch.randint(0, 64, (2, 8))
model(input_ids=ids, labels=ids).loss.backward()
trained = sorted(name for name, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all())
print(json.dumps({"kind": f"{kind.__module__}.{kind.__name__}", "wrapped": sorted(wrapped), "trained": trained, "quantised": quantised}))
