"""`fastrnn.clip` against `torch.nn.utils.clip_grad_norm_`: every edge, to the bit."""

from __future__ import annotations

import inspect
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrnn import GradientClipper, torch_private
from fastrnn.clip import clip_grad_norm as clip
from fastrnn.clip import clip_grad_norm_, gradient_norms
from fastrnn_kernels import gradient_norm, trust
from fastrnn_kernels.gradient_norm import Ring
from fastrnn_kernels.launch import CannotLaunch

torch_clip_grad_norm_ = nn.utils.clip_grad_norm_
inf, nan = math.inf, math.nan

LONG = 2**18  # elements; here, longer float gradients are summed in chunks
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NORM_TYPES = [2.0, 1.0, inf, 3.0, 0.5, 0.0, -inf, -1.0, "inf", 2]


class Outcome(NamedTuple):
    """What a call leaves behind, in a form that compares by value, floats by their bits."""

    result: object
    error: tuple[type, str] | None
    warned: set[tuple[type, str]]
    gradients: list[object]
    versions_risen: list[int | None]


def bits(tensor: Tensor) -> object:
    if tensor.is_meta:
        return tensor.dtype, tensor.device, tensor.shape
    if tensor.is_sparse:
        return bits(tensor._indices()), bits(tensor._values()), tensor.shape, tensor.is_coalesced()
    data = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return tensor.dtype, tensor.device, tensor.shape, data.view(torch.uint8).tolist()


def version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def parameter(grad: Tensor | None) -> Tensor:
    if grad is None:
        return torch.zeros(3, requires_grad=True)
    if not (grad.is_floating_point() or grad.is_complex()):
        holder = torch.zeros(grad.shape, dtype=grad.dtype)
    else:
        holder = torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device, requires_grad=True)
    holder.grad = grad
    return holder


def outcome(
    function: Callable[..., Tensor],
    gradients: Iterable[Tensor | None],
    *arguments: object,
    wrap: Callable[[list[Tensor]], object] = list,
    **options: object,
) -> Outcome:
    parameters = [parameter(g) for g in gradients]
    grads = [p.grad for p in parameters if p.grad is not None]
    before = [version(g) for g in grads]
    result, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = bits(function(wrap(parameters), *arguments, **options))
        except Exception as raised:
            error = type(raised), str(raised)
    return Outcome(
        result,
        error,
        {(w.category, str(w.message)) for w in caught},
        [bits(g) for g in grads],
        [None if b is None else version(g) - b for g, b in zip(grads, before)],
    )


def assert_as_torch(
    make: Callable[[], Iterable[Tensor | None]], *arguments: object, **options: object
) -> Outcome:
    """Both functions leave the same behind on equal gradients; return what."""
    expected = outcome(torch_clip_grad_norm_, make(), *arguments, **options)
    assert outcome(clip_grad_norm_, make(), *arguments, **options) == expected
    return expected


def normals(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def three(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return normals((17, 5), (63,), (1, 65, 2), dtype=dtype)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 1.5, 10.0], ids=lambda r: f"max{r}")
@pytest.mark.parametrize("norm_type", NORM_TYPES, ids=repr)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_torch(
    dtype: torch.dtype, norm_type: float, ratio: float, foreach: bool | None
) -> None:
    norm = torch_clip_grad_norm_([parameter(g) for g in three(dtype)], 1.0, norm_type).item()
    assert_as_torch(lambda: three(dtype), ratio * norm, norm_type, foreach=foreach)


def test_signature_is_torchs() -> None:
    ours, theirs = (inspect.signature(f) for f in (clip_grad_norm_, torch_clip_grad_norm_))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


