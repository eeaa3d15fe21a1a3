"""Attention that a model spells out, in post-grad graphs, without the reshapes between three and four dimensions.

scores   = bmm(q, permute(k)) [* scale] [/ cap -> tanh -> * cap] [+ mask] [-> cat(scores, expand(sinks)) [- amax]]
weights  = exp(x - amax(x)) / sum(exp)     x = scores, cast to float32;  or by prims.prepare_softmax_online(x)
y        = bmm(weights, cast back [, without the sinks' column], v)

k and v may be copies of heads that several queries share, as in `fuseplan.rules.parts.attention.spellings`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.noops import is_noop
from fuseplan.graph.canonical.unraised import Unraised, read_elsewhere
from fuseplan.graph.facts import (
    LOW_PRECISION,
    MULS,
    RESHAPES,
    aten,
    convert_element_type,
    dtype_name,
    equal_size,
    equal_sizes,
    is_call,
    other_operand,
    tensor_of,
)
from fuseplan.graph.ops import AttentionRounding
from fuseplan.graph.reach import path_between
from fuseplan.record import Reason
from fuseplan.rules.parts.attention.spellings import HEADS, check_sides, repeated, unrepeated
from fuseplan.rules.parts.eager_attention.op import eager_attention
from fuseplan.rules.parts.eager_attention.softmax import Softmax, maximum_of, softmax_of

FAR = 16
"""The most ops between a product and a softmax that are taken for attention."""

DTYPES = (*LOW_PRECISION, torch.float32)
DIVS = (aten.div.Tensor, aten.div.Scalar)
TRANSPOSED = [0, 1, 3, 2]


@dataclass
class _Scores:
    """The ops on scores up to the softmax.

    Attributes:
        value: the scores, in four dimensions; None: not found yet.
        scale: the product of all numbers that multiply the scores.
        divided: (the scale before, the divisor) of the last op, if it was a division.
        is_capped: whether there was a tanh.
        softcap: the number that multiplies the tanh.
        is_shifted: whether the largest score was subtracted.
        mask: the mask that is added.
        sinks: the sinks, one a head.
        inside: the nodes of these ops.
    """

    value: fx.Node | None = None
    scale: float = 1.0
    divided: tuple[float, float] | None = None
    is_capped: bool = False
    softcap: float | None = None
    is_shifted: bool = False
    mask: fx.Node | None = None
    sinks: fx.Node | None = None
    inside: list[fx.Node] = field(default_factory=list)


def raise_eager_attention(canonical: CanonicalGraph) -> None:
    """Raises attention that is spelled out; a softmax between two products that can't be raised is a near miss."""
    for exp in canonical.calls(aten.exp.default):
        softmax = softmax_of(exp)
        before = path_between(softmax.source, _is_product, "inputs", FAR) if softmax else None
        behind = path_between(softmax.result, _is_product, "users", FAR) if softmax else None
        if softmax is None or before is None or behind is None:
            continue
        try:
            _raise(canonical, softmax, before, behind)
        except Unraised as refused:
            refused.tell(canonical, eager_attention, "attention", at=[before[1]], place=before[1])


def _is_product(node: fx.Node) -> bool:
    return is_call(node, aten.bmm.default)


def _raise(
    canonical: CanonicalGraph, softmax: Softmax, before: tuple[list[fx.Node], fx.Node],
    behind: tuple[list[fx.Node], fx.Node],
) -> None:  # fmt: skip
    first, product = before[1], behind[1]
    scores = _read_scores(first, before[0][::-1])
    assert scores.value is not None
    shape = _value(scores.value).shape
    weights = _read_weights(softmax, behind[0][1:], product, scores)
    q, transposed, v = (_four(*each, shape) for each in ((first, 0), (first, 1), (product, 1)))
    result = _result(product, [*shape[:3], _value(v).shape[3]])
    _check_readers([first, *scores.inside], softmax.inside, "the tensor of scores")
    _check_readers(
        [*softmax.inside, *weights, product], [result], "the tensor of weights", "leave output_attentions out"
    )
    region = [first, *scores.inside, *softmax.inside, *weights, product, result]
    if len({canonical.region[node] for node in region}) > 1:
        raise Unraised(Reason.MUTATION, "an in-place op stands between its products", product)
    dtype = _dtype([q, transposed, v, *(each for each in (scores.mask, scores.sinks) if each is not None)], softmax)
    k, v = _unshared(canonical, _keys(canonical, transposed, first), v)
    rounding = AttentionRounding.FLOAT32 if dtype is torch.float32 else AttentionRounding.EAGER
    arguments = (q, k, v, scores.mask, scores.sinks, scores.scale, scores.softcap, rounding.value)
    canonical.raise_op(eager_attention, arguments, (result,))


def _value(node: object) -> Tensor:
    value = tensor_of(node)
    assert value is not None
    return value


