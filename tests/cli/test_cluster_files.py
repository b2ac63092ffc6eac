"""Site files: YAML gives values types, Slurm has only text; broken files are named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nemo_diffgemma.cli import configuration
from nemo_diffgemma.cli.allocation import fit
from nemo_diffgemma.fields import text_kind
from nemo_diffgemma.schema import ConfigurationError, TrainConfig, keys_of

TEXTS = [key for key in keys_of(TrainConfig) if key.startswith("cluster.") and text_kind(TrainConfig, key)]
TEXTS += ["cluster.environment.TAG", "cluster.sbatch.nice"]
RETYPED = ["12:00:00", "012345", "0100", "off", "yes", "1.10", "1e3", "0x1F", "true", "17", "[a]", "{a: b}"]


@pytest.fixture(autouse=True, scope="module")
def schemas_of_others_stay() -> Iterator[None]:
    store = ConfigStore.instance().repo.copy()
    yield
    ConfigStore.instance().repo = store


def composed(folder: Path, *arguments: str) -> Any:
    found: list[Any] = []
    before, sys.argv = sys.argv, ["train", f"--config-dir={folder}", "cluster=site", *arguments]
    try:
        configuration.compose(TrainConfig, "config", "", found.append)
    finally:
        sys.argv = before
    return found[0]


@pytest.fixture
def site(tmp_path) -> Path:
    (tmp_path / "cluster").mkdir()
    return tmp_path / "cluster" / "site.yaml"


def yaml_of(key: str, text: str) -> str:
    names = key.split(".")[1:]
    return "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(names))[:-1] + f" {text}\n"


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(TEXTS), text=st.sampled_from(RETYPED))
def test_text_that_yaml_reads_as_something_else_is_refused_with_its_file(site, key, text):
    site.write_text("scheduler: slurm\n" * (key != "cluster.scheduler") + yaml_of(key, text))
    with pytest.raises(ConfigurationError) as error:
        composed(site.parents[1])
    assert str(error.value).startswith(key)
    assert "write it in quotes (in cluster/site.yaml?)" in str(error.value)
    site.write_text("scheduler: slurm\n" * (key != "cluster.scheduler") + yaml_of(key, f"'{text}'"))
    found: Any = composed(site.parents[1])
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == text


def test_the_command_line_has_no_types(site):
    site.write_text("scheduler: slurm\n")
    given = ["cluster.account=012345", "cluster.time=12:00:00", "cluster.sbatch.nice=0100", "cluster.environment.A=off"]
    cluster = composed(site.parents[1], *given).cluster
    assert (cluster.account, cluster.time, cluster.sbatch, cluster.environment) == (
        "012345", "12:00:00", {"nice": "0100"}, {"A": "off"}
    )  # fmt: skip


GOOD = """\
# our site
scheduler: slurm
account: "012345"
time: "04:00:00"
nodes: 2
environment:
  NCCL_DEBUG: "INFO"
sbatch: {nice: "100"}
srun: [--cpu-bind=cores]
preflight:
  min_free_gb: 0.5
"""
mutations = st.lists(
    st.tuples(st.integers(0, len(GOOD)), st.integers(0, 3), st.sampled_from(
        [b"\xe9", b"\t", b":", b": ", b"[", b"}", b'"', b"\n", b"- ", b"${", b"${x}", b"&a ", b"*a", b"!!int ", b"0",
         b"null", b"\x00", b"---\n", b"cluster: 3\n", b"%"]
    )),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations)
def test_a_damaged_site_file_is_one_paragraph_or_a_configuration(site, mutations):
    content = GOOD.encode()
    for at, dropped, added in mutations:
        content = content[:at] + added + content[at + dropped :]
    assume(content != GOOD.encode())
    site.write_bytes(content)
    try:
        config = composed(site.parents[1])
    except ConfigurationError as error:
        assert str(error).strip()
    else:
        assert isinstance(config.cluster.time, str)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"time: [1\n", "cluster/site.yaml is no YAML that can be read"),
        (b"account: \xe9t\xe9\n", "cluster/site.yaml is not UTF-8 text"),
        (b"- a\n- b\n", "cluster/site.yaml holds a list; expected keys and values"),
        (b"nodes: many\n", "cluster.nodes: .*expected a whole number"),
        (b"nodes: 123456789012345678901234567890\n", "cluster.nodes is beyond 64 bits"),
        (b"preflight: 3\n", "cluster.preflight"),
        (b"environment: [a]\n", "cluster.environment"),
        (b"preflight: {min_free_gb: .nan}\n", "cluster.preflight.min_free_gb=nan; expected a finite number"),
        (b"partitoin: x\n", "did you mean cluster.partition?"),
    ],
)
def test_what_is_wrong_with_a_site_file_is_named(site, content, told):
    site.write_bytes(content)
    with pytest.raises(ConfigurationError, match=told.replace("?", "\\?")):
        composed(site.parents[1])


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("cluster.sbatch.comment=a\nb", "cluster.sbatch.comment=.*expected one line"),
        ("cluster.account=a\nb", "cluster.account=.*expected one line"),
    ],
)
def test_what_cannot_be_a_line_of_the_script_is_refused(site, argument, told):
    site.write_text("scheduler: slurm\n")
    with pytest.raises(ConfigurationError, match=told):
        fit("train", composed(site.parents[1], argument))
