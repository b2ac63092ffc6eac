"""Self-conditioning: what the last denoising step believed, mixed into the canvas embeddings.

`soft` is the expected table row under the last step's tempered distribution, times the embedding scale; zero where
there is no signal. The result is normed without weight in every case: without a signal the canvas embeddings still
get unit RMS, which the encoder's embeddings do not (transformers' modeling_diffusion_gemma).
"""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.model.adapter_pass import AdapterPass
from nemo_diffgemma.model.layer import GatedMLP
from nemo_diffgemma.model.norm import RMSNorm, rms_norm
from nemo_diffgemma.parallel.groups import device


class SelfConditioning(GatedMLP):
    """`rms(embeddings + mlp(rms_w(soft)))`."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(model.intermediate_size, config, groups)
        self.eps = model.rms_norm_eps
        self.pre_norm = RMSNorm(model.hidden_size, self.eps, config.params_dtype, device())

    def forward(  # type: ignore[override]
        self, embeddings_TH: Tensor, soft_TH: Tensor | None = None, adapters: AdapterPass | None = None
    ) -> Tensor:
        """This rank's canvas embeddings and signal, [T/tp, H] -> the decoder's input."""
        if soft_TH is not None:  # a zero signal adds exactly nothing, so none and zero are the same
            embeddings_TH = embeddings_TH + super().forward(self.pre_norm(soft_TH), adapters)
        return rms_norm(embeddings_TH, None, self.eps)
