"""The tied token table: look-up for the stream, head for statistics, logits and loss."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding, reduce_scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.model.table_gradient import look_up
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

    def forward(self, ids_T: Tensor) -> Tensor:
        """Rows of this rank's tokens, [T/tp, H], unscaled."""
        if not self.shard.parallel:
            return look_up(ids_T, self.weight)
        rows = self.weight.shape[0]
        local_T = ids_T - self.shard.first_id
        mine_T1 = ((local_T >= 0) & (local_T < rows))[:, None]
        partial_TH = torch.where(mine_T1, look_up(local_T.clamp(0, rows - 1), self.weight), 0.0)
        return reduce_scatter_to_sequence_parallel_region(partial_TH, group=self.tp_group)

    def look_up(self, ids_T: Tensor) -> Tensor:
        """Scaled embeddings of this rank's tokens, [T/tp, H]."""
        return self(ids_T) * self.scale  # a call of the module: training waits there for weights that are gathered
