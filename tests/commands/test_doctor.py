"""`perl doctor`: a line for each check, each fault its own line with what to do; nothing secret, and no traceback."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement

from perlcli import device
from perlcli.commands import doctor
from perlcli.doctor import checks, torch_checks
from perlcli.doctor.checks import Finding, examine
from perlcli.errors import PerlError

Patch = pytest.MonkeyPatch


def found(check: Callable[[], Any], name: str = "test") -> list[tuple[str, str, str]]:
    return [(item.status, item.text, item.hint) for item in examine(name, check)]


def only(check: Callable[[], Any]) -> tuple[str, str, str]:
    (one,) = found(check)
    return one


def raising(error: BaseException) -> Callable[..., Any]:
    def check(*given: Any, **named: Any) -> Any:
        raise error

    return check


# The frame: isolation, what is printed, exit codes


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PerlError("no room", "make some"), ("FAIL", "no room", "make some")),
        (ValueError("a\nb"), ("FAIL", "ValueError: a b", "")),
        (OSError(13, "Permission denied", "/x"), ("FAIL", "Permission denied: /x", "")),
        (ImportError("libcuda.so"), ("FAIL", "ImportError: libcuda.so", "")),
        (RecursionError("deep"), ("FAIL", "RecursionError: deep", "")),
        (SystemExit(3), ("FAIL", "it exited with 3", "")),
        (
            MemoryError(),
            (
                "FAIL",
                "This machine's memory is too small (out of memory)",
                "stop other programs; perl doctor shows how much is free",
            ),
        ),
    ],
)
def test_a_check_that_cannot_be_made_is_a_line(error: BaseException, line: tuple[str, str, str]) -> None:
    assert only(raising(error)) == line


def test_what_a_check_found_before_it_failed_stays() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("test", "ok", "first")
        raise ValueError("second")

    assert [text for _, text, _ in found(check)] == ["first", "ValueError: second"]


def test_no_line_contains_a_secret_or_the_home_folder(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setenv("wandb_api_key", "0123456789")
    monkeypatch.setenv("SSH_KEY_FILE", "/etc/key")
    text = f"{tmp_path}/alice/x {tmp_path}/alice {tmp_path}/alice2 hf_planted 0123456789 /etc/key"
    assert checks.clean(text) == f"~/x ~ {tmp_path}/alice2 *** *** /etc/key"
    monkeypatch.setenv("HOME", "/")
    assert checks.clean("/x") == "/x"
    monkeypatch.setattr(checks.Path, "home", raising(RuntimeError("Could not determine home directory.")))
    assert checks.clean("/x") == "/x"


@pytest.fixture
def few(monkeypatch: Patch) -> Callable[..., None]:
    """Leaves `perl doctor` the findings that are named, instead of its checks."""

    def set_to(*given: Finding) -> None:
        monkeypatch.setattr(checks, "CHECKS", {"given": lambda: given})
        monkeypatch.setattr(torch_checks, "CHECKS", {})

    return set_to


def test_each_finding_is_a_line_with_what_to_do_beneath(few: Any, perl: Any) -> None:
    few(Finding("disk", "ok", "much"), Finding("gpu", "warn", "busy", "wait"))
    assert perl("doctor").output == (
        f"ok    {'disk':<{doctor.WIDTH}}  much\nwarn  {'gpu':<{doctor.WIDTH}}  busy\n{'':<{doctor.WIDTH + 8}}wait\n"
    )


def test_what_fails_ends_in_exit_code_1(few: Any, perl: Any) -> None:
    few(Finding("a", "FAIL", "x"), Finding("b", "ok", "y"), Finding("a", "FAIL", "z"))
    result = perl("doctor", code=1)
    assert result.stderr == "Error: Some checks failed: a\nHint: the lines marked FAIL say what to do\n"
    told = json.loads(perl("doctor", "--json", code=1).stdout)
    assert told["ok"] is False and [item["status"] for item in told["checks"]] == ["FAIL", "ok", "FAIL"]
    few(Finding("a", "warn", "x"))
    assert json.loads(perl("doctor", "--json").stdout) == {
        "ok": True, "checks": [{"name": "a", "status": "warn", "text": "x", "hint": ""}],
    }  # fmt: skip


@pytest.mark.slow
def test_the_whole_command_on_this_machine(perl: Any) -> None:
    result = perl("doctor", "--json")
    told = json.loads(result.stdout)
    by_name = {item["name"]: item for item in told["checks"]}
    assert told["ok"] and set(checks.CHECKS) | set(torch_checks.CHECKS) - {"float16"} <= set(by_name) | {"gpu"}
    for name in ("float32", "bfloat16", "8-bit", "4-bit", "libraries", "kernels", "matplotlib", "torch"):
        assert by_name[name]["status"] == "ok", by_name[name]
    assert str(Path.home()) + "/" not in result.output


# The process apart


def in_child(monkeypatch: Patch, code: str) -> None:
    """Let Python code stand for the process that makes the checks; `tell` writes a line, `names` are the checks'."""
    head = "import sys, json, os\nnames = sys.argv[1:]\ndef tell(**line): print(json.dumps(line), flush=True)\n"
    monkeypatch.setattr(doctor, "CHILD", [sys.executable, "-c", head + code])


