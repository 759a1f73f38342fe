"""What `mrl doctor` finds on a machine, and what it advises."""

import resource
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mrl import cuda_tools, doctor


def findings(*requirements, has_gpu=False):
    return [
        (each.name, each.is_error, each.remedy) for each in doctor.check_requirements(requirements, has_gpu=has_gpu)
    ]


def test_pinned_requirements_are_compared_with_what_is_installed():
    here = version("psutil")
    assert findings(f"psutil=={here}", "rich", "psutil==0.1") == [
        ("psutil", False, ""),
        ("psutil", True, "needs ==0.1"),
    ]
    assert findings("no-such-package==1") == [("no-such-package", True, "pip install no-such-package==1")]


def test_optional_requirements_may_be_absent():
    [(_, is_error, remedy)] = findings('no-such-ray==1; extra == "ray"')
    assert not is_error
    assert "trainer.launcher=ray cannot be used; pip install 'mrl[ray]'" in remedy
    engine = 'no-such-engine==1; extra == "gpu"'
    assert findings(engine) == [("no-such-engine", False, "")]
    assert "no flash attention" in findings(engine, has_gpu=True)[0][2]
    assert findings('pytest==0.1; extra == "dev"') == []


@pytest.fixture
def apex(tmp_path, monkeypatch):
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    return package


def test_apex_from_pypi_is_told_from_nvidia_s(apex):
    assert doctor.check_apex().is_error
    assert "pip uninstall apex" in doctor.check_apex().remedy
    with pytest.raises(ValueError, match=r"not NVIDIA's.*; pip uninstall apex"):
        doctor.refuse_wrong_apex()
    (apex / "optimizers").mkdir()
    doctor.refuse_wrong_apex()
    assert not doctor.check_apex().is_error
    assert str(apex) in doctor.check_apex().found


def test_low_limits_come_with_a_remedy():
    files, memory = doctor.check_limits(1024, 64 << 20)
    assert "ulimit -n 4096" in files.remedy
    assert "--shm-size" in memory.remedy
    assert not any(each.remedy for each in doctor.check_limits(resource.RLIM_INFINITY, 16 << 30))


def test_this_environment_is_found_sound(capsys):
    assert doctor.main([]) == 0
    assert "torch" in capsys.readouterr().out


def test_a_gpu_host_needs_a_driver_and_a_compiler_of_torchs_cuda():
    assert not doctor.check_driver(13, 13).is_error
    assert not doctor.check_driver(None, 13).is_error
    old = doctor.check_driver(12, 13)
    assert old.is_error
    assert "torch was built for CUDA 13; install a driver that runs it (580" in old.remedy
    assert not doctor.check_nvcc(Path("/cuda/bin/nvcc"), 13, 13).is_error
    for finding in (doctor.check_nvcc(None, None, 13), doctor.check_nvcc(Path("/cuda/bin/nvcc"), 12, 13)):
        assert finding.is_error
        assert "engines cannot start without nvcc of CUDA 13" in finding.remedy
    assert doctor.check_tool("Python.h", None).is_error
    assert not doctor.check_tool("g++", "/usr/bin/g++").is_error


def test_transformer_engine_that_cannot_be_imported_is_an_error(tmp_path, monkeypatch):
    assert doctor.check_transformer_engine() == []
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "pytorch" / "__init__.py").write_text("raise ImportError('another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [finding] = doctor.check_transformer_engine()
    assert finding.is_error
    assert "cannot be imported: ImportError: another torch" in finding.found
    assert "make gpu" in finding.remedy
    (package / "pytorch" / "__init__.py").write_text("")
    assert not doctor.check_transformer_engine()[0].is_error


def test_nvcc_is_found_where_torch_looks_for_it(tmp_path):
    for folder in ("home", "path"):
        (tmp_path / folder / "bin").mkdir(parents=True)
        nvcc = tmp_path / folder / "bin" / "nvcc"
        nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
        nvcc.chmod(0o755)
    on_path = {"PATH": str(tmp_path / "path" / "bin")}
    assert cuda_tools.find_nvcc(on_path) == tmp_path / "path/bin/nvcc"
    assert cuda_tools.find_nvcc({**on_path, "CUDA_HOME": str(tmp_path / "home")}) == tmp_path / "home/bin/nvcc"
    assert cuda_tools.find_nvcc({**on_path, "CUDA_PATH": str(tmp_path / "nowhere")}) is None
    assert cuda_tools.nvcc_cuda(tmp_path / "home/bin/nvcc") == 12
