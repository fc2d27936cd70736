"""The name of every file that a training run, a model folder or an evaluation holds."""

# -- a model
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
# In the order in which transformers looks for them.
WEIGHT_FILES = (WEIGHTS_FILE, WEIGHTS_INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_GLOBS = ("model*.safetensors", "pytorch_model*.bin")  # with the shards
MERGED_FROM_FILE = "merged_from.json"  # of a merged model: the run and base that it was made of
CARD_FILE = "README.md"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")

# -- a training run, and its `checkpoint-N`
REGION_FILE = "region.json"  # written last: its presence says that a folder is whole
RUN_FILE = "run.json"  # what decides the result of the run: its flags, data, model
COST_FILE = "cost.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILE = "non_lora_trainables.bin"  # what a LoRA run trained besides its adapter: the projector, an unfrozen tower
PROJECTOR_FILE = "mm_projector.bin"  # of a pretraining that trained the projector alone
EPOCH_RNG_FILE = "epoch_rng_state.pth"
SCHEDULER_FILE = "scheduler.pt"
OPTIMIZER_FILE = "optimizer.pt"
OPTIMIZER_FILES = (OPTIMIZER_FILE, "optimizer.bin")  # the second is that of a trainer under FSDP
TRAINER_STATE_FILE = "trainer_state.json"
# What the trainer and DeepSpeed leave that is not part of a model.
TRAINER_FILES = (TRAINER_STATE_FILE, "all_results.json", "train_results.json", "zero_to_fp32.py")
TRAINER_BIN_FILES = ("optimizer.bin", "training_args.bin", "scheduler.bin")

# -- an evaluation
SETTINGS_FILE = "settings.json"
RESULTS_FILE = "results.json"
