"""What is decided before a job is submitted: what fits, and the script. The scripts run in tests/slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from nemo_diffgemma.cli.allocation import fit, seconds_of
from nemo_diffgemma.cli.configuration import CONF, register
from nemo_diffgemma.cli.slurm_job import VERBS, render
from nemo_diffgemma.parallel.layout import LayoutError
from nemo_diffgemma.schema import ConfigurationError, TrainConfig, validate
from tests.commands import run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "slurm" / "example_dgx_h100.sbatch"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def configured(*overrides: str) -> TrainConfig:
    store = ConfigStore.instance().repo.copy()
    try:
        register(TrainConfig, "config")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return validate(compose("config", list(overrides)), TrainConfig)
    finally:
        ConfigStore.instance().repo = store


def train(*arguments: str, path: str | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run("launch/train.py", "model=tiny", *arguments, cwd=cwd, PATH=path or os.environ["PATH"])


def slurm(directory: Path, **commands: str) -> str:
    """A PATH with these commands of Slurm's, which do what tests/slurm shows that they do."""
    for name, script in commands.items():
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)
    return str(directory)


# -- what fits ---------------------------------------------------------------------------------------------------------


def test_replicas_follow_from_the_allocation():
    config = configured("cluster=dgx_h100", "cluster.nodes=4", "parallel=tp4_ep8", "model=diffusiongemma_26b_a4b")
    assert fit("train", config) == 32
    assert config.parallel.replicas == 4


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["cluster.nodes=3", "parallel.tensor=4", "parallel.expert=16", "model=diffusiongemma_26b_a4b"],
            "layout tensor=4,expert=16 needs 16 processes or a multiple of it, but cluster.nodes=3 x "
            "cluster.gpus_per_node=8 are 24; the nearest that fit: cluster.nodes=4 or parallel.tensor=4 "
            "parallel.expert=8",
        ),
        (["cluster.gpus_per_node=3", "parallel=tp2"], "nearest that fit: cluster.nodes=2 or parallel.tensor=1"),
        (["parallel=tp2", "parallel.replicas=3"], "which makes 4 of layout tensor=2; leave parallel.replicas out"),
        (["parallel.tensor=8", "model=tiny"], "layout tensor=8 cannot divide"),
        (["cluster.nodes=3"], "data.global_batch_size=64"),
        (["cluster.time=soon"], "expected minutes, hours:minutes:seconds"),
        (["cluster.time=00:10:00"], "cluster.time=00:10:00 leaves no time to train"),
        (["cluster.time='11'"], "give more than 11 minutes"),
        (["cluster.gpu=h1000"], "use one of b200, dgx_spark"),
        (["cluster.nodes=0"], "cluster.nodes=0; expected at least 1"),
        (["cluster.scheduler=pbs"], "use slurm, or null"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(overrides, told):
    with pytest.raises((LayoutError, ConfigurationError, ValueError), match=r"\S") as error:
        fit("train", configured("cluster=dgx_h100", *overrides))
    assert told in str(error.value)


def test_evaluation_takes_as_many_tasks_as_its_layout():
    config = configured("cluster=dgx_h100", "parallel=tp2_ep2")
    assert fit("evaluate", config) == 2
    several = configured("cluster=dgx_h100", "cluster.nodes=4", "parallel.tensor=8", "model=diffusiongemma_26b_a4b")
    assert (fit("evaluate", several), several.cluster.nodes) == (8, 1)
    with pytest.raises(LayoutError, match="use cluster.nodes=2"):
        fit("evaluate", configured("cluster=dgx_h100", "cluster.gpus_per_node=1", "parallel=tp2_ep2"))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("02:00:01", 7201), ("1-12", 129600), ("1-0:30", 88200), ("2-00:00:05", 172805)],
)
def test_slurms_forms_of_time(time, seconds):
    assert seconds_of(time) == seconds


# -- the script --------------------------------------------------------------------------------------------------------


def example() -> str:
    config = configured(
        "cluster=dgx_h100", "cluster.nodes=4", "cluster.account=language", "parallel=tp4_ep8",
        "model=diffusiongemma_26b_a4b", "cluster.container_image=/shared/images/nemo_diffgemma.sqsh",
        "cluster.container_mounts=[/shared/checkpoints:/shared/checkpoints:ro]",
    )  # fmt: skip
    return render(
        "train",
        config.cluster,
        tasks=fit("train", config),
        directory=Path("/shared/runs/finetune/first"),
        command="python launch/train.py cluster=dgx_h100 cluster.nodes=4 parallel=tp4_ep8 ...",
        name="finetune",
        root=Path("/shared/nemo_diffgemma"),
    )