def test_norm_equal_to_max_norm_still_scales() -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    assert clip_grad_norm_(p, 5.0) == 5.0
    assert torch.equal(p.grad, torch.tensor([3.0, 4.0]) * (5.0 / (torch.tensor(5.0) + 1e-6)))
    assert p.grad[0] < 3.0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_thresholds_a_rounding_from_the_norm(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for value in (0.3, 1.0, 1.7, 23.0, 511.0, 4990.0, 5001.0, 6000.0):
        for ratio in (1 - eps, 1 + eps / 8, 1 + eps / 4, 1 + eps / 2, 1 + eps, 2 - eps, 2 + eps):
            assert_as_torch(lambda value=value: [torch.tensor([value], dtype=dtype)], value * ratio)


@pytest.mark.parametrize("ratio", [1.5, 3.0, 1e3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms_that_the_epsilon_outweighs(dtype: torch.dtype, ratio: float) -> None:
    for value in (1e-7, 1e-8, 1e-12, 0.0):
        assert_as_torch(lambda value=value: [torch.tensor([value], dtype=dtype)], ratio * value)


def test_a_reciprocal_that_is_flushed_to_zero() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        expected = assert_as_torch(lambda: [torch.tensor([1.5e38])], 3.2e38, inf)
    finally:
        torch.set_flush_denormal(False)
    assert expected.gradients == [bits(torch.zeros(1))]


@pytest.mark.parametrize(
    "max_norm",
    [3, 0, 0.0, -1.0, inf, -inf, nan, 1e6, 1e39, True, "1.5", torch.tensor(1.5), None, "x", 1j],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_max_norm_may_be_whatever_float_takes(dtype: torch.dtype, max_norm: object) -> None:
    assert_as_torch(lambda: three(dtype), max_norm)
    assert_as_torch(list, max_norm)


@pytest.mark.parametrize("norm_type", ["x", None, nan, 1j, torch.tensor(2.0)], ids=repr)
def test_norm_type_may_be_whatever_float_takes(norm_type: object) -> None:
    assert_as_torch(three, 1.0, norm_type)
    assert_as_torch(list, 1.0, norm_type)


class TestParameters:
    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    @pytest.mark.parametrize(
        "wrap",
        [
            tuple,
            iter,
            lambda ps: (p for p in ps),
            lambda ps: dict(enumerate(ps)).values(),
            lambda ps: nn.ParameterList(ps).parameters(),
            lambda ps: ps[0],
            lambda ps: filter(lambda p: p.grad is not None, ps),
        ],
        ids=["tuple", "iter", "generator", "dict", "module", "tensor", "filter"],
    )
    def test_any_iterable_or_one_tensor(self, wrap: Callable, max_norm: float) -> None:
        assert_as_torch(lambda: [*three(), None], max_norm, wrap=wrap)

    def test_generator_is_consumed_once(self) -> None:
        produced = []

        def generate(parameters: list[Tensor]) -> Iterable[Tensor]:
            for p in parameters:
                produced.append(p)
                yield p

        outcome(clip_grad_norm_, three(), 0.5, wrap=generate)
        assert len(produced) == 3

    def test_empty_generator_warns(self) -> None:
        expected = assert_as_torch(list, 1.0, wrap=lambda ps: (p for p in ps))
        assert len(expected.warned) == 1

    @pytest.mark.parametrize(
        "function", [clip_grad_norm_, torch_clip_grad_norm_], ids=["ours", "torch"]
    )
    def test_the_warning_names_the_callers_line(self, function: Callable[..., Tensor]) -> None:
        with pytest.warns(UserWarning, match="empty generator") as caught:
            function((p for p in ()), 1.0)
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("gradients", [[], [None, None]], ids=["empty", "none"])
    def test_without_gradients_the_norm_is_zero(
        self, gradients: list[None], dtype: torch.dtype
    ) -> None:
        torch.set_default_dtype(dtype)
        expected = assert_as_torch(lambda: gradients, 1.0, error_if_nonfinite=True)
        assert expected.result == bits(torch.tensor(0.0))
        assert not expected.warned

    def test_without_gradients_on_a_default_device_without_values(self) -> None:
        with torch.device("meta"):
            assert_as_torch(list, 1.0, error_if_nonfinite=True)

    @pytest.mark.parametrize("wrong", [None, 3, [None], [3], "ab"], ids=repr)
    def test_wrong_ones_get_torchs_error(self, wrong: object) -> None:
        expected = assert_as_torch(list, 1.0, wrap=lambda _: wrong)
        assert expected.error is not None

    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    def test_a_duplicate_counts_and_is_scaled_twice(self, max_norm: float) -> None:
        expected = assert_as_torch(three, max_norm, wrap=lambda ps: [ps[1], ps[0], ps[1]])
        assert expected.versions_risen == [1, 2, 0]

    def test_a_shared_gradient(self) -> None:
        assert_as_torch(lambda: three()[:1] * 2, 0.5)

    def test_not_a_leaf(self) -> None:
        expected = assert_as_torch(three, 0.5, wrap=lambda ps: [ps[0] * 2, *ps])
        assert len(expected.warned) == 1


class TestNonFinite:
    @pytest.mark.parametrize("error", [True, False], ids=["raise", "scale"])
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, inf, 0.0, -inf])
    @pytest.mark.parametrize("value", [nan, inf, -inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_equals_torch(
        self, dtype: torch.dtype, value: float, norm_type: float, error: bool
    ) -> None:
        def make() -> list[Tensor]:
            gradients = three(dtype)
            gradients[1][40] = value
            return gradients

        for max_norm in (1.0, 1e3, inf):
            assert_as_torch(make, max_norm, norm_type, error)

    def test_raises_before_scaling_with_torchs_words(self) -> None:
        p, q = parameter(torch.tensor([3.0, 4.0])), parameter(torch.tensor([inf]))
        with pytest.raises(RuntimeError, match=r"^The total norm of order 2\.0 for gradients"):
            clip_grad_norm_([p, q], 1.0, error_if_nonfinite=True)
        assert p.grad.tolist() == [3.0, 4.0]
        assert p.grad._version == 0

    def test_float16_norm_overflows_as_in_torch(self) -> None:
        expected = assert_as_torch(lambda: [torch.full((9,), 6e4, dtype=torch.float16)], 1.0)
        assert expected.result == bits(torch.tensor(inf, dtype=torch.float16))


class TestKindsOfGradient:
    @pytest.mark.parametrize("foreach", [None, False])
    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    @pytest.mark.parametrize(
        "dtypes",
        [
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float16, torch.bfloat16),
            (torch.float16, torch.float64, torch.float32),
            (torch.float64, torch.complex64),
            (torch.complex128, torch.complex64),
        ],
        ids=str,
    )
    def test_mixed_dtypes(
        self, dtypes: tuple[torch.dtype, ...], max_norm: float, foreach: bool | None
    ) -> None:
        # Many of many sizes: the order in which their norms are summed shows in the last bit.
        def make() -> list[Tensor]:
            grads = [normals((n % 7 + 1, n + 1), dtype=dtypes[n % len(dtypes)]) for n in range(60)]
            return [g * -0.0 if n % 5 == 3 else g for n, [g] in enumerate(grads)]

        assert_as_torch(make, max_norm, foreach=foreach)

    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, inf])
    def test_complex(self, norm_type: float, max_norm: float) -> None:
        # (-0 - 1j) * 1 is (+0 - 1j): even an un-clipped step changes the sign of zero.
        def make() -> list[Tensor]:
            return [torch.tensor([complex(-0.0, -1.0), complex(2.0, -0.0)])]

        assert_as_torch(make, max_norm, norm_type)

    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    @pytest.mark.parametrize(
        "view",
        [
            lambda g: g.t(),
            lambda g: g[:, ::2],
            lambda g: g[3],
            lambda g: g[0, 0],
            lambda g: g.view(8, 2, 4, 1).to(memory_format=torch.channels_last),
            lambda g: g.as_strided((5, 8), (3, 1)),
            lambda g: g[:0],
            lambda g: g[:1, :1].expand(1, 1),
            lambda g: g[:0, :1].expand(0, 4),
        ],
        ids=[
            "transposed",
            "strided",
            "row",
            "scalar",
            "channels_last",
            "overlapping",
            "empty",
            "one",
            "none",
        ],
    )
    def test_views(self, view: Callable[[Tensor], Tensor], max_norm: float) -> None:
        assert_as_torch(lambda: [*three(), view(normals((8, 8))[0])], max_norm)

    @pytest.mark.parametrize("foreach", [None, True, False])
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.0, inf, -inf])
    @pytest.mark.parametrize("alone", [True, False])
    def test_without_elements(self, alone: bool, norm_type: float, foreach: bool | None) -> None:
        empty = normals((0, 3))
        make = (lambda: empty) if alone else (lambda: empty + three())
        expected = assert_as_torch(make, 0.5, norm_type, foreach=foreach)
        assert (expected.error is not None) == math.isinf(norm_type)

    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    def test_expanded_is_torchs_error_also_when_not_clipped(self, max_norm: float) -> None:
        expected = assert_as_torch(lambda: [torch.ones(1, 2).expand(3, 2)], max_norm)
        assert expected.error is not None

    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    @pytest.mark.parametrize("inside", [True, False])
    def test_inference_tensor(self, inside: bool, max_norm: float) -> None:
        def make() -> list[Tensor]:
            with torch.inference_mode():
                return [torch.ones(3)]

        with torch.inference_mode(inside):
            expected = assert_as_torch(make, max_norm)
        assert (expected.error is None) == inside

    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    def test_in_inference_mode(self, max_norm: float) -> None:
        gradients = [three(), three()]
        for function, grads in zip((torch_clip_grad_norm_, clip_grad_norm_), gradients):
            parameters = [parameter(g) for g in grads]
            with torch.inference_mode():
                function(parameters, max_norm)
        assert list(map(bits, gradients[0])) == list(map(bits, gradients[1]))
        assert [g._version for g in gradients[0]] == [g._version for g in gradients[1]]

    @pytest.mark.parametrize("foreach", [None, True, False])
    def test_sparse_is_as_in_torch(self, foreach: bool | None) -> None:
        """An error up to torch 2.13, clipped from 2.14 on."""

        def make() -> list[Tensor]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch 2.11 says that it could check, once
                return [torch.sparse_coo_tensor([[0, 2]], [3.0, 4.0], (5,), check_invariants=True)]

        assert_as_torch(make, 0.5, foreach=foreach)

    def test_integers_are_torchs_error(self) -> None:
        expected = assert_as_torch(lambda: [torch.ones(3, dtype=torch.int64)], 0.5)
        assert expected.error is not None


