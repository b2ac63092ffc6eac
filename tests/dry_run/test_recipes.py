"""Published recipes are the cases whose memory a dry run has found."""

from __future__ import annotations

from hydra import initialize_config_dir

from nemo_diffgemma.repository import CONF
from nemo_diffgemma.schema import TrainConfig
from tests.cli.test_configuration import composed
from tests.dry_run.figures import CASES, read


def test_full_fine_tuning_on_eight_gpus_fits_into_their_memory() -> None:
    """experiment=sft_8xh100: one example of 1024 tokens a GPU, as in the case; its frozen routers take less."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = composed("config", TrainConfig, ["experiment=sft_8xh100"])
    name = "train, EP8, full recompute"
    case = CASES["h100"][name]
    assert config.parallel.layout() == case.layout and config.model.recompute == case.model.recompute
    assert config.model.architecture == case.model.architecture and config.model.dtype == case.model.dtype
    assert config.model.objective == case.model.objective
    examples = config.data.global_batch_size // case.layout.replicas(case.world)
    assert examples == len(case.prompts) == case.micro_batches == 1
    assert config.data.max_length == case.prompts[0] + case.responses[0] == 1024
    assert read()["h100"][name]["peak_gb"] < 80
