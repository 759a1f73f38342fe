"""The exactly-once proof against a byte-by-byte count."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl.reshard.coverage import ByteBox, boxes_of, check_exact_cover
from mrl.reshard.layout import TargetParam

PARAM = TargetParam(name="w", shape=(4, 3), dtype="bfloat16", element_size=2)


def counts(param, boxes):
    out = [[0] * param.row_bytes for _ in range(param.rows)]
    for box in boxes:
        for row in range(box.top, box.bottom):
            for byte in range(box.left, box.right):
                out[row][byte] += 1
    return out


def test_boxes_that_tile_pass():
    check_exact_cover(PARAM, [ByteBox(0, 2, 0, 4), ByteBox(0, 1, 4, 6), ByteBox(1, 4, 4, 6), ByteBox(2, 4, 0, 4)])


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([ByteBox(0, 3, 0, 6)], r"bytes \[0, 6\) of rows \[3, 4\) are written by no"),
        ([ByteBox(0, 4, 0, 4), ByteBox(0, 4, 5, 6)], r"bytes \[4, 5\) of rows \[0, 4\) are written by no"),
        ([ByteBox(0, 4, 0, 6), ByteBox(2, 3, 1, 2)], r"rows \[2, 3\) are written more than once"),
        ([], r"parameter w: bytes \[0, 6\) of rows \[0, 4\)"),
    ],
)
def test_a_gap_or_an_overlap_is_named(boxes, message):
    with pytest.raises(ValueError, match=message):
        check_exact_cover(PARAM, boxes)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_a_flat_run_touches_exactly_its_bytes(data):
    start = data.draw(st.integers(0, PARAM.num_bytes - 1))
    size = data.draw(st.integers(1, PARAM.num_bytes - start))
    flat = [count for row in counts(PARAM, boxes_of(PARAM, start, size, 1, size)) for count in row]
    assert flat == [int(start <= byte < start + size) for byte in range(PARAM.num_bytes)]


@given(
    st.lists(
        st.builds(
            lambda top, height, left, width: ByteBox(top, min(4, top + height), left, min(6, left + width)),
            st.integers(0, 3),
            st.integers(1, 4),
            st.integers(0, 5),
            st.integers(1, 6),
        ),
        max_size=5,
    )
)
@settings(max_examples=200, deadline=None)
def test_the_verdict_is_that_of_a_byte_by_byte_count(boxes):
    exact = all(count == 1 for row in counts(PARAM, boxes) for count in row)
    if exact:
        check_exact_cover(PARAM, boxes)
    else:
        with pytest.raises(ValueError, match="parameter w"):
            check_exact_cover(PARAM, boxes)


@pytest.mark.parametrize(
    ("write", "message"),
    [((20, 6, 1, 6), "leaves its 24 bytes"), ((0, 8, 2, 4), "do not lie in its rows"), ((4, 6, 2, 4), "do not lie")],
)
def test_a_write_outside_the_rows_is_refused(write, message):
    with pytest.raises(ValueError, match=message):
        boxes_of(PARAM, *write)
