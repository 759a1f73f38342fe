from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from mrl.rollout.wire import decode, encode
from mrl.types import Generation

LOG_PROBS = st.floats(min_value=-1e6, max_value=0, width=32)
GENERATIONS = st.builds(
    lambda tokens, reason, version: Generation(
        response_ids=array("i", [token for token, _ in tokens]),
        rollout_log_probs=array("f", [value for _, value in tokens]),
        finish_reason=reason,
        weight_version=version,
    ),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), LOG_PROBS), max_size=7),
    st.sampled_from(["stop", "length", "abort"]),
    st.integers(-1, 10**6),
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(0, 10**6), GENERATIONS, max_size=5))
def test_generations_survive_the_wire(generations):
    assert decode(*encode(generations)) == generations


def test_numbers_of_a_hand_worked_case():
    generation = Generation(
        response_ids=[7, 8], rollout_log_probs=[-0.5, -1.5], finish_reason="length", weight_version=4
    )
    numbers, log_probs = encode({3: generation})
    assert numbers.tolist() == [3, 2, 1, 4, 7, 8]
    assert log_probs.tolist() == [-0.5, -1.5]
