"""What a server counts, for Prometheus: names begin with diffgemma_."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nemo_diffgemma.serving.request import Finished, Settled

if TYPE_CHECKING:
    from nemo_diffgemma.serving.job import Job
    from nemo_diffgemma.serving.router import Router

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_STEPS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)


class Metrics:
    """One set of figures: each server has its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = lambda name, text, labels=(): Counter(f"diffgemma_{name}", text, labels, registry=self.registry)
        gauge = lambda name, text: Gauge(f"diffgemma_{name}", text, registry=self.registry)
        histogram = lambda name, text, buckets: Histogram(
            f"diffgemma_{name}", text, buckets=buckets, registry=self.registry
        )
        self.requests = counter("requests", "Requests that are over", ("outcome",))
        self.refused = counter("requests_refused", "Requests that found the queue full")
        self.violations = counter("constraint_violations", "Finished answers that their language did not have: defects")
        self.replays = counter("requests_replayed", "Requests that began again on another replica")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("prompt_tokens_cached", "Tokens of prompts that the prefix cache had")
        self.tokens = counter("generated_tokens", "Tokens of answers")
        self.steps = counter("denoising_steps", "Denoising steps of canvases that settled; tokens by steps is TPF")
        self.cells = counter("cells_denoised", "Cells of those canvases, once a step")
        self.accepted = counter("cells_accepted", "Of these, accepted ones; their share is the acceptance")
        self.canvases = counter("canvases", "Canvases that settled")
        self.steps_of_canvas = histogram("steps_per_canvas", "Denoising steps until a canvas settled", _STEPS)
        self.first_canvas = histogram("time_to_first_canvas_seconds", "From the request to its first tokens", _SECONDS)
        self.between_canvases = histogram("time_between_canvases_seconds", "From canvas to canvas", _SECONDS)
        self.duration = histogram("request_seconds", "From a request to its end", _SECONDS)
        self.replicas = gauge("replicas", "Replicas that answer")
        self.running = gauge("requests_running", "Requests that have a slot")
        self.slots = gauge("engine_slots_taken", "Requests that the engines denoise, as they last said")
        self.passes = gauge("engine_passes", "Passes of the engines that answer now")
        self.waiting = gauge("requests_waiting", "Requests that wait for a slot")

    def settled(self, job: Job, event: Settled, now: float) -> None:
        """A canvas of a request is final, and its client was told."""
        self.canvases.inc()
        self.steps.inc(event.steps)
        self.steps_of_canvas.observe(event.steps)
        self.cells.inc(event.steps * job.request.canvas_length)
        self.accepted.inc(event.accepted)
        self.tokens.inc(len(event.tokens))
        (self.between_canvases if event.canvas else self.first_canvas).observe(now - job.last_told)
        job.last_told = now

    def finished(self, job: Job, event: Finished) -> None:
        """A request is answered."""
        self.requests.labels(event.reason.value).inc()
        self.prompt_tokens.inc(event.prompt_tokens)
        self.cached_tokens.inc(event.cached_tokens)
        self.duration.observe(time.monotonic() - job.began)

    def show(self, router: Router) -> None:
        """What is now."""
        self.replicas.set(sum(not replica.is_silent for replica in router.replicas.values()))
        beats = [replica.beat for replica in router.replicas.values()]
        self.slots.set(sum(beat.running for beat in beats))
        self.passes.set(sum(beat.passes for beat in beats))
        self.waiting.set(router.waiting)
        self.running.set(len(router.jobs) - router.waiting)

    def page(self) -> bytes:
        return generate_latest(self.registry)
