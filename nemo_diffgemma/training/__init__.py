"""Training: the NeMo model class, the Lightning strategy over Megatron, the optimizer, what happens during a run."""

import os
import warnings

# Standard output is for results; NeMo reads this when it is first imported.
os.environ.setdefault("NEMO_REDIRECT_LOGS_TO_STDERR", "1")
# TransformerEngine and apex are absent, and Megatron means to rename things: said at every start, nothing to do.
for _module in (r"megatron\.", r"torch\.distributed\.checkpoint"):
    warnings.filterwarnings("ignore", category=UserWarning, module=_module)
# A run goes on in its directory, and a run on a login node is no job: both were asked for.
for _message in ("Checkpoint directory .* exists and is not empty", "The `srun` command is available on your system"):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning, module=r"lightning\.")
