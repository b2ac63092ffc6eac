"""Supervised canvas tokens a second of one training step, against NeMo AutoModel 0.7's own recipe and model.

    python -m pip install --no-deps --target /tmp/automodel nemo-automodel==0.7.0 torchao torchdata
    python benchmarks/automodel.py /tmp/automodel equal      # both compute the same loss and gradient of one canvas
    python benchmarks/automodel.py /tmp/automodel canvases   # a prompt of 256 and 1 to 16 canvases of 64, all scored
    python benchmarks/automodel.py /tmp/automodel chat       # conversations of chitchat-dataset, packed and padded

AutoModel is imported from that folder alone; torch and transformers are those of this environment. Both sides have the
same sizes and weights, float32, torch's kernels, and run forward and backward of the whole loss: canvases, encoder, and
the gradient-free pass of self-conditioning. What AutoModel runs is its recipe's own code from the batch of its collator
on: windows and masks, forward, losses, backward. It denoises every canvas of a response and scores one of them, chosen
at random; ours scores all. Its router is frozen, as its recipe has it; ours learns.

A pair is one step of each in turn, in one process; figures are medians over pairs of processor seconds (with one thread
what an idle machine takes), so others may use the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from objective import CANVAS, network

from nemo_diffgemma import DiffusionGemma, ParallelLayout
from nemo_diffgemma.data.example import Example, collate
from nemo_diffgemma.data.packing import Size, pack
from nemo_diffgemma.diffusion import objective as method
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.model.segments import stream_of
from nemo_diffgemma.parallel import initialize

FILL, PAD = 1, 0
PROMPT = 256
BUDGET = 4096  # tokens of a packed pass, scored canvases included
MAX_LENGTH = 2048  # tokens of a conversation; the few longer ones are left out
CONVERSATIONS = 16  # of a pair


Step = Callable[[], int]  # forward and backward; gives how many canvas tokens had a loss


# -- ours --------------------------------------------------------------------------------------------------------------


def our_step(model: DiffusionGemma, rows: Rows) -> Step:
    """All canvases of the rows, as training runs them."""
    config = method.ObjectiveConfig(canvases_per_example=0)

    def run() -> int:
        stream_of.cache_clear()  # no step of a run has the lengths of another
        model.zero_grad(set_to_none=True)
        canvases = method.choose_canvases(rows, CANVAS, 0, seed=0)
        corrupted = method.corrupt(rows, canvases, CANVAS, model.model_config.vocab_size, seed=0)
        backward(model, rows, canvases, corrupted, config)
        return CANVAS * len(canvases)

    return run


def backward(
    model: DiffusionGemma,
    rows: Rows,
    canvases: Sequence[method.Canvas],
    corrupted: method.Corrupted,
    config: method.ObjectiveConfig,
) -> method.Loss:
    totals = method.count(rows, canvases, CANVAS)
    scored = method.Scored(model, rows, canvases, corrupted, config, 0, totals)
    scored.backward_canvases()
    scored.backward_context()
    return scored.loss


# -- AutoModel ---------------------------------------------------------------------------------------------------------


class Peer:
    """AutoModel's model with our weights, and as much of its recipe as a step needs."""

    def __init__(self, ours: DiffusionGemma, experts: str) -> None:
        from nemo_automodel.components.loss.dllm_loss import BlockDiffusionCrossEntropyLoss
        from nemo_automodel.recipes.dllm.strategy import BlockDiffusionStrategy
        from nemo_automodel.recipes.dllm.train_ft import DiffusionGemmaSFTRecipe

        self.model = peer_model(ours, experts).train()
        recipe = DiffusionGemmaSFTRecipe.__new__(DiffusionGemmaSFTRecipe)
        recipe.__dict__.update(
            model_parts=[self.model],
            canvas_length=CANVAS,
            dllm_block_size=CANVAS,
            dllm_eps=1e-3,
            dllm_half_life_ratio=None,
            mask_token_id=0,
            block_diffusion_sliding_window=ours.model_config.sliding_window,
            self_conditioning_p=0.5,
            dllm_strategy=BlockDiffusionStrategy(),
            dllm_loss_fn=BlockDiffusionCrossEntropyLoss(),
            distributed_config=SimpleNamespace(autocast_dtype=None),
            dist_env=SimpleNamespace(device=torch.device("cpu")),
            step_scheduler=SimpleNamespace(step=0, grad_acc_steps=1),
            device_mesh=None,
            te_fp8=None,
            _self_cond_base_seed=42,
            _encoder_loss_weight=1.0,
            _pad_token_id=PAD,
            _dllm_loss_buffer=[],
        )
        recipe._dp_allreduce = lambda tensor, **_: tensor  # one process
        recipe._get_dp_group_size = lambda **_: 1
        recipe.dllm_strategy._vocab_size = ours.model_config.vocab_size
        self.recipe = recipe

    def batch(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Padded rows; of each the last answer is supervised (`mask_history`, all that its collator accepts)."""
        from nemo_automodel.components.datasets.dllm.collate import DLLMCollator

        samples = []
        for example in examples:
            begin, end = example.answers[-1]
            mask = [int(begin <= place) for place in range(end)]
            samples.append({"input_ids": list(example.tokens[:end]), "loss_mask": mask, "attention_mask": [1] * end})
        return DLLMCollator(PAD, FILL, block_size=CANVAS, response_window=True)(samples)

    def step(self, examples: Sequence[Example]) -> Step:
        def run() -> int:
            self.model.zero_grad(set_to_none=True)
            _, window = self.losses(self.corrupted(examples))
            return int(window["loss_mask"].sum())

        return run

    def corrupted(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch = self.batch(examples)
        noisy, noise, p = self.recipe._apply_corruption(batch["input_ids"], batch["loss_mask"])
        return batch | {
            "_clean_input_ids": batch["input_ids"],
            "_noisy_input_ids": noisy,
            "_noise_mask": noise,
            "_p_mask": p,
        }

    def losses(self, batch: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """Total loss after backward, and the window that was scored."""
        diffusion, autoregressive = self.recipe._compute_loss_denominators([batch], 0, 0)
        window, losses = batch["_window"], []
        self.recipe._forward_backward_step(
            0,
            dict(batch),
            loss_buffer=losses,
            num_diffusion_tokens=diffusion,
            num_ar_tokens=autoregressive,
            num_batches=1,
        )
        return float(losses[0]), window


def peer_model(ours: DiffusionGemma, experts: str) -> Any:
    """AutoModel's model with the weights of ours, by its own adapter of Hugging Face's files."""
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.diffusion_gemma.model import DiffusionGemmaForBlockDiffusion
    from safetensors.torch import load_file
    from transformers import AutoConfig

    backend = BackendConfig(
        attn="sdpa", linear="torch", rms_norm="torch", experts=experts, dispatcher="torch", rope_fusion=False
    )
    with tempfile.TemporaryDirectory() as directory:
        ours.save_huggingface(Path(directory) / "model")
        config = AutoConfig.from_pretrained(Path(directory) / "model")
        config.text_config.torch_dtype = torch.float32
        weights: dict[str, torch.Tensor] = {}
        for file in (Path(directory) / "model").glob("*.safetensors"):
            weights |= load_file(file)
    model = DiffusionGemmaForBlockDiffusion(config, backend=backend).float()
    missing, unexpected = model.load_state_dict(model.state_dict_adapter.from_hf(weights), strict=False)
    missing = [name for name in missing if "root_size" not in name and "inv_freq" not in name]
    assert not missing and not unexpected, (missing, unexpected)
    return model


# -- what is compared --------------------------------------------------------------------------------------------------


def equal(model: DiffusionGemma, peer: Peer) -> None:
    """Loss and gradients of one canvas of a response of 16: noise and coin of AutoModel, with and without signal."""
    example = synthetic(model, 16)
    rows = collate([example], CANVAS, FILL, fills_rows=True)
    print("| self-conditioned | canvas | loss, ours | AutoModel's | largest difference of a gradient, of its largest |")
    print("|---|---|---|---|---|")
    for shown in (False, True):
        peer.recipe.self_conditioning_p = float(shown)
        peer.model.zero_grad(set_to_none=True)
        loss, window = peer.losses(peer.corrupted([example]))
        place = int(window["loss_mask"][0].nonzero()[0])
        canvas = next(c for c in method.choose_canvases(rows, CANVAS, 0, 0) if c.start == PROMPT + place)
        noised = window["canvas_ids"][:, place : place + CANVAS]
        corrupted = method.Corrupted(noised, rows.tokens_T[canvas.start : canvas.start + CANVAS][None], torch.ones(1))
        config = method.ObjectiveConfig(self_conditioning_probability=1.0 if shown else 1e-9)
        model.zero_grad(set_to_none=True)
        mine = backward(model, rows, [canvas], corrupted, config)
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in gradients(model, peer.model))
        total = float(mine.total)
        print(f"| {'yes' if shown else 'no'} | {place // CANVAS} | {total:.6f} | {loss:.6f} | {difference:.1e} |")
    peer.recipe.self_conditioning_p = 0.5


def calm(model: DiffusionGemma) -> DiffusionGemma:
    """Random weights of small branches and soft attention: rounding, doubled by each layer of others, moves no token to
    another expert, so that equal things come out equal.
    """
    for name, weight in model.named_parameters():
        if "norm" in name and ("post_" in name or name.endswith(("q_norm.weight", "k_norm.weight"))):
            weight.data.mul_(0.3)
    return model


def gradients(model: DiffusionGemma, peer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of the token table, and of queries, dense MLP and experts of every layer: ours, AutoModel's."""
    yield model.embed_tokens.weight.grad, peer.model.embed_tokens.weight.grad
    for ours, theirs in zip(model.layers, peer.model.layers.values(), strict=True):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            yield ours.get_submodule(part).weight.grad, theirs.get_submodule(part).weight.grad
        experts = ours.moe.experts
        yield experts.gate_up_proj.grad.flatten(1, 2).transpose(1, 2), theirs.moe.experts.gate_and_up_projs.grad
        yield experts.down_proj.grad.transpose(1, 2), theirs.moe.experts.down_projs.grad


def canvases(model: DiffusionGemma, peer: Peer, pairs: int) -> None:
    """A prompt and a response of 1 to 16 canvases, one row."""
    print("| canvases | ours, supervised tokens/s | AutoModel, supervised tokens/s | ratio (median of pairs) |")
    print("|---|---|---|---|")
    for count in (1, 2, 4, 8, 16):
        example = synthetic(model, count)
        ours = our_step(model, collate([example], CANVAS, FILL, fills_rows=True))
        mine, theirs = rates([[[ours], [peer.step([example])]]] * pairs)
        print(f"| {count} | {columns(mine, theirs)} |", flush=True)


def chat(model: DiffusionGemma, peer: Peer, pairs: int) -> None:
    """Conversations: ours packed, AutoModel's in padded batches as they come, of like length, and one by one."""
    lengths, plans = conversations(), {"8 as they come": (8, False), "8 of like length": (8, True), "1": (1, False)}
    runs = []
    for pair in range(pairs):
        chosen = examples(model, random.Random(pair).sample(lengths, CONVERSATIONS))
        runs.append([packed(model, chosen), *(padded(peer, chosen, *plan) for plan in plans.values())])
    mine, *others = rates(runs)
    print(
        "| AutoModel's batches | ours, supervised tokens/s | AutoModel, supervised tokens/s | ratio (median of pairs) |"
    )
    print("|---|---|---|---|")
    for name, theirs in zip(plans, others, strict=True):
        print(f"| {name} | {columns(mine, theirs)} |")


def packed(model: DiffusionGemma, conversations: Sequence[Example]) -> list[Step]:
    sizes = [
        Size(len(example.tokens), CANVAS * sum(-(-(end - start) // CANVAS) for start, end in example.answers))
        for example in conversations
    ]
    (passes,) = pack(sizes, 1, BUDGET)
    return [our_step(model, collate([conversations[place] for place in places], CANVAS, FILL)) for places in passes]


def padded(peer: Peer, conversations: Sequence[Example], size: int, by_length: bool) -> list[Step]:
    ordered = sorted(conversations, key=lambda example: len(example.tokens)) if by_length else conversations
    return [peer.step(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def rates(runs: Sequence[Sequence[Sequence[Step]]]) -> list[list[float]]:
    """Supervised tokens a second by side and run; a run has a list of steps for each side. All sides take turns."""
    found: list[list[float]] = [[] for _ in runs[0]]
    for steps in runs[0]:
        steps[0]()  # warms up
    for run in runs:
        for steps, values in zip(run, found, strict=True):
            start = time.process_time()
            supervised = sum(step() for step in steps)
            values.append(supervised / (time.process_time() - start))
    return found


def columns(ours: Sequence[float], theirs: Sequence[float]) -> str:
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(ours):.0f} | {statistics.median(theirs):.1f} | {ratio:.1f}"


# -- data --------------------------------------------------------------------------------------------------------------


def synthetic(model: DiffusionGemma, canvases: int) -> Example:
    """A prompt and a response of whole canvases."""
    length = PROMPT + canvases * CANVAS
    return examples(model, [(length, ((PROMPT, length),))])[0]


def examples(model: DiffusionGemma, shapes: Sequence[tuple[int, tuple[tuple[int, int], ...]]]) -> list[Example]:
    """Random tokens for (length, answers)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.model_config.vocab_size
    return [
        Example(tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist()), answers, sample)
        for sample, (length, answers) in enumerate(shapes)
    ]


def conversations() -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    """Length and answers of the conversations of chitchat-dataset: the second speaker is the model.

    Tokens are words and signs; a turn has the three tokens of a chat template before it, one at its end that belongs to
    the answer, and a new line.
    """
    from importlib.util import find_spec

    (folder,) = find_spec("chitchat_dataset").submodule_search_locations
    shapes = []
    for conversation in json.loads((Path(folder) / "dataset.json").read_text()).values():
        position, answers = 1, []
        for turn, messages in enumerate(conversation["messages"]):
            text = " ".join(message["text"] for message in messages)
            start, end = position + 3, position + 3 + len(re.findall(r"\w+|[^\w\s]", text)) + 1
            if turn % 2:
                answers.append((start, end))
            position = end + 1
        if answers and answers[-1][1] <= MAX_LENGTH:
            shapes.append((answers[-1][1], tuple(answers)))
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path, help="the folder that AutoModel was installed into")
    parser.add_argument("what", choices=["equal", "canvases", "chat"])
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--experts", choices=["torch", "torch_mm"], default="torch_mm", help="AutoModel's backend of experts"
    )
    options = parser.parse_args()
    sys.path.append(str(options.peer))
    torch.set_num_threads(options.threads)
    initialize(ParallelLayout())
    model = calm(network(options.vocabulary))
    peer = Peer(model, options.experts)
    if options.what == "equal":
        equal(model, peer)
    else:
        {"canvases": canvases, "chat": chat}[options.what](model, peer, options.pairs)


if __name__ == "__main__":
    main()
