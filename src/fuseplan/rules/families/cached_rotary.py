"""The fusions of rotary embedding, with or without QK norm, and the writes of keys and values into a static cache."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import dtype_text, equal_size, equal_sizes, hint, tensor_of
from fuseplan.graph.layout import memory_order
from fuseplan.record import Reason, Refusal
from fuseplan.rules.base import Bindings, Rule
from fuseplan.rules.families.compose import fused_as
from fuseplan.rules.families.rotary import HEADS_FIRST, NormedRule, by_norms, normed, refuse_dtypes
from fuseplan.rules.families.sites import Pricer, Shape, Site, Taken
from fuseplan.rules.parts import Core
from fuseplan.rules.parts.cache_write import CACHES, bytes_of, cache_write
from fuseplan.rules.parts.cached_rotary import PART, cached_rotary
from fuseplan.rules.parts.cached_rotary.traffic import CachedRegion
from fuseplan.rules.parts.rms_norm import rms_norm
from fuseplan.rules.parts.traffic import Kernel, Tail

rope_cache = fused_as(cached_rotary, "rope_cache", writes=CACHES)
qk_norm_rope_cache = normed(rope_cache, "qk_norm_rope_cache", by_norms(rope_cache.samples))


class CachedRule(Rule):
    """The refusals of both rules."""

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses matches that the fused op doesn't support: mixed and unsupported dtypes, unknown sizes, other layouts
        of the angles, more tokens than fit into the cache.
        """
        weights = [name for name in ("q_weight", "k_weight") if name in m.values]
        return refuse_dtypes(m, ("k", "v", *CACHES, *weights)) or self._shapes(m)

    def _shapes(self, m: Bindings) -> Refusal | None:
        q, k, cos = self._heads_first(m.q), self._heads_first(m.k), m.cos
        tokens, length = q.shape[2] if q.dim() == 4 else None, m.k_cache.shape[2]
        if not isinstance(tokens, int) or not isinstance(length, int):
            found = f"q is {[*m.q.shape]} and the cache {[*m.k_cache.shape]}"
            detail = f"{found}; the fused op takes numbers of tokens that are known when it is compiled"
            return m.refuse(Reason.SIZE, "q", detail, fix="compile one graph for each number of tokens")
        if tokens > length:
            detail = f"{tokens} tokens are written into a cache of {length}"
            return m.refuse(Reason.SIZE, "k_cache", detail, fix="make the cache longer")
        shapes = {
            "k": (k.shape, (q.shape[0], m.k_cache.shape[1], tokens, q.shape[3])),
            "v": (m.v.shape, (q.shape[0], m.k_cache.shape[1], tokens, m.v_cache.shape[3])),
            "k_cache": (m.k_cache.shape, (*k.shape[:2], length, q.shape[3])),
            "v_cache": (m.v_cache.shape, (*k.shape[:2], length, m.v_cache.shape[3])),
            "positions": (m.positions.shape, (tokens,)),
        }
        for name, (shape, wanted) in shapes.items():
            if not equal_sizes(shape, wanted):
                given = f"{name} is {[*shape]}, where q is {[*m.q.shape]} and k_cache {[*m.k_cache.shape]}"
                return m.refuse(Reason.SIZE, name, f"{given}; the fused op takes {[*wanted]}")
        for name in CACHES:
            if memory_order(getattr(m, name)) is None:
                detail = f"{name} has gaps or overlaps: its strides are {tuple(getattr(m, name).stride())}"
                return m.refuse(Reason.LAYOUT, name, detail, fix="hand over a cache that fills its memory")
        if not _is_one_of_each_token(cos, q):
            detail = f"cos is {[*cos.shape]}; the fused op takes angles of each token, the same for all of its heads"
            return m.refuse(Reason.SIZE, "cos", detail, fix="give cos and sin a dimension of size 1 for the heads")
        return None

    def _heads_first(self, x: Tensor) -> Tensor:
        return x


class NormedCachedRule(CachedRule, NormedRule):
    """The same for queries and keys with a norm before them."""

    def replacement(self, **bound: Any) -> Any:
        return super().replacement(**{**bound, "q": self._moved(bound["q"]), "k": self._moved(bound["k"])})

    def _written(self, bound: Mapping[str, Any]) -> tuple[Any, tuple[Any, Any]]:
        """(queries, caches), rotated and written."""
        q_out, k_out = self._rotated(bound)
        written = cache_write(k_out, *(bound[name] for name in ("v", *CACHES, "positions")))
        return q_out, (written[0], written[1])

    def _heads_first(self, x: Tensor) -> Tensor:
        return x.permute(HEADS_FIRST) if self.transposes and x.dim() == 4 else x


def _is_one_of_each_token(cos: Tensor, q: Tensor) -> bool:
    """Whether angles are [batch or 1, 1, tokens or 1, ...] for queries [batch, heads, tokens, head_dim]."""
    if cos.dim() != 4 or not equal_size(cos.shape[1], 1):
        return False
    return all(equal_size(cos.shape[dim], 1) or equal_size(cos.shape[dim], q.shape[dim]) for dim in (0, 2))


