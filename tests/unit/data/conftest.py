import pytest

from mrl.data.embedded import build_embedded_tokenizer
from mrl.data.rows import write_rows


@pytest.fixture(scope="session")
def tokenizer():
    return build_embedded_tokenizer()


@pytest.fixture
def write_prompts(tmp_path):
    """Writes prompts as a parquet file in the row format; returns its path."""

    def write(prompts, name="train.parquet", **columns):
        rows = [
            {
                "data_source": "embedded/counting",
                "prompt": prompt,
                "ability": "counting",
                "reward_model": {"style": "rule", "ground_truth": "6789"},
                "extra_info": {"index": index},
                **columns,
            }
            for index, prompt in enumerate(prompts)
        ]
        write_rows(tmp_path / name, rows)
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def user():
    """A conversation of one user turn."""
    return lambda content: [{"role": "user", "content": content}]
