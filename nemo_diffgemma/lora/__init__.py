"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) and freezing: what is trained of a network, and its files.

config.py       keys of a run: model.lora and model.freeze
targets.py      names of modules and of tensors, patterns over them
attach.py       adapters into a network, frozen weights, merging in memory
peft_files.py   adapter_config.json and adapter_model.safetensors, as PEFT writes and reads them
base.py         the checkpoint that an adapter belongs to
merging.py      base and adapter as one checkpoint, block by block
"""
