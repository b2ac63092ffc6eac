"""The engine: one pass after another over whatever the running requests need next.

    engine = Engine(network, EngineConfig(context_gb=4.0))
    engine.add(Request("a", prompt, max_tokens=256, canvas_length=256))
    while engine.has_work:
        for event in engine.step(): ...

A pass mixes requests that encode a piece of their prompt, denoise at different steps, and begin a canvas behind the one
that has settled, whose tokens become context in the same pass. Requests come and go between passes. What a request gets
depends on itself alone, to the bit: each row of every product, each tile of context and each canvas is computed as if
it were alone (`model.visibility.TILE`, `model.row_products`), so its tokens are those that
`DiffusionGemma.generate` gives it alone.

Every rank of a layout has an engine, is given the same calls in the same order, and so does the same.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.diffusion.progress import Lookout
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.model.visibility import TILE
from nemo_diffgemma.model.vocabulary import reused_scratch
from nemo_diffgemma.parallel.agreement import world_size
from nemo_diffgemma.parallel.groups import current_layout, device
from nemo_diffgemma.serving.constraints.sequence import CanvasConstraints, ConstrainedSequence
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.serving.context_memory import ContextMemory
from nemo_diffgemma.serving.ending import Decode, cut
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.markers import Markers
from nemo_diffgemma.serving.messages import Facts
from nemo_diffgemma.serving.prefix_keys import Key, keys_of
from nemo_diffgemma.serving.request import MOST_SCORES, Draft, Event, Finished, Reason, Request, Settled
from nemo_diffgemma.serving.scores import scores_of
from nemo_diffgemma.serving.sequence import Sequence
from nemo_diffgemma.serving.slots import Outcome, Slots
from nemo_diffgemma.transfer import HostCopy, to_device


class Work(NamedTuple):
    """What a sequence does in a pass: so many new tokens of context, and perhaps a step of its canvas behind them."""

    sequence: Sequence
    context: int
    denoises: bool


class Waiting(NamedTuple):
    """A request that has not begun."""

    arrival: int
    request: Request
    keys: list[Key]  # of the tiles of its prompt
    constraint: ConstrainedSequence | None


class _Results(NamedTuple):
    """Numbers of a pass on their way to the host: of each turn done, finite, steps and tokens.

    Drafts and scores (of one canvas [L, 1 + 2 T]) are those of the turns that want them.
    """

    turns: list[tuple[Sequence, int, int]]  # with its canvas and the steps that were enqueued of it
    numbers: HostCopy
    drafts: HostCopy | None
    scores: list[HostCopy]


class Engine:
    """Continuous batching by denoising step.

    For stop strings, `decode` makes text of the ids of an answer, and `markers` tell what is said in it from the rest.
    """

    def __init__(
        self,
        network: DiffusionGemma,
        config: EngineConfig,
        decode: Decode | None = None,
        markers: Markers | None = None,
    ) -> None:
        model = network.model_config
        self.network, self.config = network, config
        self.decode, self._markers = decode, markers or Markers()
        longest_step = max(TILE * max(1, config.tokens_per_pass // TILE), model.canvas_length)
        self.memory = ContextMemory(network, config.context_gb, config.typical_tokens, longest_step)
        self.slots = Slots(config.max_running, model.canvas_length, model.hidden_size, network.dtype, device())
        self._free_slots = list(reversed(range(config.max_running)))
        self._constraints = CanvasConstraints(device())
        self.waiting: deque[Waiting] = deque()
        self.running: list[Sequence] = []
        self.moved_out: list[Sequence] = []  # by arrival
        self._arrivals = itertools.count()
        self._pending: deque[_Results] = deque()
        self._behind = Lookout.steps_behind(device())
        self.passes = 0

    # -- requests --------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise `UserError` for a request that can never be answered here, whatever its language."""
        request.check(self.network.model_config)
        if request.adapter is not None and request.adapter not in self.network.beside:
            known = ", ".join(self.network.beside) or "none"
            raise UserError(f"this replica has no adapter {request.adapter!r}; those that it has: {known}")
        if not self.memory.fits(request.most_context):
            raise UserError(
                f"{len(request.prompt)} tokens of prompt and {request.max_tokens} of answer need more context memory "
                "than this server has; ask for less, or start it with more context_gb"
            )

    def add(self, request: Request, automaton: TokenAutomaton | None = None) -> None:
        """Queue a request; `automaton` is that of its language. Raises `UserError` for one that can never be answered.

        A `ConstraintError` is one: no text of the language fits.
        """
        self.check(request)
        constraint = None
        if request.language is not None:
            if automaton is None:
                raise UserError("the request has a language, and add() no automaton of it; compile it first")
            given = (request.canvas_length, request.max_tokens, request.sampler.eos_ids, request.locked)
            constraint = ConstrainedSequence(automaton, *given, device())
        keys = keys_of(request.prompt, TILE, salt=request.adapter or "")
        self.waiting.append(Waiting(next(self._arrivals), request, keys, constraint))

    def cancel(self, id: str) -> list[Event]:
        """End a request at once, wherever it is; unknown ones are over already."""
        for index, one in enumerate(self.waiting):
            if one.request.id == id:
                del self.waiting[index]
                return [Finished(id, Reason.CANCELLED, len(one.request.prompt), 0)]
        for sequence in [*self.running, *self.moved_out]:
            if sequence.request.id == id:
                return [self._finish(sequence, Reason.CANCELLED)]
        return []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.moved_out)

    @property
    def requests(self) -> list[Request]:
        """Those that are not answered."""
        begun = [sequence.request for sequence in [*self.running, *self.moved_out]]
        return [*begun, *(one.request for one in self.waiting)]

    @property
    def counts(self) -> tuple[int, int]:
        """How many of them run, and how many wait."""
        return len(self.running), len(self.waiting) + len(self.moved_out)

    def facts(self) -> Facts:
        """What the front end must know of the network."""
        model = self.network.model_config
        layout = ", ".join(f"{axis}={size}" for axis, size in vars(current_layout()).items() if size > 1)
        return Facts(
            vocab_size=model.vocab_size,
            canvas_length=model.canvas_length,
            context_tokens=self._most_context(),
            tile=TILE,
            cached_tiles=max(1, min(blocks.count for blocks in self.memory.blocks.values())),
            max_running=self.config.max_running,
            sampler=self.network.sampler_defaults,
            text="",
            layout=layout or "one process",
            device=torch.cuda.get_device_name() if device().type == "cuda" else "cpu",
            adapters=list(self.network.beside),
        )

    def _most_context(self) -> int:
        """The most tokens of context that one request can have: the memory's limit, or the model's, less a canvas."""
        model = self.network.model_config
        sizes = range(1, model.max_position_embeddings - model.canvas_length + 1)
        return max(1, bisect_right(sizes, False, key=lambda tokens: not self.memory.fits(tokens)))

    # -- passes ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run one pass, if there is anything to run, and report what is known by now."""
        events: list[Event] = []
        work = self._plan()
        if work:
            with reused_scratch():
                results = self._run(work)
            self._pending += [results] if results else []
            self.passes += 1
        while len(self._pending) > (self._behind if work else 0):
            events += self._take(self._pending.popleft())
        return events

    def _plan(self) -> list[Work]:
        """What each sequence does next: all that denoise, and pieces of prompts as far as the pass has room.

        The oldest prompt gets a tile at least.
        """
        self._admit()
        work = [
            Work(sequence, sequence.missing, True)
            for sequence in self.running
            if not sequence.encodes and not sequence.had_all_steps
        ]
        tokens = sum(one.context + one.sequence.request.canvas_length for one in work)
        room, first = max(TILE, self.config.tokens_per_pass - tokens), True
        for sequence in self.running:
            if sequence.encodes:
                piece = self._piece(sequence, room, first)
                if piece is None:
                    break
                work.append(piece)
                room -= piece.context + (sequence.request.canvas_length if piece.denoises else 0)
                first = False
        for sequence, context, _ in sorted(work, key=lambda one: one.sequence.arrival):
            self._reserve(sequence, context)
        return [one for one in work if one.sequence in self.running]

    def _piece(self, sequence: Sequence, room: int, first: bool) -> Work | None:
        """The rest of a prompt with the first step behind it, or whole tiles of it; None where there is no room."""
        missing = sequence.missing
        if missing + sequence.request.canvas_length <= room or (first and missing <= TILE):
            return Work(sequence, missing, True)
        tiles = min(room, missing) // TILE
        return Work(sequence, tiles * TILE, False) if tiles > 0 else None

    def _admit(self) -> None:
        """Bring back what was moved out, the oldest first, then begin what waits, while there is memory."""
        while self.moved_out:
            if not self.memory.move_in(self.moved_out[0].held):
                return
            self.running.append(self.moved_out.pop(0))
        while self.waiting and self._free_slots:
            arrival, request, keys, constraint = self.waiting[0]
            held = self.memory.open(keys)
            if not self.memory.has_room(held, len(request.prompt)):
                self.memory.close(held)
                return
            self.waiting.popleft()
            self.running.append(
                Sequence(request, held, self._free_slots.pop(), held.end, arrival, constraint=constraint)
            )

    def _reserve(self, sequence: Sequence, context: int) -> None:
        """Blocks for new context; where there are none the youngest sequence gives its own, perhaps this one."""
        while sequence in self.running and not self.memory.reserve(sequence.held, context):
            youngest = max(self.running, key=lambda other: other.arrival)
            self.memory.move_out(youngest.held)
            self.running.remove(youngest)
            self.moved_out = sorted([*self.moved_out, youngest], key=lambda other: other.arrival)

    def _run(self, work: list[Work]) -> _Results | None:
        """Enqueue a pass."""
        model = self.network.model_config
        cache = self.memory.cache([one.sequence.held for one in work], [one.context for one in work])
        denoising = [one.sequence for one in work if one.denoises]
        turns = [sequence.turn() for sequence in denoising]
        places = [
            (index, sequence.held.end + context) for index, (sequence, context, denoises) in enumerate(work) if denoises
        ]
        stream = self.network.stream(
            cache.sequences, [one.context for one in work], places, [turn.length for turn in turns]
        )
        tokens, soft = self._context_tokens(work), None
        if turns:
            cells = self.slots.cells(turns)
            canvas_N, soft = self.slots.inputs(cells, model.vocab_size)
            tokens = torch.cat([tokens, canvas_N])
        adapters = [one.sequence.request.adapter for one in work]
        result = self.network.run(tokens, stream, cache=cache, soft=soft, replicas_alike=True, adapters=adapters)
        hidden = result.canvas_hidden
        for sequence, context, denoises in work:
            self.memory.extend(sequence.held, context)
            sequence.step += denoises
        if hidden is None:
            return None
        constraint = self._constraints.of([one.constraint for one in denoising], [turn.length for turn in turns])
        found = self.network.statistics(
            hidden,
            cells.temperature_N1,
            cells.uniforms(),
            soft_embedding=True,
            constraint=constraint,
            locked_N=cells.locked_N,
        )
        allowed = None
        if constraint is not None:
            assert found.allowed_nC is not None
            allowed = constraint.allowed(found.argmax_N, found.allowed_nC)
        outcomes = self.slots.advance(cells, found, allowed, model.vocab_size)
        return self._results(denoising, outcomes, hidden)

    def _context_tokens(self, work: list[Work]) -> Tensor:
        """Ids of the new context of a pass: parts of prompts, and canvases that have settled."""
        parts: list[Tensor | list[int]] = []
        for sequence, context, _ in work:
            begin, prompt = sequence.held.end, sequence.request.prompt
            if sequence.encodes:
                parts.append(list(prompt[begin : begin + context]))
            elif context:
                parts.append(self.slots.settled(sequence.slot, context))
        given = [part for part in parts if isinstance(part, list)]
        from_host = iter(
            to_device(torch.tensor([id for part in given for id in part], dtype=torch.long), device()).split(
                [len(part) for part in given]
            )
        )
        return torch.cat(
            [next(from_host) if isinstance(part, list) else part for part in parts] or [self.slots.best[:0]]
        )

    def _results(self, sequences: list[Sequence], outcomes: list[Outcome], hidden_NH: Tensor) -> _Results:
        """Send what the host must know of a pass on its way."""
        numbers = torch.cat(
            [
                torch.cat([torch.stack([o.done, o.finite, o.live, o.accepted.sum(1)], dim=1), o.best], dim=1).flatten()
                for o in outcomes
            ]
        )
        if world_size() > 1:  # decisions must be one on all ranks, whatever the last bits
            dist.broadcast(numbers, src=0)
        drafts = None
        if any(sequence.request.drafts for sequence in sequences):
            drafts = HostCopy(torch.cat([torch.cat([o.accepted, o.entropy], dim=1).flatten() for o in outcomes]))
        order = [sequences[turn] for outcome in outcomes for turn in outcome.turns]
        turns = [(sequence, sequence.canvas, sequence.step) for sequence in order]
        return _Results(turns, HostCopy(numbers), drafts, self._scores(sequences, outcomes, hidden_NH))

    def _scores(self, sequences: list[Sequence], outcomes: list[Outcome], hidden_NH: Tensor) -> list[HostCopy]:
        """Log-probabilities of the canvases of those that ask, should this step be their last."""
        cells = hidden_NH.split([sequence.request.canvas_length for sequence in sequences])
        asked = [
            (cells[turn], outcome.best[row])
            for outcome in outcomes
            for row, turn in enumerate(outcome.turns)
            if sequences[turn].request.logprobs is not None
        ]
        if not asked:
            return []
        hidden, ids = (torch.cat(parts) for parts in zip(*asked, strict=True))
        scores = self.network.scores(hidden, ids, MOST_SCORES)
        return [HostCopy(part) for part in scores.split([len(best) for _, best in asked])]

    # -- results ---------------------------------------------------------------------------------------------------

    def _take(self, results: _Results) -> list[Event]:
        """What a pass means for its sequences. Steps that were enqueued behind the end of a canvas mean nothing."""
        events: list[Event] = []
        numbers = iter(results.numbers.numbers())
        drafts = iter(results.drafts.numbers()) if results.drafts else None
        scores = iter(results.scores)
        for sequence, canvas, step in results.turns:
            request = sequence.request
            length = request.canvas_length
            done, finite, live, accepted_now = (int(number) for number in itertools.islice(numbers, 4))
            tokens = [int(number) for number in itertools.islice(numbers, length)]
            accepted, entropy = (list(itertools.islice(drafts or (), length)) for _ in range(2))
            scored = None if request.logprobs is None else next(scores)
            if sequence not in self.running + self.moved_out or canvas != sequence.canvas:
                continue
            sequence.accepted += accepted_now
            if request.drafts:
                remaining = request.sampler.max_denoising_steps - step
                events.append(Draft(request.id, canvas, remaining, tokens, [bool(x) for x in accepted], entropy))
            if not finite:
                events.append(self._finish(sequence, Reason.ERROR, "the network gave NaN or infinity"))
            elif done or step == request.sampler.max_denoising_steps:
                events += self._settle(sequence, tokens, live, scored)
        return events

    def _settle(self, sequence: Sequence, tokens: list[int], live: int, scored: HostCopy | None) -> list[Event]:
        """The canvas of a sequence is final: it ends the answer, or becomes context of the next one."""
        request = sequence.request
        new, reason = cut(request, sequence.answer, tokens, self.decode, self._markers)
        scores = None
        if scored is not None and request.logprobs is not None:
            scores = scores_of(scored, request.logprobs, len(new), request.canvas_length)
        settled = Settled(request.id, sequence.canvas, live, new, scores, sequence.accepted)
        sequence.answer += new
        if reason is not None:
            return [settled, self._finish(sequence, reason)]
        sequence.settle(tokens)
        return [settled]

    def _finish(self, sequence: Sequence, reason: Reason, error: str | None = None) -> Finished:
        self.memory.close(sequence.held)
        self._free_slots.append(sequence.slot)
        (self.running if sequence in self.running else self.moved_out).remove(sequence)
        return Finished(sequence.request.id, reason, len(sequence.request.prompt), sequence.cached, error)
