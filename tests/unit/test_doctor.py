"""What `mrl doctor` finds on a machine, and what it advises."""

import resource
import sys
from importlib.metadata import version

import pytest

from mrl import doctor


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