def _dtype(tensors: Sequence[fx.Node], softmax: Softmax) -> torch.dtype:
    """The dtype of all tensors.

    Raises:
        Unraised: they have several, it isn't a dtype of activations, or the softmax isn't computed in float32.
    """
    found = sorted({dtype_name(each) for each in tensors})
    dtype = _value(tensors[0]).dtype
    if len(found) > 1 or dtype not in DTYPES:
        raise Unraised(
            Reason.DTYPE, f"queries, keys, values and terms added to scores are {', '.join(found)}", tensors[0],
            "give them one dtype: bfloat16, float16 or float32",
        )  # fmt: skip
    if _value(softmax.source).dtype is not torch.float32:
        raise Unraised(
            Reason.DTYPE, f"its softmax is computed in {dtype_name(softmax.source)}", softmax.source, "use F.softmax"
        )
    return dtype


# Scores.


def _read_scores(product: fx.Node, steps: Sequence[fx.Node]) -> _Scores:
    """Reads the ops between the first product and the softmax.

    Raises:
        Unraised: one of them is no part of attention.
    """
    scores, last = _Scores(), product
    for step in steps:
        scores.inside.append(step)
        is_cast = is_call(step, convert_element_type) and step is steps[-1] and step.args[1] is torch.float32
        if not (is_cast or _arranged(scores, step) or _scaled(scores, step, last) or _added(scores, step, last)):
            raise Unraised(
                Reason.OP, f"{step.target} stands between its scores and their softmax", step,
                expected="scores scaled by a number, capped by tanh, masked by an addition, joined by sinks",
            )  # fmt: skip
        last = step
    if scores.value is None:
        raise Unraised(Reason.SIZE, "its scores don't have 4 dimensions", product)
    if scores.is_capped and scores.softcap is None:
        raise Unraised(Reason.OP, "the tanh of its scores isn't multiplied by a number", last)
    return scores


def _arranged(scores: _Scores, step: fx.Node) -> bool:
    """Whether a step reshapes three dimensions to four, or does nothing."""
    if scores.value is None and is_call(step, *RESHAPES):
        value, inner = _value(step), _value(step.args[0])
        if value.dim() == 4 and equal_sizes(value.shape[2:], inner.shape[1:]):
            scores.value = step
            return True
    return is_noop(step)


def _scaled(scores: _Scores, step: fx.Node, last: fx.Node) -> bool:
    """Whether a step multiplies scores by a number, divides them by one, or takes their tanh."""
    if scores.value is None or scores.mask or scores.sinks or scores.softcap is not None:
        return False
    if is_call(step, aten.tanh.default):
        already, scores.is_capped = scores.is_capped or scores.is_shifted, True
        return not already
    number = _number(step, last, (*MULS, *DIVS))
    if number is None:
        return False
    if not scores.is_capped:
        divides = step.target in DIVS
        scores.divided = (scores.scale, number) if divides else None
        scores.scale = scores.scale / number if divides else scores.scale * number
        return True
    # cap * tanh(x / cap): the scale is the scale of x.
    before, divisor = scores.divided or (0.0, 0.0)
    scores.scale = before if divisor == number else scores.scale * number
    scores.softcap = number
    return step.target in MULS and number > 0


def _number(step: fx.Node, last: fx.Node, targets: Sequence[Any]) -> float | None:
    """The number by which a step multiplies or divides the result of the one before it; None for any other step."""
    if not is_call(step, *targets) or len(step.args) != 2 or step.kwargs or step.args[0] is not last:
        return None
    number = step.args[1]
    return float(number) if isinstance(number, (int, float)) and number else None


def _added(scores: _Scores, step: fx.Node, last: fx.Node) -> bool:
    """Whether a step adds a mask, appends sinks, or subtracts the largest score."""
    if scores.value is None or (scores.is_capped and scores.softcap is None):
        return False
    shape = _value(scores.value).shape
    if is_call(step, aten.add.Tensor) and len(step.args) == 2 and not step.kwargs and not scores.mask:
        mask = other_operand(step, last)
        if isinstance(mask, fx.Node) and mask is not last and not scores.sinks and _broadcasts(mask, shape):
            scores.mask = mask
            return True
    # Shifting all scores of a query doesn't change the softmax, unless there are sinks beside the scores.
    if is_call(step, aten.cat.default) and not scores.sinks and not scores.is_shifted:
        parts, dim = step.args[0], step.args[1] if len(step.args) > 1 else 0
        if dim % 4 == 3 and len(parts) == 2 and parts[0] is last:
            scores.sinks = _sinks(parts[1], shape)
            return scores.sinks is not None
    if is_call(step, aten.sub.Tensor) and len(step.args) == 2 and not step.kwargs and step.args[0] is last:
        top = maximum_of(step.args[1], last)
        scores.inside += top
        scores.is_shifted = True
        return bool(top)
    return False


def _sinks(node: object, shape: Sequence[Any]) -> fx.Node | None:
    """The sinks [q_heads] that a column of scores is expanded from; None for any other column."""
    if not _broadcasts(node, [*shape[:3], 1]) or tensor_of(node) is None:
        return None
    while isinstance(node, fx.Node) and (is_call(node, aten.expand.default, *RESHAPES) or is_noop(node)):
        node = node.args[0]
        value = _value(node)
        if value.dim() == 1 and isinstance(node, fx.Node):
            return node if equal_size(value.shape[0], shape[HEADS]) else None
        if not equal_sizes(value.shape, [1, shape[HEADS], 1, 1]):
            return None
    return None


