"""The pre-flight check with real processes in the place of nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.preflight import BROKEN_NODE, Report, pairs, skews, verdict
from tests.pool import free_port

SCRIPT = str(Path(__file__).resolve().parents[2] / "slurm" / "preflight.py")


def fly(
    tmp_path: Path, nodes: list[str], *options: str, absent: str = "", full: str = "", cut_off: str = "", late: str = ""
) -> dict[str, dict]:
    """Reports of the nodes that come; of the others one may have no scratch, or no network."""
    port = free_port() - 1
    processes = []
    for rank, node in enumerate(nodes):
        if node != full:
            (tmp_path / "scratch" / node).mkdir(parents=True)
        if node != absent:
            slurm = dict(SLURM_PROCID=str(rank), SLURMD_NODENAME=node, CUDA_VISIBLE_DEVICES="0,1", OMP_NUM_THREADS="1")
            meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
            if node == late:
                time.sleep(3)
            if node == cut_off:
                meeting["GLOO_SOCKET_IFNAME"] = "none"
            command = [
                sys.executable, SCRIPT, "--report", str(tmp_path / "report"), "--nodes", ",".join(nodes),
                "--gpus", "2", "--device", "cpu", "--scratch", f"{tmp_path}/scratch/%N", "--min-free-gb", "0.01",
                "--min-shm-gb", "0.01", "--timeout", "60", *options,
            ]  # fmt: skip
            processes.append(subprocess.Popen(command, env={**os.environ, **slurm, **meeting}))
    assert [process.wait(timeout=240) for process in processes] == [0] * len(processes)
    return {file.stem: json.loads(file.read_text()) for file in (tmp_path / "report").glob("*.json")}


def judged(tmp_path: Path, nodes: list[str]) -> tuple[int, list[str], str]:
    command = [sys.executable, SCRIPT, "--verdict", str(tmp_path / "report"), "--nodes", ",".join(nodes)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout.split(), done.stderr


def test_three_good_nodes(tmp_path):
    nodes = ["n1", "n2", "n3"]
    for found in fly(tmp_path, nodes, "--timeout", "200").values():  # nobody waits for it, and machines may be slow
        assert (found["problems"], found["blames"], found["failed"]) == ([], {}, None)
    assert judged(tmp_path, nodes)[:2] == (0, [])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gpus", "8"], "2 GPUs are visible, expected 8"),
        (["--min-free-gb", "1e9"], "GB free, expected 1e+09"),
        (["--min-shm-gb", "1e9"], "/dev/shm has"),
        (["--scratch", "/nowhere/%N"], "/nowhere/n1 cannot be written"),
    ],
)
def test_what_a_node_lacks_is_told(tmp_path, options, told):
    assert told in fly(tmp_path, ["n1"], *options)["n1"]["problems"][0]
    code, broken, errors = judged(tmp_path, ["n1"])
    assert (code, broken) == (BROKEN_NODE, ["n1"])
    assert told in errors


def test_what_all_nodes_lack_is_asked_too_much_and_what_none_tells_was_cut_off(tmp_path):
    nodes = ["n1", "n2"]
    code, broken, errors = judged(tmp_path, nodes)
    assert (code, broken) == (1, []) and "no node has reported" in errors
    fly(tmp_path, nodes, "--min-free-gb", "1e9")
    code, broken, errors = judged(tmp_path, nodes)
    assert (code, broken) == (1, []) and "does cluster.preflight ask for what these nodes have?" in errors


def test_a_node_that_comes_late_has_no_wrong_clock(tmp_path):
    nodes = ["n1", "n2", "n3", "n4"]
    found = fly(tmp_path, nodes, "--max-clock-skew", "1", "--timeout", "60", absent="n4", late="n3")
    assert not any(report["problems"] for report in found.values())
    assert judged(tmp_path, nodes)[:2] == (BROKEN_NODE, ["n4"])


def test_one_bad_node_is_named_and_nobody_waits_for_it(tmp_path):
    nodes = ["n1", "n2", "n3"]
    found = fly(tmp_path, nodes, full="n2")
    assert max(report["seconds"] for report in found.values()) < 40
    assert judged(tmp_path, nodes)[:2] == (BROKEN_NODE, ["n2"])


def test_pairs_tell_which_node_breaks_the_all_reduce(tmp_path):
    nodes = ["n1", "n2", "n3", "n4"]
    fly(tmp_path, nodes, cut_off="n3")
    code, broken, errors = judged(tmp_path, nodes)
    assert (code, broken) == (BROKEN_NODE, ["n3"])
    assert "n3: every pair with it fails (says n1)" in errors


def test_of_two_nodes_neither_can_be_blamed(tmp_path):
    nodes = ["n1", "n2"]
    fly(tmp_path, nodes, cut_off="n2")
    code, broken, errors = judged(tmp_path, nodes)
    assert (code, broken) == (1, [])
    assert "n1: the all-reduce of all nodes fails" in errors


@pytest.mark.parametrize("absent", ["n1", pytest.param("n2", marks=pytest.mark.slow)])
def test_a_node_that_does_not_come_is_broken(tmp_path, absent):
    nodes = ["n1", "n2", "n3"]
    fly(tmp_path, nodes, "--timeout", "60", absent=absent)
    code, broken, errors = judged(tmp_path, nodes)
    assert (code, broken) == (BROKEN_NODE, [absent])
    assert f"{absent}: no report" in errors


def test_who_is_blamed_by_most_is_broken_and_with_two_nobody_is(tmp_path):
    def write(node: str, **blames: str) -> None:
        report = Report(tmp_path, node)
        report.blames, report.failed = blames, "the all-reduce of all nodes fails"
        report.write()

    for node in ("n1", "n2", "n3"):
        write(node, n3="every pair with it fails")
    assert verdict(tmp_path, ["n1", "n2", "n3"])[0] == ["n3"]
    write("n1", n2="did not come")
    write("n2", n1="its store cannot be reached")
    broken, told = verdict(tmp_path, ["n1", "n2"])
    assert broken == []
    assert "n1: its store cannot be reached (says n2)" in told


def test_every_node_has_two_different_partners():
    for size in range(3, 9):
        partners: dict[int, set[int]] = {rank: set() for rank in range(size)}
        for shift in (0, 1):
            for a, b in pairs(size, shift):
                partners[a].add(b)
                partners[b].add(a)
        alone = [rank for rank, found in partners.items() if len(found) < 2]
        assert len(alone) == (0 if size % 2 == 0 else 2), "where the number is odd, one is left over each time"


def test_clocks_are_compared_with_their_median():
    assert skews({"a": 100.0, "b": 101.0, "c": 160.0}) == {"a": -1.0, "b": 0.0, "c": 59.0}
