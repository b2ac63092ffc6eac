"""Training: the NeMo model class, the Lightning strategy over Megatron, the optimizer, what happens during a run."""

import os
import warnings

# Standard output is for results; NeMo reads this when it is first imported.
os.environ.setdefault("NEMO_REDIRECT_LOGS_TO_STDERR", "1")
# That TransformerEngine and apex are absent, and what Megatron means to rename: said at every start, nothing to do.
for _module in (r"megatron\.", r"torch\.distributed\.checkpoint"):
    warnings.filterwarnings("ignore", category=UserWarning, module=_module)