def test_the_script_for_a_dgx_is_the_example():
    """Written anew with: python -m tests.cli.test_slurm_job"""
    assert example() == EXAMPLE.read_text()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("array", [0, 4])
@pytest.mark.parametrize("container", [None, "/images/a b.sqsh"])
def test_every_script_is_clean_shell(tmp_path, verb, array, container):
    cluster = configured("cluster=dgx_h100", "cluster.environment.NCCL_DEBUG=INFO", "cluster.sbatch.comment=x").cluster
    cluster.container_image, cluster.setup = container, ["module load cuda"]
    cluster.environment["QUOTED"] = "it's here"
    file = tmp_path / "job.sh"
    file.write_text(
        render(verb, cluster, tasks=8, directory=tmp_path / "a b", command="python", name="name", array=array)
    )
    done = subprocess.run([str(SHELLCHECK), str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# -- submission --------------------------------------------------------------------------------------------------------


def test_dry_run_shows_the_script_and_writes_nothing(tmp_path):
    done = train("cluster=dgx_h100", "dry_run=true", f"exp_manager.exp_dir={tmp_path}", "exp_manager.version=mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert done.stdout.splitlines()[-1] == f'{{"job": null, "runs": ["{tmp_path}/default/mine"]}}'
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_one_array(tmp_path):
    done = train("cluster=dgx_h100", "dry_run=true", f"exp_manager.exp_dir={tmp_path}", "--multirun", "seed=1,2,3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 1
    assert "#SBATCH --array=0-2\n" in done.stdout
    assert "/$SLURM_ARRAY_TASK_ID\n" in done.stdout


def test_paths_mean_what_they_meant_where_the_job_was_submitted(tmp_path):
    path = slurm(tmp_path, sbatch="echo 17")
    image = "cluster.container_image=/shared/image.sqsh"
    done = train("cluster=dgx_h100", "model.checkpoint=mine", "exp_manager.version=one", image, path=path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "default" / "one"
    assert json.loads((run / "slurm" / "config.json").read_text())["model"]["checkpoint"] == f"{tmp_path}/mine"
    assert f"{tmp_path}/mine:{tmp_path}/mine" in (run / "slurm" / "train.sbatch").read_text()


def test_a_directory_takes_one_job_at_a_time(tmp_path):
    arguments = ["cluster=dgx_h100", f"exp_manager.exp_dir={tmp_path}", "exp_manager.version=one"]
    path = slurm(tmp_path, sbatch="echo 17", squeue="echo 17 RUNNING")
    assert train(*arguments, path=path).returncode == 0
    second = train(*arguments, path=path)
    assert second.returncode == 2
    assert f"job 17 waits or works in {tmp_path}/default/one; cancel it first (scancel 17)" in second.stderr.replace(
        "\n", " "
    )
    assert train(*arguments, path=slurm(tmp_path, squeue="exit 1")).returncode == 0, "Slurm has forgotten it"


def test_a_sweep_goes_on_without_its_table(tmp_path):
    path = slurm(tmp_path, sbatch='case "$*" in *--wrap*) echo no >&2; exit 1 ;; *) echo 17 ;; esac')
    done = train("cluster=dgx_h100", f"exp_manager.exp_dir={tmp_path}", "--multirun", "seed=1,2", path=path)
    assert done.returncode == 0, done.stderr
    assert "but no table will be written at its end: Slurm refuses the job: no" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["job"] == "17"


def test_a_sweep_of_exports_is_one_array_too(tmp_path):
    sweep = ["--multirun", f"out={tmp_path}/a,{tmp_path}/b"]
    done = run("export/build.py", "model=tiny", "cluster=dgx_h100", "dry_run=true", *sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-1\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["cluster=dgx_h100"], "there is no sbatch here: submit from a login node"),
        (["dry_run=true"], "add cluster=dgx_h100"),
        (["cluster=dgx_h100", "cluster.gpus_per_node=3", "parallel=tp2"], "nearest that fit"),
        (["cluster=dgx_h100", "cluster.node=3"], "did you mean cluster.nodes?"),
        (["cluster=dgx_h100", "exp_manager.version=run-%j"], "choose exp_manager.exp_dir, name or version without"),
    ],
)
def test_what_cannot_be_submitted_is_one_paragraph(tmp_path, arguments, told):
    done = train(*arguments, f"exp_manager.exp_dir={tmp_path}", path=str(tmp_path))
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())
    assert done.stderr.startswith("error: ")


if __name__ == "__main__":
    EXAMPLE.write_text(example())
