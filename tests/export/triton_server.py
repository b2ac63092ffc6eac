"""The real Triton server, taken from a wheel, for as long as a test needs it.

PyPI's `nvidia-pytriton` 0.7.0 holds the binary (Triton 2.51, release 24.10), the Python backend and its stubs for
several Pythons. Two things are wrong with this release, and `environment` makes up for both: its pybind11 misreads
NumPy 2, so NumPy 1.26 comes first on the path; its Python is isolated, so a .pth file names the packages.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest

WHEEL, NUMPY = "nvidia-pytriton==0.7.0", "numpy==1.26.4"
CLIENT = ("tritonclient==2.73.0", "python-rapidjson==1.25")  # gRPC and protobuf are those of `make venv`
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_diffgemma" / f"triton-2.51-{PYTHON}"
SECONDS = 240  # until a server is ready: it imports torch and ONNX Runtime


def obtain() -> Path:
    """The folder with `pytriton`, `numpy` and `client`, filled once. Skips the test where something cannot be had."""
    library = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "none")
    if not library.is_file():
        pytest.skip(f"the server's stub needs a shared library of Python, and this one has no {library}")
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with CACHE.with_name(f"{CACHE.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not CACHE.is_dir():
            partial = CACHE.with_name(f"{CACHE.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _fill(partial)
            partial.rename(CACHE)
    return CACHE


def _fill(folder: Path) -> None:
    _pip("download", "--no-deps", "--dest", str(folder / "wheel"), WHEEL)
    (wheel,) = (folder / "wheel").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    shutil.rmtree(folder / "wheel")
    _pip("install", "--no-deps", "--target", str(folder / "numpy"), NUMPY)
    _pip("install", "--no-deps", "--target", str(folder / "client"), *CLIENT)
    server = folder / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        pytest.skip(f"{WHEEL} has no stub for Python {PYTHON}")
    for file in (shutil.copy(stub, server / "backends" / "python"), server / "bin" / "tritonserver"):
        Path(file).chmod(0o755)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no Triton server: pip {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")


def environment(folder: Path, packages: Sequence[Path]) -> Path:
    """A Python environment in `folder` that finds packages in these directories, in this order, and nowhere else."""
    venv.create(folder, with_pip=False, symlinks=True)
    (folder / "lib" / f"python{PYTHON}" / "site-packages" / "packages.pth").write_text("\n".join(map(str, packages)))
    return folder


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Server:
    """A server of `repository`, whose models run in the Python `environment`; a context manager that waits for it."""

    repository: Path
    environment: Path
    log: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.http_port, self.grpc_port = free_ports(2)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        server = CACHE / "pytriton" / "tritonserver"
        variables = {**os.environ, "PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}"}
        variables |= {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"), "OMP_NUM_THREADS": "1"}
        variables.pop("PYTHONPATH", None)
        command = [server / "bin" / "tritonserver", f"--model-repository={self.repository}"]
        command += [f"--backend-directory={server / 'backends'}", "--allow-metrics=false"]
        command += [f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}"]
        command += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=variables | self.variables, stdout=log, stderr=log)

    def __enter__(self) -> Server:
        self.start()
        deadline = time.monotonic() + SECONDS
        while not self._is_ready():
            assert self.process is not None and self.process.poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.terminate()
            self.wait()

    def terminate(self) -> None:
        """Ask the server to end, as Slurm, Kubernetes and Docker do."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code."""
        assert self.process is not None
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def stubs(self) -> list[int]:
        """Processes of the Python backend that this server has started."""
        assert self.process is not None
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        """Status and text of an answer to a POST under the model's address."""
        address = f"http://127.0.0.1:{self.http_port}/v2/models/diffusion_gemma/{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(address, body), timeout=SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/v2/{path}", timeout=SECONDS) as answer:
            return answer.read().decode()

    def _is_ready(self) -> bool:
        try:
            self.get("health/ready")
            return True
        except OSError:
            return False


def grpc_client() -> Any:
    """`tritonclient.grpc`, behind everything else on the path."""
    client = str(CACHE / "client")
    if client not in sys.path:
        sys.path.append(client)
    import tritonclient.grpc

    return tritonclient.grpc