class RopeCache(CachedRule):
    """cached_rotary(q, k, v, k_cache, v_cache, cos, sin)  =>  one kernel that writes the caches in place.

    y = x * cos + cat(-x2, x1) * sin of q and k;   k_cache[:, :, positions] = k,   v_cache[:, :, positions] = v
    """

    name, flags = "rope_cache", ("fuse_rope_cache",)
    op, core = rope_cache, cached_rotary

    def pattern(self, **bound: Any) -> Any:
        written = cached_rotary(*bound.values())
        return written[0], written[1], written[2]


class QkNormRopeCache(NormedCachedRule):
    """rms_norm(q), rms_norm(k) (-> transpose) -> rotary_embedding -> cache_write  =>  one kernel that writes in place.

    y = n * cos + cat(-n2, n1) * sin,   n = rms_norm(x) * weight,   of q and k;   k_cache[:, :, positions] = k, and v
    """

    name, flags = "qk_norm_rope_cache", ("enable_qk_norm_rope_fusion", "fuse_rope_cache")
    op, core = qk_norm_rope_cache, rms_norm

    def pattern(self, **bound: Any) -> Any:
        q_out, caches = self._written(bound)
        return *caches, q_out

    def replacement(self, **bound: Any) -> Any:
        q_out, *caches = super().replacement(**bound)
        return *caches, q_out


@dataclass(frozen=True, kw_only=True)
class CachedRotaryShape(Shape):
    """Everything about a rotation and its writes that prices depend on, at one size.

    Attributes:
        sizes: the sizes of both.
    """

    sizes: CachedRegion

    @property
    def signature(self) -> str:
        """The site without its rows, e.g. `cached_rotary 32+8 heads 128 bfloat16 products`."""
        sizes = self.sizes
        values = "" if sizes.value_width == sizes.width else f", values {sizes.value_width}"
        return f"{self.core.name} {sizes.q_heads}+{sizes.heads} heads {sizes.width}{values} {self.convention}"

    def unfused(self, model: Pricer) -> tuple[Kernel, ...]:
        """The kernels of the unfused site."""
        return self.sizes.unfused(model)

    def fused(self, model: Pricer, provider: str, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The fused op alone."""
        return self.sizes.fused(model, eager=model.timing(provider).eager)

    def within(self, model: Pricer, provider: str, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The cost that `fused` adds to the kernel that reads the queries: these are neither written nor read again."""
        if model.timing(provider).eager:
            return self.fused(model, provider, reduce=reduce, tail=tail)
        (kernel,) = replace(self.sizes, q_heads=0).fused(model, eager=False)
        return (replace(kernel, launch=0),)

    def rest(self, model: Pricer, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The unfused rest of the site behind a fused op: nothing."""
        return ()


@dataclass(frozen=True, eq=False)
class CachedRotarySite(Site):
    """One rotation of queries and keys with the writes into caches."""

    @classmethod
    def at(cls, ordinal: int, core: fx.Node, canonical: CanonicalGraph) -> Self:
        """The site of a core in a graph."""
        return cls(ordinal, core, None, ())

    def shape(self, rows: int) -> CachedRotaryShape:
        """The site at a number of rows of its queries, a row for each head."""
        q, k, v, cos = (tensor_of(self.core.args[index]) for index in (0, 1, 2, 5))
        assert q is not None and k is not None and v is not None and cos is not None
        q_heads = max(1, hint(q.shape[1]))
        sizes = CachedRegion(
            tokens=max(1, rows // q_heads), q_heads=q_heads, heads=hint(k.shape[1]), width=hint(q.shape[3]),
            value_width=hint(v.shape[3]), angles=2 * hint(cos.shape[-1]), itemsize=q.dtype.itemsize,
            cache_bytes=bytes_of(self.core.args[3:5]),
        )  # fmt: skip
        return CachedRotaryShape(
            core=PART.traffic, rows=rows, width=sizes.width, itemsize=sizes.itemsize, sizes=sizes,
            convention=f"{dtype_text(q.dtype)} {self.core.args[8]}",
        )  # fmt: skip

    def taken(self, nodes: Collection[fx.Node]) -> Taken | None:
        """The parts that a fusion takes if it consumes `nodes`; None if they include more than the site."""
        others = {node for node in nodes if node not in self.core.users and node is not self.core}
        return Taken(reduce=False, tail=None) if self.core in nodes and not others else None


CACHED_ROTARY_RULES: tuple[Rule, ...] = (
    RopeCache(),
    QkNormRopeCache(transposes=False),
    QkNormRopeCache(transposes=True),
)
CACHED_ROTARY_SITES: Mapping[Core, type[Site]] = {PART: CachedRotarySite}
