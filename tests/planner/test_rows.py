"""How many rows a graph has, of which rules for few rows are on by default."""

import pytest

from fuseplan.planner.rows import most_rows
from tests.cached import BATCH, arguments, attending, layer, visible
from tests.helpers import post_grad


@pytest.mark.parametrize("tokens", [1, 3])
def test_queries_count_where_attention_is_compiled_by_itself(tokens: int) -> None:
    """Its only input of integers holds positions, and nothing is multiplied by a weight."""
    graph = post_grad(attending(layer(read=lambda cache: cache)), *arguments(tokens), visible(5, tokens))
    assert most_rows(graph, None) == BATCH * tokens
    assert most_rows(graph, 1) == BATCH * tokens
