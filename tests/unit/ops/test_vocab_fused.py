"""The Triton kernels against the torch reference in float64: on a GPU, or on the CPU by Triton's interpreter.

Triton chooses its interpreter while kernels are being decorated, so without a GPU these tests run in a process of their
own: `test_vocab_statistics.py` starts it.
"""

import os
from dataclasses import dataclass

import pytest
import torch

from mrl.ops import vocab_reference, vocab_statistics
from mrl.parallel.vocab_parallel import vocab_parallel_log_probs, vocab_parallel_log_probs_and_entropy

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from mrl.ops import vocab_fused
from mrl.ops.vocab_fused import Tuning

# The interpreter works with numpy, which warns where exponentials of low logits become 0 on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURE = 0.7
# Sums of at most 200 float32 terms and approximate exponentials, 2^-22 off: some rounding steps of values of up to 20.
TOLERANCE = 1e-5
# Half a unit in the last place; the interpreter cuts off where a GPU rounds to the nearest.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
SMALL = Tuning(block=32, num_warps=1, num_blocks=2)


@dataclass
class Case:
    """Logits of 2 x 2 tokens with loud columns past `count`, and what comes back from the ranks and from a loss."""

    width: int
    count: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.width)
        shape = (2, 2)
        logits = 3 * torch.randn(*shape, self.width, generator=generator)
        logits[..., self.count :] = 60.0
        targets = torch.randint(0, max(self.count, 1), shape, generator=generator)
        targets[0, 0], targets[0, 1], targets[1, 1] = -1, 0, max(self.count, 1) - 1
        self.logits, self.targets = logits.to(self.dtype).to(DEVICE), targets.to(DEVICE)
        self.terms = [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3)]

    def statistics(self, module, with_entropy=True, **options):
        logits = self.logits.double() if module is vocab_reference else self.logits
        options |= {"count": self.count, "temperature": TEMPERATURE, "with_entropy": with_entropy}
        return module.statistics(logits, self.targets, **options)

    def gradient(self, module, with_entropy=True, inplace=False, **options):
        exact = module is vocab_reference
        logits = self.logits.double() if exact else self.logits
        peak = self.logits.double().amax(-1)
        log_sum = ((self.logits.double() - peak[..., None]) / TEMPERATURE).exp().sum(-1).log()
        peak, log_sum, weight, *entropy_terms = (
            each.double() if exact else each.float() for each in (peak, log_sum, *self.terms)
        )
        options |= {"count": self.count, "temperature": TEMPERATURE, "inplace": inplace}
        terms = tuple(entropy_terms) if with_entropy else None
        return module.gradient(logits, self.targets, peak, log_sum, weight, terms, **options)


def assert_equal_statistics(actual, expected):
    (peak, sums), (expected_peak, expected_sums) = actual, expected
    assert torch.equal(peak.double(), expected_peak)
    assert peak.dtype == sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected_sums, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize(
    ("width", "count", "dtype"),
    [
        *((width, count, torch.float32) for width, count in [(64, 64), (104, 101), (37, 37), (65, 1), (5, 3), (96, 0)]),
        (104, 101, torch.float16),
        (37, 36, torch.bfloat16),
    ],
)
def test_kernels_equal_the_reference_at_any_width(width, count, dtype, with_entropy):
    case = Case(width, count, dtype)
    expected = case.statistics(vocab_reference, with_entropy)
    assert_equal_statistics(case.statistics(vocab_fused, with_entropy, tuning=SMALL), expected)
    gradient = case.gradient(vocab_fused, with_entropy, tuning=SMALL)
    assert gradient.dtype == dtype
    expected = case.gradient(vocab_reference, with_entropy)
    torch.testing.assert_close(gradient.double(), expected, rtol=ROUNDING[dtype] + 1e-5, atol=1e-6)


