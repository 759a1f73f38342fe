import importlib.util
from pathlib import Path

import gguf
import pytest

SCRIPT = Path(__file__).parents[3] / "examples/convert_gguf.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_gguf", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_gguf(path, **ids):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a"])
    for role, token_id in ids.items():
        getattr(writer, f"add_{role}_token_id")(token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_special_tokens_are_those_that_the_file_names(script, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", bos=1, eos=2)
    assert script.read_special_tokens(path) == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_the_file_of_a_package_is_found_or_what_is_wrong_is_said(script, tmp_path, monkeypatch):
    package = tmp_path / "a_model_package"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="brings 0 GGUF files"):
        script.find_in_package("a_model_package")
    path = write_gguf(package / "model.gguf", eos=2)
    assert script.find_in_package("a_model_package") == path
    with pytest.raises(ValueError, match="no_such_package is not installed; install it"):
        script.find_in_package("no_such_package")


def test_a_missing_file_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match=r"gone\.gguf does not exist"):
        script.convert(tmp_path / "gone.gguf", tmp_path / "out", None)
