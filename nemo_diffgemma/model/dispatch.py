"""From tokens to the rows of this rank's experts and back, by sorts on the device.

A row is a token at one of its chosen experts. Rows are sorted by expert, as grouped matrix products want them; the way
back sums the rows of each token in order, so nothing depends on chance. Where the number of rows is known to the host
(all experts are here, or it was counted) there are rows of this rank's experts alone. Where it is not, there is a row
for every choice, those of other ranks' experts behind the last: grouped products leave them undefined, nothing reads
them, and the host waits for nothing.

Shapes: T tokens, K choices of each, L experts of this rank, R rows, H hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from nemo_diffgemma.transfer import HostCopy


class Rows(NamedTuple):
    """Rows sorted by expert, and where to find them from either side."""

    tokens_R: Tensor  # the token of each row
    choices_R: Tensor  # its place among all T*K choices
    ends_L: Tensor  # int32: where the rows of each expert end
    by_token: Tensor  # rows in the order of tokens ...
    starts_T: Tensor  # ... and where those of each token start
    absent: int | None  # what stands in `by_token` for a choice that has no row here

    @property
    def is_undefined(self) -> Tensor:
        """Which rows are no expert's of this rank, [R] bool."""
        return torch.arange(self.tokens_R.shape[0], device=self.tokens_R.device) >= self.ends_L[-1]


class Counting:
    """Numbers 0, step, 2 * step, ... of a pass, made once for all its layers.

    Not kept for longer: a recorded pass reads them where they lay when it was recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._made = device, dict[tuple[int, int], Tensor]()

    def up_to(self, end: int, step: int = 1) -> Tensor:
        """Those below `end`."""
        if (end, step) not in self._made:
            self._made[end, step] = torch.arange(0, end, step, device=self._device)
        return self._made[end, step]

    def ones(self, count: int) -> Tensor:
        """So many ones."""
        if (count, 0) not in self._made:
            self._made[count, 0] = torch.ones(count, dtype=torch.long, device=self._device)
        return self._made[count, 0]


class SortedChoices:
    """Choices in the order of the experts; those of this rank, numbers below L, come first."""

    def __init__(self, experts_TK: Tensor, local_experts: int, counting: Counting) -> None:
        self.experts_TK, self.local_experts, self._counting = experts_TK, local_experts, counting
        self._ranked, self._order = experts_TK.flatten().sort()
        self._top_k = experts_TK.shape[1]
        self._starts_T = counting.up_to(experts_TK.numel(), self._top_k)

    @property
    def count(self) -> Tensor:
        """How many are of this rank's experts, [] on the device."""
        return self._ends()[-1]

    def all(self) -> Rows:
        """Rows of all choices: every expert is on this rank."""
        return self._rows(self._order, self._ends(), self._inverse(), self._starts_T)

    def counted(self, rows: int) -> Rows:
        """The first `rows`, which is how many there are.

        Should recomputation choose other experts than the pass that counted, some rows go to a wrong expert or none;
        none of them is undefined, or beyond memory.
        """
        choices_R, by_token_R = self._order[:rows].sort()
        ends_L = self._ends().clamp_max(rows)
        ends_L[-1:] = rows
        return self._rows(self._order[:rows], ends_L, by_token_R, torch.searchsorted(choices_R, self._starts_T))

    def uncounted(self) -> Rows:
        """A row for every choice, and one more that stands for those of other ranks' experts."""
        absent = self._order.shape[0]
        by_token = self._inverse().masked_fill_(self.experts_TK.flatten() >= self.local_experts, absent)
        return self._rows(F.pad(self._order, (0, 1)), self._ends(), by_token, self._starts_T, absent)

    def _rows(
        self, order_R: Tensor, ends_L: Tensor, by_token: Tensor, starts_T: Tensor, absent: int | None = None
    ) -> Rows:
        return Rows(order_R // self._top_k, order_R, ends_L, by_token, starts_T, absent)

    def _ends(self) -> Tensor:
        return torch.searchsorted(self._ranked, self._counting.up_to(self.local_experts), right=True, out_int32=True)

    def _inverse(self) -> Tensor:
        """The row of each choice."""
        places = self._counting.up_to(self._order.shape[0])
        return torch.empty_like(self._order).scatter_(0, self._order, places)


def take_rows(x_TH: Tensor, rows: Rows) -> Tensor:
    """[T, H] -> [R, H]: the token of each row."""
    return _TakeRows.apply(x_TH, rows.tokens_R, rows.by_token, rows.starts_T, rows.absent)


def sum_rows(y_RH: Tensor, rows: Rows) -> Tensor:
    """[R, H] -> [T, H]: the sum of each token's rows."""
    return _SumRows.apply(y_RH, rows.tokens_R, rows.by_token, rows.starts_T, rows.absent)


def _summed(y_RH: Tensor, by_token: Tensor, starts_T: Tensor, absent: int | None) -> Tensor:
    if y_RH.shape[0] == 0:
        return y_RH.new_zeros(starts_T.shape[0], y_RH.shape[1])
    return F.embedding_bag(by_token, y_RH, starts_T, mode="sum", padding_idx=absent)


class _TakeRows(torch.autograd.Function):
    """torch's own backward of a selection adds in an order of chance on CUDA."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, tokens_R: Tensor, by_token: Tensor, starts_T: Tensor, absent: int | None
    ) -> Tensor:
        ctx.save_for_backward(by_token, starts_T)
        ctx.absent = absent
        return x_TH.index_select(0, tokens_R)

    @staticmethod
    def backward(ctx: Any, gradient_RH: Tensor) -> tuple[Tensor | None, ...]:
        by_token, starts_T = ctx.saved_tensors
        return _summed(gradient_RH, by_token, starts_T, ctx.absent), None, None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_RH: Tensor, tokens_R: Tensor, by_token: Tensor, starts_T: Tensor, absent: int | None
    ) -> Tensor:
        ctx.save_for_backward(tokens_R)
        return _summed(y_RH, by_token, starts_T, absent)

    @staticmethod
    def backward(ctx: Any, gradient_TH: Tensor) -> tuple[Tensor | None, ...]:
        (tokens_R,) = ctx.saved_tensors
        return gradient_TH.index_select(0, tokens_R), None, None, None, None


def most_of_all(number: int, group: Any, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    largest = torch.full((), number, dtype=torch.long, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(HostCopy(largest).numbers()[0])