class TestNothingToClip:
    """What is promised beyond equality with torch: the gradients are not written."""

    @pytest.fixture
    def multiplied(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        calls: list[int] = []
        multiply = torch_private.foreach_mul_

        def spy(gradients: list[Tensor], factor: Tensor) -> None:
            calls.append(len(gradients))
            multiply(gradients, factor)

        monkeypatch.setattr(torch_private, "foreach_mul_", spy)
        return calls

    @pytest.mark.parametrize("foreach", [None, True, False])
    @pytest.mark.parametrize(
        ("ratio", "writes"), [(1e3, []), (1.5, []), (1.0001, []), (1.0, [3]), (0.5, [3])]
    )
    def test_gradients_are_not_multiplied(
        self, ratio: float, writes: list[int], foreach: bool | None, multiplied: list[int]
    ) -> None:
        parameters = [parameter(g) for g in three()]
        norm = clip_grad_norm_(parameters, inf, foreach=foreach).item()
        clip_grad_norm_(parameters, ratio * norm, foreach=foreach)
        assert multiplied == writes

    def test_nor_where_the_coefficient_is_one(self, multiplied: list[int]) -> None:
        power_of_two = torch.tensor([2.0**24])  # to which 1e-6 adds nothing
        clip_grad_norm_(parameter(power_of_two), 2.0**24)
        assert not multiplied

    def test_nor_where_they_are_not_contiguous(self, multiplied: list[int]) -> None:
        [grad] = normals((8, 8))
        clip_grad_norm_([parameter(grad.t()), parameter(grad[:, ::2])], 1e3)
        assert not multiplied

    @pytest.mark.parametrize("ratio", [1e3, 1.5, 0.5])
    def test_versions_rise_all_the_same(self, ratio: float) -> None:
        parameters = [parameter(g) for g in three()]
        norm = clip_grad_norm_(parameters, inf).item()
        before = [p.grad._version for p in parameters]
        clip_grad_norm_(parameters, ratio * norm)
        assert [p.grad._version for p in parameters] == [v + 1 for v in before]

    @pytest.mark.parametrize(
        "function", [clip_grad_norm_, torch_clip_grad_norm_], ids=["ours", "torch"]
    )
    def test_autograd_notices_the_change(self, function: Callable[..., Tensor]) -> None:
        weight = torch.tensor([1.0, 2.0], requires_grad=True)
        [weight.grad] = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
        penalty = (weight.grad**2).sum()
        norm = function([weight], 1e3)
        assert not norm.requires_grad
        assert torch.is_grad_enabled()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty.backward()


class TestLong:
    """Above the limit the norm is closer to the truth than torch's; the rest is equal."""

    @pytest.fixture(autouse=True)
    def _lower_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gradient_norms, "_LONG", LONG)

    def test_the_limit_leaves_weights_of_1024_hidden_units_alone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        [grad] = normals((4 * 1024, 1024))
        assert clip_grad_norm_(parameter(grad), inf) == torch._foreach_norm([grad])[0]

    @pytest.mark.parametrize("numel", [LONG + 1, LONG + 2**14, 3 * LONG + 12345])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_norm_is_at_least_as_accurate(self, dtype: torch.dtype, numel: int) -> None:
        [grad] = normals((numel,), dtype=dtype)
        truth = math.sqrt(math.fsum((grad.double() ** 2).tolist()))
        norm = clip_grad_norm_(parameter(grad.clone()), inf)
        theirs = torch_clip_grad_norm_(parameter(grad.clone()), inf)
        assert norm.dtype == dtype
        assert norm.shape == ()
        resolution = 2 * torch.finfo(dtype).eps * truth
        assert abs(norm.item() - truth) <= resolution
        assert abs(norm.item() - truth) <= abs(theirs.item() - truth) + resolution

    @pytest.mark.parametrize("foreach", [None, False])
    def test_the_bits_of_torch_up_to_the_limit(self, foreach: bool | None) -> None:
        [grad] = normals((LONG,))
        norms = [
            function(parameter(grad.clone()), 1.0, foreach=foreach)
            for function in (clip_grad_norm_, torch_clip_grad_norm_)
        ]
        assert torch.equal(*norms)

    @pytest.mark.parametrize("foreach", [None, False])
    def test_among_short_ones_and_scaled(self, foreach: bool | None) -> None:
        long, other = normals((LONG // 64, 65), (513, 512))
        gradients = [*three(), long, other.t(), torch.ones(3, dtype=torch.float64)]
        parameters = [parameter(g.clone()) for g in gradients]
        norm = clip_grad_norm_(parameters, 0.5, foreach=foreach)
        flat = torch.cat([g.flatten().double() for g in gradients])
        torch.testing.assert_close(norm, flat.norm(), rtol=2e-5, atol=0.0)
        for p, g in zip(parameters, gradients):
            assert torch.equal(p.grad, g * (0.5 / (norm + 1e-6)))

    @pytest.mark.parametrize("value", [nan, inf])
    @pytest.mark.parametrize("place", [0, LONG + 4])
    def test_non_finite_anywhere(self, place: int, value: float) -> None:
        grad = torch.zeros(LONG + 5)
        grad[place] = value
        norm = clip_grad_norm_(parameter(grad), 1.0)
        torch.testing.assert_close(norm, torch.tensor(value), equal_nan=True)
        assert grad[place].isnan()  # inf * 0

    def test_does_not_depend_on_the_number_of_threads(self) -> None:
        [grad] = normals((2 * LONG + 77,))
        norms = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            norms.append(clip_grad_norm_(parameter(grad.clone()), inf))
        assert torch.equal(*norms)

    @pytest.mark.parametrize("norm_type", [1.0, inf])
    def test_other_norms_are_torchs(self, norm_type: float) -> None:
        [grad] = normals((LONG + 5,))
        norms = [
            function(parameter(grad.clone()), 1.0, norm_type)
            for function in (clip_grad_norm_, torch_clip_grad_norm_)
        ]
        assert torch.equal(*norms)

    def test_not_contiguous_is_torchs(self) -> None:
        [grad] = normals((513, 512))
        norms = [
            function(parameter(grad.clone().t()), 1.0)
            for function in (clip_grad_norm_, torch_clip_grad_norm_)
        ]
        assert torch.equal(*norms)


class Subclass(torch.Tensor):
    """A tensor subclass as a user might write it."""


class TestTorchsOwnFunction:
    """What torch's function does whole."""

    @pytest.fixture
    def delegated(self, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        calls: list[object] = []

        def spy(parameters: object, *arguments: object) -> Tensor:
            calls.append(parameters)
            return torch_clip_grad_norm_(parameters, *arguments)

        monkeypatch.setattr(clip, "_torch_clip_grad_norm_", spy)
        return calls

    @pytest.mark.parametrize("foreach", [None, True, False])
    @pytest.mark.parametrize("error_if_nonfinite", [False, True])
    @pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
    def test_another_device(
        self,
        mixed: bool,
        error_if_nonfinite: bool,
        foreach: bool | None,
        delegated: list[object],
    ) -> None:
        def make() -> list[Tensor]:
            return [torch.ones(3, device="meta"), *three()[: int(mixed)]]

        assert_as_torch(make, 0.5, 2.0, error_if_nonfinite, foreach)
        assert len(delegated) == 1

    @pytest.mark.parametrize("foreach", [None, True, False])
    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    def test_a_subclass(
        self, max_norm: float, foreach: bool | None, delegated: list[object]
    ) -> None:
        def make() -> list[Tensor]:
            return [*three(), torch.ones(3).as_subclass(Subclass)]

        def wrap(parameters: list[Tensor]) -> Iterable[Tensor]:
            return (p for p in parameters)  # torch must see what the generator yielded

        assert_as_torch(make, max_norm, foreach=foreach, wrap=wrap)
        assert len(delegated) == 1

    def test_plain_ones_are_not(self, delegated: list[object]) -> None:
        assert_as_torch(three, 0.5)
        assert not delegated

    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    def test_under_compile_in_one_graph(self, max_norm: float) -> None:
        def step(parameters: list[Tensor]) -> Tensor:
            return clip_grad_norm_(parameters, max_norm)

        compiled = torch.compile(step, fullgraph=True, backend="eager")
        expected = outcome(torch_clip_grad_norm_, three(), max_norm)
        result = outcome(compiled, three())
        assert (result.error, result.result) == (None, expected.result)
        assert result.gradients == expected.gradients


class TestKernel:
    """The seam to the Triton kernel, with a launcher of the same signature in its place."""

    @pytest.fixture
    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
        calls: list[dict[str, object]] = []

        def clip_gradients(
            grads: list[Tensor],
            max_norm: float,
            norm_type: float,
            *,
            scale: bool = True,
            zero_nonfinite: bool = False,
            spare_nonfinite: bool = False,
            norm_dtype: torch.dtype | None = None,
            ring: object = None,
        ) -> tuple[Tensor, Tensor, Tensor]:
            calls.append({"scale": scale, "zero_nonfinite": zero_nonfinite, "dtype": norm_dtype})
            norms = torch.stack([g.norm(norm_type) for g in grads])
            total_norm = norms.norm(norm_type)
            coefficient = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
            if scale:
                torch._foreach_mul_(grads, coefficient)
            return total_norm, coefficient, norms

        kernel = types.SimpleNamespace(clip_gradients=clip_gradients, Ring=Ring)
        monkeypatch.setattr(gradient_norms, "_kernel_module", lambda: kernel)
        monkeypatch.setattr(gradient_norms, "can_run_kernel", lambda grads, norm_type: None)
        monkeypatch.setattr(clip, "cpu_groups", lambda grads: None)
        return calls

    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    def test_clips_in_one_launch(self, max_norm: float, launches: list[dict[str, object]]) -> None:
        assert_as_torch(three, max_norm)
        assert launches == [{"scale": True, "zero_nonfinite": False, "dtype": None}]

    @pytest.mark.parametrize("value", [1.0, nan, inf])
    def test_an_error_comes_before_the_scaling(
        self, value: float, launches: list[dict[str, object]]
    ) -> None:
        assert_as_torch(lambda: [*three(), torch.tensor([value])], 0.5, error_if_nonfinite=True)
        assert [launch["scale"] for launch in launches] == [False]

    def test_the_clipper_passes_its_options_on(self, launches: list[dict[str, object]]) -> None:
        parameters = [parameter(g) for g in three()]
        clipper = GradientClipper(parameters, 1.0, nonfinite="zero", norm_dtype=torch.float32)
        clipper.clip()
        assert launches == [{"scale": True, "zero_nonfinite": True, "dtype": torch.float32}]

    def test_where_it_cannot_be_launched_torchs_operations_run_and_say_so(
        self,
        launches: list[dict[str, object]],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise CannotLaunch("the grid is too large")

        kernel = types.SimpleNamespace(clip_gradients=refuse)
        monkeypatch.setattr(gradient_norms, "_kernel_module", lambda: kernel)
        with caplog.at_level("INFO"):
            assert_as_torch(three, 0.5)
        assert "torch's operations: the grid is too large" in caplog.text

    def test_a_launch_that_is_refused_is_warned_of_and_tried_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        kernel = mock.MagicMock()
        kernel.__getitem__.return_value.side_effect = RuntimeError("Failed to find C compiler.")
        monkeypatch.setattr(gradient_norm, "gradient_norm_kernel", kernel)
        monkeypatch.setattr(gradient_norm, "_cannot_run_on", lambda device: None)
        monkeypatch.setattr(trust, "_needs_trust", lambda device: True)
        monkeypatch.setattr(gradient_norms, "can_run_kernel", gradient_norm.can_run)
        monkeypatch.setattr(clip, "cpu_groups", lambda grads: None)
        trust.forget()
        try:
            for _ in range(3):
                assert_as_torch(three, 0.5)
                GradientClipper([parameter(g) for g in three()], 0.5).clip()
        finally:
            trust.forget()
        assert kernel.__getitem__.return_value.call_count == 1
        assert caplog.text.count("Failed to find C compiler") == 1

    def test_says_why_it_does_not_run_here(self) -> None:
        reason = gradient_norms.can_run_kernel(three(), 2.0)
        assert reason is not None
        assert "CUDA" in reason

    def test_without_triton_the_reason_is_the_import_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "fastrnn_kernels.gradient_norm", None)
        reason = gradient_norms._kernel_module.__wrapped__()
        assert reason.startswith("the kernel cannot be imported")


@st.composite
def gradient(draw: st.DrawFn) -> Callable[[], Tensor]:
    """A way to make the same gradient again: dtype, shape, magnitude, special values, layout."""
    dtype = draw(st.sampled_from([*FLOATS, torch.float32, torch.complex64]))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 17, 65]), max_size=3))
    scale = 10.0 ** draw(st.sampled_from([-45, -39, -20, -8, -6, -3, 0, 0, 0, 2, 4, 18, 30, 37]))
    special = draw(st.sampled_from([None, None, None, 0.0, -0.0, 1e-45, 6e4, inf, nan]))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    seed = draw(st.integers(0, 2**16))

    def make() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        if special is not None and values.numel():
            values.view(-1)[-1] = special
        values = values.to(dtype)
        if layout == "transposed":
            return values.transpose(0, -1).contiguous().transpose(0, -1) if shape else values
        if layout == "strided":
            return torch.stack((values, values), dim=-1)[..., 0]
        return values

    return make


@given(
    makers=st.lists(gradient(), min_size=1, max_size=6),
    norm_type=st.sampled_from([2.0, 2.0, 2.0, 1.0, inf, 3.0, 0.0]),
    ratio=st.one_of(
        st.sampled_from([0.0, 0.999999, 1.0, 1.0000001, 1.000001, 1.001, 1.9, 2.0, 2.1, 1e3]),
        st.floats(0.0, 4.0),
    ),
    offset=st.sampled_from([0.0, 1e-6, 1e-5, 1.0]),
    error_if_nonfinite=st.booleans(),
    foreach=st.sampled_from([None, True, False]),
)
def test_whatever_the_gradients(
    makers: list[Callable[[], Tensor]],
    norm_type: float,
    ratio: float,
    offset: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
) -> None:
    def make() -> list[Tensor]:
        return [maker() for maker in makers]

    try:
        norm = torch_clip_grad_norm_([parameter(g) for g in make()], 1.0, norm_type).item()
    except RuntimeError:  # the inf norm of nothing
        norm = 1.0
    assert_as_torch(make, ratio * norm + offset, norm_type, error_if_nonfinite, foreach)
