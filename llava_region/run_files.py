"""The name of every file that a training run, a model folder or an evaluation holds."""

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
REGION_FILE = "region.json"  # written last: its presence says that a folder is whole
COST_FILE = "cost.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILE = "non_lora_trainables.bin"  # what a LoRA run trained beside its adapter: the projector, an unfrozen tower
PROJECTOR_FILE = "mm_projector.bin"  # of a pretraining that trained the projector alone
EPOCH_RNG_FILE = "epoch_rng_state.pth"
SCHEDULER_FILE = "scheduler.pt"
RESULTS_FILE = "results.json"
# In the order in which transformers looks for them.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
