"""Results of fake implementations."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseplan.graph.layout import layout_of, storage_of
from fuseplan.graph.ops import empty
from fuseplan.graph.ops.fakes import slice_of, view_of


def fake_of(mode: FakeTensorMode, kind: str) -> Tensor:
    if kind == "static":
        return mode.from_tensor(torch.empty(6, 8, dtype=torch.bfloat16))
    if kind == "backed":
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * 2)
        return mode.from_tensor(torch.empty(6, 8, dtype=torch.bfloat16), symbolic_context=context)
    assert mode.shape_env is not None
    with mode:
        return torch.empty((mode.shape_env.create_unbacked_symint(), 8), dtype=torch.bfloat16)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("kind", ["static", "backed", "unbacked"])
def test_a_new_fake_is_the_one_that_the_mode_makes(kind: str, dtype: torch.dtype | None, inside: bool) -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    x = fake_of(mode, kind)
    guards = len(environment.guards)
    for shape in (x.shape, (*x.shape[:-1], x.shape[-1] + 4)):
        with mode:
            theirs = x.new_empty(shape, dtype=dtype)
            ours = empty(x, shape, dtype)
        ours = ours if inside else empty(x, shape, dtype)
        assert type(ours) is FakeTensor
        assert ours.fake_mode is mode
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert layout_of(ours) == layout_of(theirs)
        assert len({storage_of(each) for each in (x, ours, theirs)}) == 3
    assert len(environment.guards) == guards


@pytest.mark.parametrize("kind", ["static", "backed", "unbacked"])
def test_a_view_of_a_fake_is_the_one_that_the_mode_makes(kind: str) -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    x, other = fake_of(mode, kind), fake_of(mode, "static")
    assert isinstance(x, FakeTensor)
    theirs = x.t()[1:, :2] if kind == "static" else x[:, 2:]
    guards = len(environment.guards)
    ours = view_of(x, theirs)
    assert type(ours) is FakeTensor
    assert ours.fake_mode is mode
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    assert layout_of(ours) == layout_of(theirs) != layout_of(x)
    assert storage_of(ours) == storage_of(x) != storage_of(other)
    assert len(environment.guards) == guards


@pytest.mark.parametrize("kind", ["static", "turned", "unbacked"])
@pytest.mark.parametrize("bounds", [(0, -3), (2, 5), (-2, 2**63 - 1), (5, 3), (-100, 100), (9, 10)])
def test_a_slice_of_a_fake_is_the_one_that_the_mode_makes(kind: str, bounds: tuple[int, int]) -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    with mode:
        known = torch.empty(6, 8, dtype=torch.bfloat16)
    x = {"static": known, "turned": known.t()[1:, 1:], "unbacked": fake_of(mode, "unbacked")}[kind]
    guards = len(environment.guards)
    for dim in (-1, 1):
        with mode:
            theirs = torch.ops.aten.slice.Tensor(x, dim, *bounds)
        ours = slice_of(x, dim, *bounds)
        assert type(ours) is FakeTensor
        assert ours.fake_mode is mode
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert layout_of(ours) == layout_of(theirs)
        assert storage_of(ours) == storage_of(x)
    assert len(environment.guards) == guards


def test_a_slice_that_only_the_mode_can_make() -> None:
    x = fake_of(FakeTensorMode(shape_env=ShapeEnv()), "backed")
    assert slice_of(x, 0, 0, 2) is slice_of(x, 1, 0, x.shape[1]) is slice_of(x, 1, 0, 2, 2) is slice_of(x, 1) is None
    assert slice_of(torch.zeros(2, 3), 1, 0, 2) is None


def test_of_a_real_tensor_it_is_a_real_one() -> None:
    made = empty(torch.zeros(2, 3), (4,), torch.int32)
    assert type(made) is Tensor
    assert (made.shape, made.dtype, made.device.type) == ((4,), torch.int32, "cpu")