def _broadcasts(node: object, shape: Sequence[Any]) -> bool:
    """Whether a tensor, of one dimension at least, broadcasts to a shape."""
    value = tensor_of(node)
    if value is None or not 0 < value.dim() <= len(shape):
        return False
    return all(equal_size(a, b) or equal_size(a, 1) for a, b in zip(value.shape[::-1], shape[::-1], strict=False))


# Weights, and the operands of both products.


def _read_weights(
    softmax: Softmax, steps: Sequence[fx.Node], product: fx.Node, scores: _Scores
) -> Sequence[fx.Node]:  # fmt: skip
    """The nodes between the softmax and the second product.

    Raises:
        Unraised: one of them is no part of attention.
    """
    shape, last, has_column = _value(scores.value).shape, softmax.result, scores.sinks is not None
    for step in steps:
        is_cast = is_call(step, convert_element_type) and step.args[1] is _value(product).dtype
        is_arranged = is_noop(step) or is_cast
        if is_call(step, *RESHAPES) and _value(step).dim() == 3:
            is_arranged = equal_sizes(_value(step).shape[1:], _value(last).shape[2:])
        if has_column and is_call(step, aten.slice.Tensor) and step.args[1:3] == (3, 0) and len(step.args) == 4:
            is_arranged, has_column = equal_sizes(_value(step).shape, shape), False
        if not is_arranged:
            if _is_random(step):
                raise Unraised(Reason.ATTRIBUTE, "it drops some of its weights", step, "call model.eval()")
            raise Unraised(Reason.OP, f"{step.target} stands between its weights and their product with values", step,
                           expected=aten.bmm.default)  # fmt: skip
        last = step
    if product.args[0] is not last:
        raise Unraised(Reason.OP, "its weights aren't a factor of the product with values", product)
    if has_column:
        raise Unraised(Reason.OP, "the sinks' weights are multiplied by values, too", product)
    return steps


def _is_random(step: fx.Node) -> bool:
    """Whether a step reads random numbers."""
    return any(path_between(each, _draws, "inputs", FAR) for each in step.all_input_nodes)


def _draws(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    # Inductor's own op for random numbers has no tag.
    return torch.Tag.nondeterministic_seeded in node.target.tags or node.target.name() == "prims::inductor_random"


def _four(product: fx.Node, place: int, shape: Sequence[Any]) -> fx.Node:
    """An operand of a product, in four dimensions; the first two are the batch and heads of the scores.

    Raises:
        Unraised: it has no such dimensions.
    """
    node: Any = product.args[place]
    while isinstance(node, fx.Node) and (is_noop(node) or (_value(node).dim() == 3 and is_call(node, *RESHAPES))):
        node = node.args[0]
    value = tensor_of(node)
    inner = _value(product.args[place])
    if value is None or value.dim() != 4 or not equal_sizes(value.shape, [*shape[:2], *inner.shape[1:]]):
        raise Unraised(Reason.SIZE, "its other factor doesn't have the scores' batch and heads", product)
    assert isinstance(node, fx.Node)
    return node


def _keys(canonical: CanonicalGraph, transposed: fx.Node, product: fx.Node) -> fx.Node:
    """The keys [batch, heads, keys, head_dim] before their last two dimensions were transposed."""
    if is_call(transposed, aten.permute.default) and [dim % 4 for dim in transposed.args[1]] == TRANSPOSED:
        node = transposed.args[0]
        while is_noop(node):
            node = node.args[0]
        return node  # type: ignore[no-any-return]
    value = _value(transposed)
    with value.fake_mode if hasattr(value, "fake_mode") else torch.no_grad():
        back = value.permute(TRANSPOSED)
    return canonical.insert_before(product, aten.permute.default, (transposed, TRANSPOSED), back)


def _unshared(canonical: CanonicalGraph, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values before their heads were copied for queries; the copies where those of both differ."""
    sides = repeated(k), repeated(v)
    if sides[0] is None or sides[1] is None:
        return k, v
    try:
        check_sides(sides[0], sides[1])
    except Unraised:
        return k, v
    return unrepeated(canonical, sides[0]), unrepeated(canonical, sides[1])


def _result(product: fx.Node, shape: Sequence[Any]) -> fx.Node:
    """The second product in four dimensions.

    Raises:
        Unraised: it isn't reshaped to four dimensions.
    """
    for user in product.users:
        if is_call(user, *RESHAPES) and equal_sizes(_value(user).shape, shape):
            return user
    raise Unraised(Reason.SIZE, "its result isn't given 4 dimensions", product)


def _check_readers(nodes: Sequence[fx.Node], further: Iterable[fx.Node], what: str, fix: str | None = None) -> None:
    """Refuses values with readers outside of the attention.

    Raises:
        Unraised: one has such a reader.
    """
    inside = {*nodes, *further}
    for node in nodes:
        for reader in node.users:
            if reader not in inside:
                refused = read_elsewhere(reader, node, what)
                refused.fix = fix
                raise refused