CRASH = """
for name in names:
    tell(begin=name)
    if name == "b":
        print("illegal", file=sys.stderr); sys.stderr.flush()
        os.kill(os.getpid(), 4)
    tell(name=name, status="ok", text="well", hint="")
    tell(end=name)
"""


def test_a_crash_is_the_line_of_its_check_and_the_others_are_made(monkeypatch: Patch) -> None:
    in_child(monkeypatch, CRASH)
    monkeypatch.setattr(checks, "CHECKS", {})
    monkeypatch.setattr(torch_checks, "CHECKS", {"a": None, "b": None, "c": None})
    assert [(item.name, item.status, item.text) for item in doctor.findings()] == [
        ("a", "ok", "well"), ("b", "FAIL", "its process was killed by SIGILL: illegal"), ("c", "ok", "well"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("sys.exit('no torch')", "its process exited with code 1: no torch"),
        ("print('noise', flush=True)", "its process exited with code 0"),
        ("", "its process exited with code 0"),
    ],
)
def test_a_process_that_cannot_begin_fails_once(code: str, text: str, monkeypatch: Patch) -> None:
    in_child(monkeypatch, code)
    monkeypatch.setattr(checks, "CHECKS", {})
    monkeypatch.setattr(torch_checks, "CHECKS", {"a": None, "b": None})
    assert list(doctor.findings()) == [Finding("a", "FAIL", text)]


