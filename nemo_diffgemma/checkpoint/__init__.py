"""Checkpoints: the released Hugging Face layout, sharded, and `.nemo`."""
