import itertools
import json

import pytest

from mrl.data.loader import PromptLoader
from mrl.types import Prompt


def make_prompts(count):
    return [Prompt(uid=f"f:{index}", token_ids=[index + 1], messages=[], data_source="s") for index in range(count)]


def make_loader(count=10, *, batch_size=3, shuffle=True, seed=7):
    return PromptLoader(make_prompts(count), batch_size=batch_size, shuffle=shuffle, seed=seed)


def take(loader, count):
    return [[prompt.uid for prompt in batch] for batch in itertools.islice(loader, count)]


def test_each_epoch_draws_every_prompt_at_most_once_and_drops_the_rest():
    loader = make_loader(10, batch_size=3)
    assert loader.batches_per_epoch == 3
    epochs = [list(itertools.chain(*take(loader, 3))) for _ in range(4)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len(set(itertools.chain(*epochs))) == 10, "the prompt left out has to change between epochs"
    assert loader.epoch == 4


def test_without_shuffling_batches_follow_the_file():
    assert take(make_loader(5, batch_size=2, shuffle=False), 3) == [["f:0", "f:1"], ["f:2", "f:3"], ["f:0", "f:1"]]


def test_order_depends_on_the_seed_alone():
    assert take(make_loader(seed=1), 7) == take(make_loader(seed=1), 7)
    assert take(make_loader(seed=1), 7) != take(make_loader(seed=2), 7)


@pytest.mark.parametrize("done", range(8))
def test_a_resumed_loader_continues_exactly(done):
    unbroken = take(make_loader(), 8)
    first = make_loader()
    take(first, done)
    resumed = make_loader()
    take(resumed, 5)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(resumed, 8 - done) == unbroken[done:]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"count": 11}, "num_prompts"),
        ({"batch_size": 2}, "batch_size"),
        ({"shuffle": False}, "shuffle"),
        ({"seed": 8}, "seed"),
    ],
)
def test_state_of_another_order_is_refused(other, name):
    with pytest.raises(ValueError, match=f"cannot resume the data order: {name} was"):
        make_loader(**other).load_state_dict(make_loader().state_dict())


def test_state_of_other_prompts_is_refused():
    prompts = make_prompts(10)
    prompts[3].token_ids = [77]
    with pytest.raises(ValueError, match="token_ids_crc32"):
        PromptLoader(prompts, batch_size=3, shuffle=True, seed=7).load_state_dict(make_loader().state_dict())


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_size_that_cannot_be_filled_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size = {batch_size} must be between 1 and the number of prompts, 10"):
        make_loader(10, batch_size=batch_size)
