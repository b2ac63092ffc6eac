"""Training: the NeMo model class, the Lightning strategy over Megatron, the optimizer, what happens during a run."""

import os

# Standard output is for results; NeMo reads this when it is first imported.
os.environ.setdefault("NEMO_REDIRECT_LOGS_TO_STDERR", "1")
