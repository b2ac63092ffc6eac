"""The experts of one rank in a graph of static shapes, in two forms that compute the same.

`sparse` computes what was chosen. Every expert takes up to `capacity` tokens of every row, in two batched products over
all experts, and each token gathers its K results. Where more tokens of a row chose an expert, those beyond come in a
loop over overloaded experts, eight a round and the fullest first, over all tokens; no round where none is overloaded.
So it is exact for every routing. `dense` computes every expert for every token, in two products of which the second
sums over experts.

TensorRT-RTX 1.7.1 decided the form: it takes no scatter with a reduction (so each token gathers), no k of a top-k that
depends on the batch inside of an outer loop (so the capacity is that of a row), and no loop that starts from a sum of
gathered rows (so it starts at zero). Tokens of an expert are found by the choice and not by their shares, which a
per-expert scale can make zero or negative.

Shapes: B rows, S columns, T = B * S tokens, H hidden, K experts of a token, E experts of this rank, W width of an
expert on this rank, c capacity, n experts of a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F

FORMS = ("sparse", "dense")
ROOM = 3  # capacity of an expert, in tokens of a row that choose it on average
ROUND = 8  # most experts of a round

Loop = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Products(Protocol):
    """What the experts ask of the weights. Products by `quantized` ones that are `inputs` stand in loops: `_once`."""

    quantized: str | None

    def linear(self, x: Tensor, name: str, experts: Tensor | None = None) -> Tensor: ...


def capacity(columns: int, top_k: int, experts: int) -> int:
    """Tokens of a row of `columns` that each of all experts takes; 48 of 256 in the released model."""
    return (ROOM * columns * top_k + experts - 1) // experts


def takes_all(top_k: int, experts: int) -> bool:
    """Whether the capacity is a whole row or more: no expert is ever overloaded."""
    return ROOM * top_k >= experts


def experts_of_a_round(experts: int) -> int:
    """The largest divisor of the number of experts of a rank that is at most `ROUND`."""
    return next(n for n in range(min(ROUND, experts), 0, -1) if experts % n == 0)


def is_less_work(top_k: int, experts: int, local: int) -> bool:
    """Whether `sparse` with one round multiplies fewer rows than `dense`, of whose `experts` a rank has `local`."""
    return ROOM * top_k / experts + experts_of_a_round(local) / local < 1


@dataclass(frozen=True)
class Choice:
    """The experts of this rank that tokens chose: `shares` and `mask` [T, E] float32, and `chosen` [T, K].

    Shares and mask are zero where not chosen. Ids of `chosen` outside of 0 to E - 1 are experts of other ranks.
    """

    shares_TE: Tensor
    mask_TE: Tensor
    chosen_TK: Tensor

    @classmethod
    def of(cls, shares_TE: Tensor, chosen_TK: Tensor) -> Choice:
        """The choice among all experts, from what `route` gives."""
        return cls(shares_TE, torch.zeros_like(shares_TE).scatter(1, chosen_TK, 1.0), chosen_TK)

    def of_part(self, part: Tensor, parts: int) -> Choice:
        """The choice among the experts of one of `parts` equal runs of them."""
        local = self.shares_TE.shape[1] // parts
        shares, mask = (
            x.view(-1, parts, local).index_select(1, part.reshape(1)).view(-1, local)
            for x in (self.shares_TE, self.mask_TE)
        )
        return Choice(shares, mask, self.chosen_TK - part * local)

    def among(self, real_T: Tensor) -> Choice:
        """The choice of the tokens that are real; others choose nobody."""
        mask_TE = self.mask_TE * real_T[:, None].to(self.mask_TE.dtype)
        return Choice(self.shares_TE * mask_TE, mask_TE, self.chosen_TK)

    def shares_TK(self) -> tuple[Tensor, Tensor]:
        """Share of every chosen expert, zero for those of other ranks, and its id, within 0 to E - 1."""
        experts = self.shares_TE.shape[1]
        ids_TK = self.chosen_TK.clamp(0, experts - 1)
        return torch.where(self.chosen_TK == ids_TK, self.shares_TE.gather(1, ids_TK), 0.0), ids_TK


def dense(weights: Products, names: tuple[str, str], x_TH: Tensor, shares_TE: Tensor, width: int) -> Tensor:
    """Weighted sum of the chosen experts [T, H]; matrices [E * 2 * W, H] and [H, E * W]."""

    def products() -> Tensor:
        hidden = weights.linear(x_TH, names[0]).view(-1, shares_TE.shape[1], 2, width)
        hidden = F.gelu(hidden[:, :, 0], approximate="tanh") * hidden[:, :, 1] * shares_TE[..., None]
        return weights.linear(hidden.to(x_TH.dtype).flatten(1), names[1])

    return _once(products, x_TH).to(x_TH.dtype) if weights.quantized == "inputs" else products()


def sparse(weights: Products, names: tuple[str, str], x_BSH: Tensor, choice: Choice, most: int | None) -> Tensor:
    """Weighted sum of the chosen experts [T, H]; matrices [E, 2 * W, H] and [E, H, W]. None: all tokens of a row."""
    rows, columns, _ = x_BSH.shape
    mask_BSE = choice.mask_TE.view(rows, columns, -1)
    place_BSE = mask_BSE.cumsum(1) - mask_BSE  # of a token among those of its row that chose the expert
    load_BE = mask_BSE.sum(1)

    def products() -> Tensor:
        return _first(weights, names, x_BSH, choice, place_BSE, load_BE, columns if most is None else most)

    first = _once(products, x_BSH.flatten(0, 1)) if weights.quantized == "inputs" else products()
    if most is None:
        return first.to(x_BSH.dtype)
    rest_TE = torch.where(place_BSE.flatten(0, 1) >= most, choice.shares_TE, 0.0)
    rest = _rest(weights, names, x_BSH.flatten(0, 1), rest_TE, load_BE.amax(0), most)
    return (first + rest).to(x_BSH.dtype)


def _first(
    weights: Products,
    names: tuple[str, str],
    x_BSH: Tensor,
    choice: Choice,
    place_BSE: Tensor,
    load_BE: Tensor,
    most: int,
) -> Tensor:
    """Sum over the experts that have room for a token, [T, H] float32: the first `most` tokens of a row and expert."""
    rows, columns, _ = x_BSH.shape
    mask_BSE = choice.mask_TE.view_as(place_BSE)
    order_BSE = mask_BSE * (columns - torch.arange(columns)).float()[:, None]  # exact: below 2^24 columns
    tokens_BEc = order_BSE.transpose(1, 2).topk(most, -1).indices + (torch.arange(rows) * columns)[:, None, None]
    tokens_ER = tokens_BEc.transpose(0, 1).flatten(1)  # R = B * c
    taken_ER = (torch.arange(most) < load_BE.T[..., None]).flatten(1)
    hidden = _hidden(weights.linear(x_BSH.flatten(0, 1)[tokens_ER], names[0]), taken_ER)
    y_RH = weights.linear(hidden, names[1]).flatten(0, 1)
    shares_TK, ids_TK = choice.shares_TK()
    place_TK = place_BSE.flatten(0, 1).gather(1, ids_TK).long()
    row_T1 = torch.arange(rows)[:, None].expand(rows, columns).reshape(-1, 1)
    slot_TK = (ids_TK * rows + row_T1) * most + place_TK.clamp_max(most - 1)
    shares_TK = torch.where(place_TK < most, shares_TK, 0.0)
    return (y_RH[slot_TK].float() * shares_TK[..., None]).sum(1)


def _rest(
    weights: Products, names: tuple[str, str], x_TH: Tensor, rest_TE: Tensor, load_E: Tensor, most: int
) -> Tensor:
    """Sum over the overloaded experts, [T, H] float32, with `rest` [T, E], the shares of tokens beyond the capacity."""
    experts = load_E.shape[0]
    size = experts_of_a_round(experts)
    order = load_E[None].topk(experts).indices.view(-1, size)  # fullest first; top-k wants two axes
    overloaded = (load_E > most).float().sum()

    def more(done: Tensor, total: Tensor) -> Tensor:
        return done.float() * size < overloaded

    def one(done: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        chosen = order.index_select(0, done[None])[0]
        shares_nT = rest_TE.index_select(1, chosen).T
        hidden = _hidden(weights.linear(x_TH, names[0], chosen), shares_nT != 0)
        y_nTH = weights.linear(hidden, names[1], chosen)
        return done + 1, total + (y_nTH.float() * shares_nT[..., None]).sum(0)

    return _repeat(more, one, torch.zeros(x_TH.shape, dtype=torch.float32))


def _hidden(gate_up: Tensor, taken: Tensor) -> Tensor:
    """What the second product is given; zero where its result counts for nobody, so that no range is spent on it."""
    gate, up = gate_up.chunk(2, -1)
    return torch.where(taken[..., None], F.gelu(gate, approximate="tanh") * up, 0.0)


def _once(products: Callable[[], Tensor], x_TH: Tensor) -> Tensor:
    """What `products` give, [T, H] float32, computed in a loop of one turn.

    TensorRT-RTX 1.7.1 multiplies by 16-bit copies of quantised experts that are inputs. Outside of a loop it would make
    those of all layers before it begins with the first, and keep them to the end.
    """

    def more(done: Tensor, total: Tensor) -> Tensor:
        return done < 1

    def one(done: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return done + 1, total + products().float()

    return _repeat(more, one, torch.zeros(x_TH.shape, dtype=torch.float32))


def _repeat(more: Callable[[Tensor, Tensor], Tensor], one: Loop, total: Tensor) -> Tensor:
    """A loop on the device in a graph, and a plain one where the functions run: torch compiles its loop every time."""
    state = torch.zeros((), dtype=torch.int64), total
    if torch.compiler.is_exporting():
        return while_loop(more, one, state)[1]
    while more(*state):
        state = one(*state)
    return state[1]
