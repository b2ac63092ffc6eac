"""A replica of several ranks: each hears the same, in the same order, before each pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from nemo_diffgemma.serving.request import Request
from tests.serving import cases, served

ENGINE = dict(context_gb=0.02, typical_tokens=700, max_running=3, tokens_per_pass=600)


def test_a_replica_of_four_ranks_serves_cancels_and_drains(pool, single, tmp_path):
    """Tokens are those of its own layout; here the first canvas's, which do not hang on the last bits of a product."""
    network = cases.network()
    checkpoint = served.write_checkpoint(tmp_path / "model")
    split = served.Split(checkpoint, 0, ENGINE)
    given = dict(layout=dict(tensor=2, expert=2), checkpoint=str(checkpoint), address=split.address, engine=ENGINE)
    with ThreadPoolExecutor(4) as threads:
        try:
            ranks = threads.submit(pool(4).run, "tests.serving.served:serve_in_layout", **given)
            server = split.ready(1)
            (replica,) = server.http.get("/health").json()["replicas"]
            assert replica["layout"] == "tensor=2, expert=2"
            client = server.openai()
            ask = lambda prompt, **more: client.completions.create(model="tiny", prompt=prompt, seed=3, **more)
            quick = {"diffusion": {"max_denoising_steps": 1}}
            answers = [threads.submit(ask, [4, 5, index], max_tokens=8, extra_body=quick) for index in range(3)]
            sampler = network.sampler_defaults.with_overrides({"max_denoising_steps": 1})
            for index, answer in enumerate(answers):
                request = Request("", (4, 5, index), 8, cases.CANVAS, sampler, 3)
                found = answer.result().choices[0].diffusion["token_ids"]
                assert found == cases.alone(network, request)[0]
            stream = ask([4, 5], max_tokens=2000, stream=True)
            next(stream)
            server.until("engine_slots_taken", lambda slots: slots == 1)
            stream.close()
            server.until("engine_slots_taken", lambda slots: slots == 0)
            assert server.stop() == 0
            assert ranks.result() == [0] * 4
        finally:
            split.close()
