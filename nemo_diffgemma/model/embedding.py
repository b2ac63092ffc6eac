"""The tied token table: look-up for the stream, head for statistics, logits and loss."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.model.vocabulary import VocabularyShard
from nemo_diffgemma.parallel.sharding import declare, over_tensor


class TokenTable(VocabParallelEmbedding):
    """Megatron's vocabulary-parallel embedding, scaled by sqrt(H) rounded to the weight's dtype (53.0 in bfloat16).

    Rows beyond the vocabulary are padding: `shard` says which rows are real, and nothing multiplies the others.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(
            model.padded_vocab_size,
            model.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=groups.tp,
        )
        declare(self.weight, over_tensor(groups, axis=0))
        self.shard = VocabularyShard.of(model.vocab_size, model.padded_vocab_size, groups.tp)
        self.scale = float(torch.tensor(model.hidden_size**0.5).to(config.params_dtype))

    def look_up(self, ids_T: Tensor) -> Tensor:
        """Scaled embeddings of this rank's tokens, [T/tp, H]."""
        rows = self(ids_T[None])  # a call of the module: training waits there for weights that are gathered
        return (rows.squeeze(1) if self.reduce_scatter_embeddings else rows.squeeze(0)) * self.scale
