"""What the comparison of layouts notices."""

import torch

from tests.differential.layout import Layout, copies


def test_a_slice_of_a_padded_tensor_is_no_tensor_of_its_own() -> None:
    padded = torch.zeros(4, 8)
    expected = Layout.of([padded, torch.zeros(4, 6)])
    assert [*Layout.of([padded, padded[:, :6]]).differences(expected)] == [
        "result 1 has the strides [8, 1], not [6, 1]", "results 0 and 1 overlap in memory",
    ]  # fmt: skip


def test_a_copy_of_what_was_a_view_is_noticed() -> None:
    x = torch.zeros(4, 6)
    expected = Layout.of([x, x[1:]])
    assert [*Layout.of([x, x[1:].clone()]).differences(expected)] == [
        "result 1 begins at element 0 of its storage, not 6", "results 0 and 1 don't overlap in memory any more",
    ]  # fmt: skip


def test_parts_that_share_a_storage_and_no_element_of_a_range_do_not_overlap() -> None:
    x = torch.zeros(4, 6)
    assert not Layout.of([x[:2], x[2:]]).overlapping
    assert Layout.of([x[:, :3], x[:, 3:]]).overlapping == {(0, 1)}


def test_what_is_as_in_one_of_two_right_layouts_is_right() -> None:
    dense, turned = torch.zeros(4, 6), torch.zeros(6, 4).t()
    assert not [*Layout.of([turned]).differences(Layout.of([dense]), Layout.of([turned]))]


def test_copies_share_memory_among_themselves_and_not_with_what_they_are_of() -> None:
    x = torch.zeros(4, 6)
    values = [x, x[:, :3], x[:, :3]]
    copied = copies(values)
    assert Layout.of(copied) == Layout.of(values)
    copied[0].fill_(1.0)
    assert float(copied[1].sum()) == 12
    assert not x.any()
