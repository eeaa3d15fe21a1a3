"""What the comparison of layouts notices."""

import pytest
import torch
from torch import Tensor

from tests.differential.layout import Layout, copies

X, PADDED, DENSE = torch.zeros(4, 6), torch.zeros(4, 8), torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("values", "right", "says"),
    [
        ([PADDED, PADDED[:, :6]], [[PADDED, DENSE]],
         ["result 1 has the strides [8, 1], not [6, 1]", "results 0 and 1 overlap in memory"]),
        ([X, X[1:].clone()], [[X, X[1:]]], ["result 1 begins at element 0 of its storage, not 6",
                                            "results 0 and 1 don't overlap in memory any more"]),
        ([DENSE.t()], [[torch.zeros(6, 4)], [X.t()]], []),
    ],
    ids=["a slice of a padded tensor", "a copy of what was a view", "one of two right layouts"],
)  # fmt: skip
def test_another_layout_is_told(values: list[Tensor], right: list[list[Tensor]], says: list[str]) -> None:
    assert [*Layout.of(values).differences(*map(Layout.of, right))] == says


def test_parts_that_share_a_storage_and_no_element_of_a_range_do_not_overlap() -> None:
    assert not Layout.of([X[:2], X[2:]]).overlapping
    assert Layout.of([X[:, :3], X[:, 3:]]).overlapping == {(0, 1)}


def test_copies_share_memory_among_themselves_and_not_with_what_they_are_of() -> None:
    x = torch.zeros(4, 6)
    values = [x, x[:, :3], x[:, :3]]
    copied = copies(values)
    assert Layout.of(copied) == Layout.of(values)
    copied[0].fill_(1.0)
    assert float(copied[1].sum()) == 12
    assert not x.any()