def test_a_check_that_hangs_is_ended(monkeypatch: Patch) -> None:
    in_child(monkeypatch, "tell(begin='a'); import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "TIMEOUT_SECONDS", 0.5)
    names = ["a"]
    assert [item.text for item in doctor.apart(names)] == ["its process took more than 0.5 s"] and not names


def test_the_process_writes_only_json_lines_whatever_libraries_print(tmp_path: Path) -> None:
    code = (
        "from perlcli.doctor import torch_checks\nfrom perlcli.doctor.checks import Finding\n"
        "def check():\n    print('noise')\n    yield Finding('a', 'ok', 'well')\n    raise ValueError('late')\n"
        "torch_checks.CHECKS = {'a': check}\ntorch_checks.main(['a'])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in said.splitlines()] == [
        {"begin": "a"}, dataclasses.asdict(Finding("a", "ok", "well")),
        dataclasses.asdict(Finding("a", "FAIL", "ValueError: late")), {"end": "a"},
    ]  # fmt: skip


@pytest.mark.slow
def test_a_file_in_the_current_folder_does_not_replace_a_library(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('not torch')")
    told = list(doctor.apart(["torch"]))
    assert [item.status for item in told] == ["ok"] and "built for" in told[0].text


# Versions


def demanding(monkeypatch: Patch, python: str, *packages: str) -> None:
    monkeypatch.setattr(checks, "requirements", lambda: (python, list(packages)))


def test_python_must_be_a_supported_version(monkeypatch: Patch) -> None:
    demanding(monkeypatch, ">=3.11,<3.14")
    assert only(checks.python)[0] == "ok"
    demanding(monkeypatch, ">=3.99")
    status, text, hint = only(checks.python)
    assert status == "FAIL" and "needs >=3.99" in text and hint


def test_packages_must_be_of_supported_versions(monkeypatch: Patch) -> None:
    demanding(
        monkeypatch, "", "typer>=0.1", "torch>=99,<100", "not-a-package>=1", "bitsandbytes>=99",
        "ruff>=99; extra == 'dev'", "elsewhere>=1; sys_platform == 'none'",
    )  # fmt: skip
    torch, missing, quantised, right = found(checks.packages)
    assert torch[0] == "FAIL" and "but perlcli needs torch<100,>=99" in torch[1]
    assert torch[2] == "pip install 'torch<100,>=99'"
    assert missing == ("FAIL", "not-a-package is not installed", "pip install 'not-a-package>=1'")
    assert quantised[0] == "warn" and "--load-in-4bit need it" in quantised[1]
    assert right == ("ok", f"typer {importlib.metadata.version('typer')}", "")


def test_requirements_come_from_the_package_or_its_checkout(monkeypatch: Patch, tmp_path: Path) -> None:
    python, packages = checks.requirements()
    assert python and any(line.startswith("trl") for line in packages)
    monkeypatch.setattr(checks.importlib.metadata, "distribution", raising(importlib.metadata.PackageNotFoundError()))
    needed = [Requirement(line) for line in packages if "extra" not in line]  # an installer may quote in another way
    assert needed == [Requirement(line) for line in checks.requirements()[1]]
    monkeypatch.setattr(checks, "PYPROJECT", tmp_path / "none")
    status, text, hint = only(checks.packages)
    assert (status, hint) == ("FAIL", "pip install perlcli") and "is not installed as a package" in text


def test_optional_packages_say_what_they_are_for(monkeypatch: Patch) -> None:
    monkeypatch.setattr(checks, "version_of", {"wandb": "1.2"}.get)
    lines = found(checks.optional)
    assert {status for status, _, _ in lines} == {"ok"}
    texts = [text for _, text, _ in lines]
    assert "wandb 1.2" in texts
    assert "tensorboard is not installed; for --report-to tensorboard: pip install tensorboard" in texts


# Machine


def test_processors(monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert only(checks.processors) == ("ok", "2 of 8 cores, OMP_NUM_THREADS=1", "")


@pytest.fixture
def machine(monkeypatch: Patch, tmp_path: Path) -> Callable[..., None]:
    """Sets what the system tells of memory: available bytes, and the files of the container's limits."""

    def tell(available: int, **limits: str) -> None:
        memory = namedtuple("memory", "total available")(16_384_000_000, available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(checks, "CGROUP", tmp_path / "cgroup")
        shutil.rmtree(tmp_path / "cgroup", ignore_errors=True)
        (tmp_path / "cgroup").mkdir()
        for name, text in limits.items():
            (tmp_path / "cgroup" / f"memory.{name}").write_text(text + "\n")

    return tell


def test_memory_of_the_machine_or_of_its_container(machine: Any, monkeypatch: Patch, tmp_path: Path) -> None:
    machine(8_192_000_000)
    assert only(checks.memory) == ("ok", "8.19 GB of 16.4 GB free", "")
    machine(8_192_000_000, max="max", current="5")
    assert only(checks.memory)[1] == "8.19 GB of 16.4 GB free"
    machine(8_192_000_000, max=str(4 * 10**9), current=str(10**9))
    assert only(checks.memory)[1] == "3.00 GB of 4.00 GB free"
    machine(1_024_000_000)
    assert only(checks.memory)[0] == "warn"
    monkeypatch.setattr(psutil, "virtual_memory", raising(ValueError("MemTotal: many kB")))
    assert only(checks.memory)[0] == "FAIL"


def test_disk_warns_where_room_is_short_or_nothing_can_be_written(monkeypatch: Patch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage(9e9, 0, 9e9))
    lines = found(checks.disk)
    assert [status for status, _, _ in lines] == ["ok"] * 3 and "9.00 GB free" in lines[0][1]
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage(9e9, 5e9, 4e9))
    assert [(status, bool(hint)) for status, _, hint in found(checks.disk)] == [("warn", True)] * 3
    monkeypatch.setattr(checks.os, "access", lambda *_: False)
    assert "it is not writable" in found(checks.disk)[0][1]
    monkeypatch.setattr(checks.Path, "cwd", raising(FileNotFoundError(2, "No such file or directory")))
    assert found(checks.disk)[0][:2] == ("FAIL", "the current folder was deleted")
    assert len(found(checks.disk)) == 3


def test_a_cache_that_is_yet_to_be_made_is_measured_where_it_will_be(tmp_path: Path) -> None:
    line = checks.space("hub cache", tmp_path / "a" / "b", "hint")
    assert line.status in ("ok", "warn") and str(tmp_path / "a" / "b") in line.text


def test_the_hub_is_not_asked_and_a_token_is_not_shown(monkeypatch: Patch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_planted")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status, text, _ = only(checks.hub)
    assert status == "ok" and "HF_HUB_OFFLINE is set" in text and "a token is set" in text and "planted" not in text
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "downloaded to" in only(checks.hub)[1] and "no token is set" in only(checks.hub)[1]


def script(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "perl"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_interpreter_that_runs_perl_programs(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert only(checks.interpreter)[0] == "warn"
    ours = script(tmp_path / "ours", "#!/usr/bin/python\nfrom perlcli.entry import perl\n")
    theirs = script(tmp_path / "theirs", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{ours.parent}{os.pathsep}{theirs.parent}")
    assert only(checks.interpreter) == ("ok", f"Perl programs run with {theirs}", "")
    monkeypatch.setenv("PATH", str(theirs.parent))
    assert [status for status, _, _ in found(checks.interpreter)] == ["ok", "warn"]


# torch and GPU


def test_how_torch_was_built(monkeypatch: Patch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0" in only(torch_checks.build)[1]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for the CPU" in only(torch_checks.build)[1]


@pytest.mark.parametrize(
    ("driver", "visible", "is_cpu_build", "status", "told"),
    [
        ("", None, True, "ok", "none"),
        ("", "", True, "ok", "none"),
        ("570.1", "", False, "warn", "hides the GPUs"),
        ("570.1", "-1", True, "warn", "hides the GPUs"),
        ("570.1", None, True, "warn", "built for the CPU"),
        ("570.1", "0", False, "FAIL", "can't use the GPU: driver 570.1, CUDA_VISIBLE_DEVICES='0'"),
    ],
)
def test_why_there_is_no_gpu(
    driver: str, visible: str | None, is_cpu_build: bool, status: str, told: str, monkeypatch: Patch
) -> None:
    import torch

    monkeypatch.setattr(device, "kind", lambda: "cpu")
    monkeypatch.setattr(torch.version, "cuda", None if is_cpu_build else "13.0")
    monkeypatch.setattr(device, "driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    line = only(torch_checks.gpus)
    assert line[0] == status and told in line[1]


@pytest.fixture
def two_gpus(monkeypatch: Patch) -> None:
    import torch

    monkeypatch.setattr(device, "kind", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda n: ((20e9, 24e9), (1e9, 24e9))[n])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: ((9, 0), (7, 5))[n])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: f"GPU-{n}")
    monkeypatch.setattr(device, "driver", lambda: "570.1")


@pytest.mark.usefixtures("two_gpus")
def test_each_gpu_has_a_line(monkeypatch: Patch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    first, second, both = found(torch_checks.gpus)
    assert first == ("ok", "0: GPU-0, 20.0 GB of 24.0 GB free, compute capability 9.0, bfloat16, driver 570.1, "
                     "CUDA 13.0, CUDA_VISIBLE_DEVICES=2,3", "")  # fmt: skip
    assert second[0] == "warn" and "another process uses its memory" in second[2]
    assert "compute capability 7.5, no bfloat16, " in second[1]
    assert both == ("ok", device.which_gpu(), "") and "CUDA_VISIBLE_DEVICES=3 selects the second" in both[1]


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_without_bfloat16_says_what_that_means(monkeypatch: Patch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda n: (16e9, 16e9))
    assert [hint for _, _, hint in found(torch_checks.gpus)] == ["", device.NO_BFLOAT16, ""]


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_fails_is_a_line(monkeypatch: Patch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", raising(RuntimeError("CUDA error: ECC")))
    assert only(torch_checks.gpus) == ("FAIL", "RuntimeError: CUDA error: ECC", "")


def test_the_driver_version_comes_from_nvidia_smi_or_the_system(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(device, "DRIVER", tmp_path / "version")
    assert device.driver() == ""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\n")
    assert device.driver() == "570.86.15"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    tool.chmod(0o755)
    assert device.driver() == "580.1"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert device.driver() == "570.86.15"


def test_the_driver_that_does_not_answer_is_unknown(monkeypatch: Patch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(device, "SMI_SECONDS", 0.1)
    assert device.driver() == "unknown"


# TRL's kernels


def test_trls_head_is_tried(monkeypatch: Patch) -> None:
    from perlcli.doctor import kernels

    status, text, _ = only(torch_checks.kernels)
    assert status == "ok" and text.startswith("TRL's log-probabilities differ from torch's by ")
    for wrong in (0.1, float("nan")):
        monkeypatch.setattr(kernels, "error", lambda wrong=wrong: wrong)
        assert only(torch_checks.kernels)[::2] == ("FAIL", torch_checks.REINSTALL)


@pytest.mark.usefixtures("like_stubbed_cuda")
def test_kernels_that_cannot_be_compiled_say_what_to_install(monkeypatch: Patch) -> None:
    from perlcli.doctor import kernels

    monkeypatch.setattr(kernels, "error", raising(RuntimeError("Failed to find C compiler.")))
    status, text, hint = only(torch_checks.kernels)
    assert (status, hint) == ("FAIL", torch_checks.COMPILER) and "gcc python3-dev" in hint
    assert text == "TRL's log-probabilities can't be computed: RuntimeError: Failed to find C compiler."
    monkeypatch.setattr(kernels, "error", raising(RuntimeError("CUDA error: out of memory")))
    assert only(torch_checks.kernels)[1] == "The GPU's memory is too small (out of memory)"


@pytest.mark.usefixtures("like_stubbed_cuda")
def test_a_stubbed_gpu_has_its_line(monkeypatch: Patch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(device, "driver", lambda: "570.1")
    monkeypatch.delenv(device.VISIBLE, raising=False)
    assert only(torch_checks.gpus)[1].startswith(
        "0: NVIDIA Imitation, 20.0 GB of 24.0 GB free, compute capability 9.0, bfloat16, driver 570.1, CUDA "
    )


# Precisions


def test_a_precision_that_is_wrong_says_what_to_take_instead(monkeypatch: Patch) -> None:
    from perlcli.doctor import precisions

    wrong = precisions.Comparison(2.5, 2.4, 0.2, False)
    monkeypatch.setattr(precisions, "compare", lambda name: wrong)
    status, text, hint = only(lambda: torch_checks.precision("4-bit"))
    assert status == "FAIL" and "cosine 0.20000 (at least 0.99)" in text and "upgrade bitsandbytes" in hint


def test_a_precision_that_this_machine_does_not_support_is_not_a_failure(monkeypatch: Patch) -> None:
    lack = PerlError("needs bitsandbytes", "pip install bitsandbytes")
    monkeypatch.setattr(torch_checks.device, "check", raising(lack))
    line = only(lambda: torch_checks.precision("8-bit"))
    assert line == ("warn", "needs bitsandbytes", "pip install bitsandbytes")


def test_float16_is_only_checked_on_a_gpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch_checks.device, "kind", lambda: "cpu")
    monkeypatch.setattr(torch_checks.device, "check", raising(PerlError("asked")))
    assert found(torch_checks.CHECKS["float16"]) == []
    monkeypatch.setattr(torch_checks.device, "kind", lambda: "cuda")
    assert only(torch_checks.CHECKS["float16"]) == ("warn", "asked", "")


@pytest.mark.parametrize("check", [torch_checks.libraries, torch_checks.pictures], ids=["libraries", "pictures"])
def test_a_library_that_cannot_be_imported_is_a_line(check: Any, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "perlcli.run.plots", None)
    monkeypatch.delattr("perlcli.run.plots", raising=False)
    status, text, _ = only(check)
    assert status == "FAIL" and "Error: " in text
