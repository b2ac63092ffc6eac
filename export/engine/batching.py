"""Many requests at a time with the graphs of a bundle: continuous batching by denoising step.

    engine = BundleEngine(open_bundle("BUNDLE"), EngineConfig(max_running=8))
    engine.add(Request("a", prompt, max_tokens=256, canvas_length=256))
    while engine.has_work:
        for event in engine.step(): ...

A pass is up to three kinds of calls: `encode` for pieces of prompts, `encode` for each canvas that has settled, and one
`step` for all rows that denoise. A row has a context, a step, a temperature and noise of its own; it comes when it is
asked for and leaves with the end of its answer. Its context is encoded alone, in the pieces in which `Engine.generate`
encodes it. Its steps share a call with other rows: the noise and the rules are its own, but how a product of so many
rows is rounded, and a softmax over so many columns, is the engine's: tokens are those of `Engine.generate` as far as
such rounding does not change one.

A context lies twice in memory: its own buffers, and those of the batch that it is part of.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import NamedTuple

import torch

from export.engine.engine import Context, Engine, EngineError
from export.engine.rows import Row, Rows
from nemo_diffgemma.config import SLIDING
from nemo_diffgemma.diffusion.generate import StepInputs
from nemo_diffgemma.diffusion.progress import Lookout
from nemo_diffgemma.model.visibility import TILE
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.serving.ending import Decode, cut
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.markers import Markers
from nemo_diffgemma.serving.messages import Facts
from nemo_diffgemma.serving.request import Draft, Event, Finished, Reason, Request, Settled
from nemo_diffgemma.transfer import HostCopy, to_device

# what a request may ask for and gets here; all else is refused by name
_DONE = {"id", "prompt", "max_tokens", "canvas_length", "sampler", "seed", "stop", "drafts", "chat"}


class _Results(NamedTuple):
    """Numbers of a step on their way to the host: of each row done, finite, live and tokens; drafts where wanted."""

    rows: list[tuple[Row, int, int]]  # with its canvas and the steps that were enqueued of it
    numbers: HostCopy
    drafts: HostCopy | None


class BundleEngine:
    """`serving.backend.Backend` with the engines of a bundle. `decode` and `markers` are for stop strings.

    Of `config`, `context_gb` limits the contexts of one rank, `max_running` the rows of a step, as the bundle does;
    `tokens_per_pass` the tokens of a pass above which prompts wait, and `typical_tokens` nothing.
    """

    def __init__(
        self, engine: Engine, config: EngineConfig, decode: Decode | None = None, markers: Markers | None = None
    ) -> None:
        self.engine, self.config = engine, config
        self.decode, self._markers = decode, markers or Markers()
        self.max_running = min(config.max_running, engine.limits.batch)
        self.canvas_length = engine.model_config.canvas_length
        self._memory = int(config.context_gb * 1e9)
        if not self._fits([1]):
            raise EngineError(
                f"context_gb={config.context_gb} has no room for one token of context, twice "
                f"{self._bytes(1)} bytes; give more"
            )
        self.waiting: deque[Request] = deque()
        self.running: list[Row] = []
        self._pending: deque[_Results] = deque()
        self._behind = Lookout.steps_behind(engine.device)
        self._joined: tuple[list[Context], Context] | None = None
        self.passes = 0

    # -- requests --------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise `UserError` for a request that can never be answered here, or asks for what is not done here."""
        request.check(self.engine.model_config)
        plain = Request("", (), 0, 0)
        for name in request.__struct_fields__:
            if name not in _DONE and getattr(request, name) != getattr(plain, name):
                raise EngineError(
                    f"{name}: the engines of a bundle cannot do this; ask a server of the checkpoint, "
                    "launch/serve.py checkpoint=..."
                )
        if request.canvas_length != self.canvas_length:
            raise EngineError(
                f"canvas_length={request.canvas_length}: the engines of this bundle have canvases of "
                f"{self.canvas_length} tokens, and no others"
            )
        if request.most_context > self._most_context():
            raise EngineError(
                f"{len(request.prompt)} tokens of prompt and {request.max_tokens} of answer need a context of "
                f"{request.most_context} tokens, and this bundle has {self._most_context()} for a request; ask for "
                f"less, build it with max_context={request.most_context}, or serve it with more engine.context_gb"
            )

    def add(self, request: Request, automaton: TokenAutomaton | None = None) -> None:
        """Queue a request; what has an `automaton` is refused, as `check` does it."""
        self.check(request)
        self.waiting.append(request)

    def cancel(self, id: str) -> list[Event]:
        """End a request at once, wherever it is; unknown ones are over already."""
        for request in self.waiting:
            if request.id == id:
                self.waiting.remove(request)
                return [Finished(id, Reason.CANCELLED, len(request.prompt), 0)]
        return [self._finish(row, Reason.CANCELLED) for row in self.running if row.request.id == id]

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def requests(self) -> list[Request]:
        """Those that are not answered."""
        return [*(row.request for row in self.running), *self.waiting]

    @property
    def counts(self) -> tuple[int, int]:
        """How many of them run, and how many wait."""
        return len(self.running), len(self.waiting)

    def facts(self) -> Facts:
        """What the front end must know of the bundle. No prefix is remembered."""
        engine = self.engine
        layout = ", ".join(f"{axis}={size}" for axis, size in vars(engine.layout).items() if size > 1)
        gpu = engine.device.type == "cuda"
        return Facts(
            vocab_size=engine.model_config.vocab_size,
            canvas_length=self.canvas_length,
            context_tokens=self._most_context(),
            tile=TILE,
            cached_tiles=0,
            max_running=self.max_running,
            sampler=engine.sampler_defaults,
            text="",
            layout=f"bundle, {layout or 'one rank'}",
            device=torch.cuda.get_device_name(engine.device) if gpu else "cpu",
        )

    # -- memory ----------------------------------------------------------------------------------------------------

    def _bytes(self, context: int) -> int:
        """Of the buffers of a row with so many tokens of context, on one rank."""
        engine, config = self.engine, self.engine.model_config
        columns = min(engine.columns_for(max(1, context)), engine.limits.context)
        numbers = 0
        for layer in range(config.num_hidden_layers):
            width, heads = config.heads_of_rank(layer, engine.layout.tensor)
            seen = max(1, config.sliding_window - 1) if config.layer_kind(layer) == SLIDING else columns
            numbers += 2 * width * heads * min(columns, seen)
        return numbers * engine.dtype.itemsize

    def _fits(self, contexts: list[int]) -> bool:
        """Whether rows with so many tokens of context have room: buffers of each, and those of the batch."""
        return sum(map(self._bytes, contexts)) + len(contexts) * self._bytes(max(contexts)) <= self._memory

    def _most_context(self) -> int:
        """The most tokens of context that one request can have."""
        sizes = range(1, self.engine.limits.context + 1)
        return max(1, bisect_right(sizes, False, key=lambda tokens: not self._fits([tokens])))

    # -- passes ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Run one pass, if there is anything to run, and report what is known by now."""
        events: list[Event] = []
        self._admit()
        encoded = self._encode(len(self._denoising()) * self.canvas_length)
        rows = self._denoising()
        if rows:
            self._pending.append(self._denoise(rows))
        self.passes += bool(rows or encoded)
        while len(self._pending) > (self._behind if rows else 0):
            events += self._take(self._pending.popleft())
        return events

    def _denoising(self) -> list[Row]:
        return [row for row in self.running if not row.reads_prompt and not row.had_all_steps]

    def _admit(self) -> None:
        """Begin what waits, the oldest first, while there are rows and memory for whole answers."""
        while self.waiting and len(self.running) < self.max_running:
            contexts = [row.request.most_context for row in self.running] + [self.waiting[0].most_context]
            if not self._fits(contexts):
                return
            self.running.append(Row(self.waiting.popleft(), self.engine.start([0])))

    def _encode(self, tokens: int) -> bool:
        """Pieces of prompts, as long as the pass has room beside `tokens`, and one at least."""
        encoded, chunk = False, self.engine.limits.chunk
        for row in self.running:
            while row.reads_prompt and (tokens < self.config.tokens_per_pass or not encoded):
                begin = row.context.length
                piece = torch.tensor([row.request.prompt[begin : begin + chunk]])
                row.context = self.engine.encode(to_device(piece, self.engine.device), row.context)
                tokens, encoded = tokens + piece.shape[1], True
        return encoded

    def _denoise(self, rows: list[Row]) -> _Results:
        """Enqueue a step of each row."""
        for row in rows:
            if row.misses_canvas:
                row.context = self.engine.encode(row.state.best[None], row.context)
        batch = Rows(rows, self.engine)
        inputs = StepInputs(
            canvas=batch.canvas_BC,
            uniforms=batch.uniforms(),
            replacements=batch.replacements(),
            temperature=batch.temperature_B,
            entropy_bound=batch.bound_B,
            soft=batch.soft_BCH,
        )
        found = self.engine.sampling_step(inputs, self._context([row.context for row in rows]))
        numbers = batch.advance(found)
        drafts = None
        if any(row.request.drafts for row in rows):
            drafts = HostCopy(torch.cat([found.accepted, found.entropy], dim=1))
        for row in rows:
            row.step += 1
        return _Results([(row, row.canvas, row.step) for row in rows], HostCopy(numbers), drafts)

    def _context(self, contexts: list[Context]) -> Context:
        """The contexts of a batch in common buffers, as long as it is the same batch in the same ones."""
        kept = self._joined[0] if self._joined else []
        if len(kept) != len(contexts) or any(a is not b for a, b in zip(kept, contexts, strict=True)):
            self._joined = None  # its memory first
            self._joined = (contexts, Context.of(contexts))
        assert self._joined is not None
        return self._joined[1]

    # -- results ---------------------------------------------------------------------------------------------------

    def _take(self, results: _Results) -> list[Event]:
        """What a step means for its rows. Steps that were enqueued behind the end of a canvas mean nothing."""
        events: list[Event] = []
        length = self.canvas_length
        numbers = results.numbers.numbers()
        drafts = results.drafts.numbers() if results.drafts else []
        for index, (row, canvas, step) in enumerate(results.rows):
            if row not in self.running or canvas != row.canvas:
                continue
            request = row.request
            done, finite, live, new, *tokens = map(int, numbers[index * (4 + length) : (index + 1) * (4 + length)])
            row.accepted += new
            if request.drafts:
                accepted, entropy = (drafts[(2 * index + part) * length :][:length] for part in (0, 1))
                remaining = request.sampler.max_denoising_steps - step
                events.append(Draft(request.id, canvas, remaining, tokens, [bool(x) for x in accepted], entropy))
            if not finite:
                events.append(self._finish(row, Reason.ERROR, "the engines gave NaN or infinity"))
            elif done or step == request.sampler.max_denoising_steps:
                events += self._settle(row, tokens, live)
        return events

    def _settle(self, row: Row, tokens: list[int], live: int) -> list[Event]:
        """The canvas of a row is final: it ends the answer, or becomes context of the next one."""
        new, reason = cut(row.request, row.answer, tokens, self.decode, self._markers)
        settled = Settled(row.request.id, row.canvas, live, new, accepted=row.accepted)
        row.answer += new
        if reason is not None:
            return [settled, self._finish(row, reason)]
        row.canvas, row.step, row.accepted = row.canvas + 1, 0, 0
        return [settled]

    def _finish(self, row: Row, reason: Reason, error: str | None = None) -> Finished:
        self.running.remove(row)
        return Finished(row.request.id, reason, len(row.request.prompt), 0, error)