@pytest.mark.parametrize("tuning", [Tuning(block=16, num_warps=1), Tuning(block=64, num_warps=2, num_stages=3)])
def test_other_cuts_change_nothing(tuning):
    case = Case(152, 131)
    assert_equal_statistics(case.statistics(vocab_fused, tuning=tuning), case.statistics(vocab_reference))
    expected = case.gradient(vocab_reference)
    torch.testing.assert_close(case.gradient(vocab_fused, tuning=tuning).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_default_cuts_give_the_same():
    case = Case(9000, 8999)
    assert_equal_statistics(case.statistics(vocab_fused), case.statistics(vocab_reference))
    torch.testing.assert_close(
        case.gradient(vocab_fused).double(), case.gradient(vocab_reference), rtol=1e-5, atol=1e-6
    )


def strided(case, layout):
    """The same logits and targets elsewhere in memory."""
    if layout == "sequence first":
        case.logits = case.logits.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "rows apart":
        room = torch.full((2, 2, 2 * case.width), 99.0, dtype=case.dtype, device=DEVICE)
        room[..., : case.width] = case.logits
        case.logits = room[..., : case.width]
    else:
        case.logits, case.targets = case.logits.flatten(0, 1), case.targets.flatten()
        case.terms = [term.flatten() for term in case.terms]
    return case


@pytest.mark.parametrize("layout", ["sequence first", "rows apart", "flat"])
@pytest.mark.parametrize("inplace", [False, True])
def test_strides_are_followed_and_neighbours_left_alone(layout, inplace):
    case = strided(Case(70, 64), layout)
    before = case.logits.clone()
    around = case.logits._base.clone() if layout == "rows apart" else None
    assert_equal_statistics(case.statistics(vocab_fused, tuning=SMALL), case.statistics(vocab_reference))
    expected = case.gradient(vocab_reference)
    gradient = case.gradient(vocab_fused, inplace=inplace, tuning=SMALL)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(case.logits, gradient if inplace else before)
    assert (gradient.data_ptr() == case.logits.data_ptr()) is inplace
    if around is not None:
        assert torch.equal(case.logits._base[..., 70:], around[..., 70:])


def test_logits_as_low_as_the_dtype_goes_are_words_of_no_probability():
    case = Case(96, 90)
    case.logits[..., :40] = torch.finfo(torch.float32).min
    case.targets.fill_(50)
    assert_equal_statistics(case.statistics(vocab_fused, tuning=SMALL), case.statistics(vocab_reference))


def test_a_common_offset_costs_no_precision():
    case = Case(72, 70)
    case.logits = (case.logits * 64).round() / 64
    peak, sums = case.statistics(vocab_fused, tuning=SMALL)
    gradient = case.gradient(vocab_fused, tuning=SMALL)
    case.logits += 65536
    far_peak, far_sums = case.statistics(vocab_fused, tuning=SMALL)
    assert torch.equal(far_peak, peak + 65536)
    assert torch.equal(far_sums, sums)
    assert torch.equal(case.gradient(vocab_fused, tuning=SMALL), gradient)


def test_no_tokens_are_no_work():
    empty = torch.empty(1, 0, 40, device=DEVICE)
    targets = torch.empty(1, 0, dtype=torch.long, device=DEVICE)
    peak, sums = vocab_fused.statistics(empty, targets, count=40, temperature=1.0, with_entropy=True)
    assert (peak.shape, sums.shape) == ((1, 0), (3, 1, 0))
    leaf = empty.requires_grad_()
    vocab_parallel_log_probs(leaf, targets, tp_group=None, vocab_size=40).sum().backward()
    assert leaf.grad.shape == (1, 0, 40)


def test_autograd_goes_through_the_kernels_and_sees_what_they_overwrite():
    case = Case(96, 90, torch.bfloat16)
    assert vocab_statistics.implementation(case.logits) is vocab_fused
    gradients = []
    for inplace in (False, True):
        leaf = case.logits.clone().requires_grad_()
        logits = leaf * 1.0
        options = {"tp_group": None, "vocab_size": 90, "inplace_backward": inplace}
        log_probs, entropy = vocab_parallel_log_probs_and_entropy(logits, case.targets.clamp(min=0), **options)
        (2 * log_probs + entropy).sum().backward(retain_graph=True)
        gradients.append(leaf.grad.clone())
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                log_probs.sum().backward()
    assert gradients[0].abs().max() > 0.1
    assert torch.equal(*gradients)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_addresses_past_two_to_the_31_elements():
    num_tokens, vocab_size = 14_200, 151_936
    assert num_tokens * vocab_size > 2**31
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free GPU memory")
    logits = torch.empty(1, num_tokens, vocab_size, dtype=torch.bfloat16, device=DEVICE).normal_()
    targets = torch.arange(num_tokens, device=DEVICE)[None] * 10
    kept = logits[:, -3:].clone().requires_grad_()
    options = {"tp_group": None, "vocab_size": vocab_size}
    expected = vocab_parallel_log_probs(kept.double(), targets[:, -3:], **options)
    expected.sum().backward()
    leaf = logits.requires_grad_()
    log_probs = vocab_parallel_log_probs(leaf, targets, **options, inplace_backward=True)
    torch.testing.assert_close(log_probs[:, -3:].double(), expected, rtol=0, atol=1e-5)
    log_probs.sum().backward()
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    torch.testing.assert_close(leaf.grad[:, -3:], kept.grad, rtol=2**-7, atol=1e-6)
