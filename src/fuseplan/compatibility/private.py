"""Every private interface of torch that fuseplan uses. A test holds the list against the source."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateApi:
    """Something of torch that may move or change without notice.

    Attributes:
        path: `module:attribute`, as entry points are written. What only instances have stands below their class.
        users: the parts of fuseplan that use it.
        args: how many arguments it is called with by position; None: it isn't called.
        keywords: the arguments that it is called with by name.
    """

    path: str
    users: tuple[str, ...]
    args: int | None = None
    keywords: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """What is imported."""
        return self.path.partition(":")[0]

    @property
    def attributes(self) -> tuple[str, ...]:
        """The way from the module to it."""
        return tuple(self.path.partition(":")[2].split("."))

    @property
    def dotted(self) -> str:
        """The path as Python code has it."""
        return self.path.replace(":", ".")


ASIDE = frozenset({"benchmark", "integrations", "models", "testing", "tuning", "workloads"})
"""Parts that build workloads for the command line, measure, or check rules for those who write them. `fuseplan.compile`
does without."""

OPTIONAL = frozenset({"floats"})
"""Parts without which fuseplan does less, and says so in its reports."""

FLOATS = (
    PrivateApi("torch._dynamo.exc:TensorifyScalarRestartAnalysis", ("floats",), 0),
    PrivateApi("torch._dynamo.symbolic_convert:TensorifyState.force_specializations", ("floats",)),
    PrivateApi("torch._dynamo.symbolic_convert:TensorifyState.specialize", ("floats",), 1),
)

DYNAMO = (
    PrivateApi("torch._dynamo:OptimizedModule", ("dispatch", "regions")),
    PrivateApi("torch._dynamo:OptimizedModule._initialize", ("dispatch",), 0),
    PrivateApi("torch._dynamo.config:accumulated_recompile_limit", ("regions",)),
    PrivateApi("torch._dynamo.config:assume_static_by_default", ("parts",)),
    PrivateApi("torch._dynamo.config:disable", ("frontend",)),
    PrivateApi("torch._dynamo.config:patch", ("benchmark", "capture", "regions"), 0,
               ("recompile_limit", "run_gc_after_compile")),
    PrivateApi("torch._C:_len_torch_dispatch_stack", ("providers",), 0),
    PrivateApi("torch._C._dynamo:guards", ("providers",)),
    PrivateApi("torch.nn.attention:_cur_sdpa_kernel_backends", ("fingerprint",), 0, ("with_priority",)),
    PrivateApi("torch._dynamo.config:recompile_limit", ("benchmark", "regions")),
    PrivateApi("torch._dynamo.config:run_gc_after_compile", ("capture",)),
    PrivateApi("torch._dynamo:maybe_mark_dynamic", ("capture",), 2),
    PrivateApi("torch._dynamo:reset", ("benchmark", "capture"), 0),
    PrivateApi("torch._dynamo.output_graph:GraphCompileReason", ("capture",)),
    PrivateApi("torch._dynamo.output_graph:GraphCompileReason.reason", ("capture",)),
    PrivateApi("torch._dynamo.output_graph:GraphCompileReason.user_stack", ("capture",)),
    PrivateApi("torch._dynamo.utils:counters", ("capture",)),
    PrivateApi("torch._dynamo.utils:graph_break_reasons", ("capture",)),
    PrivateApi("torch._functorch.config:enable_autograd_cache", ("capture",)),
    PrivateApi("torch._functorch.config:enable_remote_autograd_cache", ("capture",)),
    PrivateApi("torch._functorch.config:patch", ("capture",), 0,
               ("enable_autograd_cache", "enable_remote_autograd_cache")),
    PrivateApi("torch._guards:CompileContext.current_compile_id", ("floats",), 0),
    PrivateApi("torch._guards:detect_fake_mode", ("capture", "graph"), 1),
    PrivateApi("torch._guards:TracingContext.try_get", ("frontend",), 0),
    PrivateApi("torch._guards:tracing", ("frontend",), 1),
    PrivateApi("torch._logging._internal:trace_structured", ("report",), 1,
               ("metadata_fn", "payload_fn", "expect_trace_id")),
    PrivateApi("torch._logging._internal:warning_once", ("debug", "fingerprint", "planner", "store"), 2),
)  # fmt: skip

INDUCTOR = (
    PrivateApi("torch:_TorchCompileInductorWrapper", ("frontend",), 3),
    PrivateApi("torch:_TorchCompileInductorWrapper.__call__", ("frontend",), 2),
    PrivateApi("torch:_TorchCompileInductorWrapper.config", ("frontend",)),
    PrivateApi("torch._inductor:compile", ("tuning",), 2, ("options",)),
    PrivateApi("torch._inductor:list_mode_options", ("fallback", "frontend"), 2),
    PrivateApi("torch._inductor.compile_fx:_recursive_post_grad_passes", ("capture",), 1, ("is_inference",)),
    PrivateApi("torch._inductor.compile_fx:compile_fx", ("capture",), 2, ("inner_compile",)),
    PrivateApi("torch._inductor.config:fx_graph_cache", ("capture",)),
    PrivateApi("torch._inductor.config:fx_graph_remote_cache", ("capture",)),
    PrivateApi("torch._inductor.config:patch", ("capture",), 0, ("post_grad_custom_post_pass",)),
    PrivateApi("torch._inductor.config:post_grad_custom_post_pass", ("capture", "frontend")),
    PrivateApi("torch._inductor.config:save_config_portable", ("store",), 0),
    PrivateApi("torch._inductor.custom_graph_pass:CustomGraphPass", ("fingerprint",)),
    PrivateApi("torch._inductor.custom_graph_pass:CustomGraphPass.__call__", ("fingerprint",), 1),
    PrivateApi("torch._inductor.custom_graph_pass:CustomGraphPass.uuid", ("fingerprint",), 0),
    PrivateApi("torch._inductor.fx_passes.post_grad:view_to_reshape", ("capture",), 1),
    PrivateApi(
        "torch._inductor.runtime.cache_dir_utils:cache_dir", ("fingerprint", "planner", "store", "verification"), 0
    ),
    PrivateApi("torch._inductor.virtualized:V.aot_compilation", ("manager",)),
    PrivateApi("torch._inductor.virtualized:V.set_fake_mode", ("capture",), 1),
)


def _matcher(attribute: str, args: int | None = None, *keywords: str) -> PrivateApi:
    return PrivateApi(f"torch._inductor.pattern_matcher:{attribute}", ("matching",), args, keywords)


PATTERN_MATCHER = (
    _matcher("CallFunction", 2, "_users"),
    _matcher("KeywordArg", 1),
    _matcher("MatchContext", 1, "graph"),
    _matcher("MatchContext.match", 2),
    _matcher("PatternEntry.apply", 3),
    _matcher("PatternExpr.match", 1),
    _matcher("PatternMatcherPass.apply", 1),
    _matcher("is_match", 1),
    *map(_matcher, (
        "CallFunction.args", "CallFunction.fns", "CallFunction.kwargs", "ListOf.pattern", "MULTIPLE", "Match",
        "Match.args", "Match.kwargs", "Match.nodes", "Match.replacement_graph", "MatchContext.pattern_to_node",
        "MultiOutputPattern.outputs", "PatternEntry", "PatternEntry.extra_check", "PatternEntry.pattern", "PatternExpr",
        "PatternMatcherPass", "PatternMatcherPass.pass_name", "PatternMatcherPass.patterns", "ReplacementPatternEntry",
    )),
)  # fmt: skip

GRAPHS = (
    PrivateApi("torch.fx:Graph._graph_namespace", ("graph",)),
    PrivateApi("torch.fx:Graph._root", ("graph",)),
    PrivateApi("torch.fx:Node._erased", ("graph", "matching", "rewriting")),
    PrivateApi("torch.fx:Node._sort_key", ("matching", "planner")),
    PrivateApi("torch.fx.experimental.symbolic_shapes:DimDynamic.DUCK", ("testing",)),
    PrivateApi("torch.fx.experimental.symbolic_shapes:DimDynamic.STATIC", ("testing",)),
    PrivateApi("torch.fx.experimental.symbolic_shapes:ShapeEnv", ("testing", "workloads"), 0),
    PrivateApi("torch.fx.experimental.symbolic_shapes:ShapeEnv.bound_sympy", ("planner",), 1),
    PrivateApi("torch.fx.experimental.symbolic_shapes:StatelessSymbolicContext", ("testing",), 0, ("dynamic_sizes",)),
    PrivateApi("torch.fx.experimental.symbolic_shapes:statically_known_true", ("graph",), 1),
    PrivateApi("torch._subclasses.fake_tensor:FakeTensor", ("graph",)),
    PrivateApi("torch._subclasses.fake_tensor:FakeTensor.fake_mode", ("graph",)),
    PrivateApi("torch._subclasses.fake_tensor:FakeTensorMode", ("testing", "verification", "workloads"), 0,
               ("shape_env", "allow_non_fake_inputs")),
    PrivateApi("torch._subclasses.fake_tensor:FakeTensorMode.from_tensor", ("testing", "verification"), 1,
               ("symbolic_context",)),
    PrivateApi("torch.utils._python_dispatch:TorchDispatchMode", ("providers", "verification"), 0),
    PrivateApi("torch.utils._python_dispatch:TorchDispatchMode.__torch_dispatch__", ("providers", "verification"), 4),
    PrivateApi("torch.utils._pytree:tree_leaves", ("graph", "matching"), 1),
)  # fmt: skip

OPS = (
    PrivateApi("torch._ops:HigherOrderOperator", ("canonical", "estimate", "graph", "verification")),
    PrivateApi("torch._ops:HigherOrderOperator.name", ("graph",), 0),
    PrivateApi("torch._ops:OpOverload",
               ("canonical", "content", "estimate", "graph", "matching", "ops", "planner", "tuning", "verification")),
    PrivateApi("torch._ops:OpOverload._schema",
               ("canonical", "families", "fingerprint", "graph", "ops", "parts", "rewriting", "rules", "verification")),
    PrivateApi("torch._ops:OpOverload.is_view", ("graph", "planner")),
    PrivateApi("torch._ops:OpOverload.namespace", ("canonical", "graph", "planner")),
    PrivateApi("torch._ops:OpOverload.tags", ("graph", "planner", "tuning")),
    PrivateApi("torch:UntypedStorage._cdata", ("graph",)),
    PrivateApi("torch:ops.aten._unsafe_index_put.default", ("graph",)),
    PrivateApi("torch:ops.aten._scaled_dot_product_cudnn_attention.default", ("parts",)),
    PrivateApi("torch:ops.aten._scaled_dot_product_efficient_attention.default", ("parts",)),
    PrivateApi("torch:ops.aten._scaled_dot_product_flash_attention.default", ("parts",)),
    PrivateApi("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu.default", ("parts",)),
    PrivateApi("torch:ops.aten._scaled_dot_product_fused_attention_overrideable.default", ("parts",)),
    PrivateApi("torch:ops.aten._unsafe_view.default", ("graph",)),
    PrivateApi("torch:ops._c10d_functional.all_gather_into_tensor", ("integrations", "models")),
    PrivateApi("torch:ops._c10d_functional.all_reduce.default",
               ("graph", "models", "parts", "verification")),
    PrivateApi("torch:ops._c10d_functional.all_reduce_coalesced.default", ("graph", "parts")),
    PrivateApi("torch:ops._c10d_functional.reduce_scatter_tensor.default", ("parts",)),
    PrivateApi("torch:ops._c10d_functional.reduce_scatter_tensor_coalesced.default", ("parts",)),
    PrivateApi("torch:ops._c10d_functional.wait_tensor.default",
               ("graph", "integrations", "models", "parts", "verification")),
    PrivateApi("torch.distributed._functional_collectives:all_reduce", ("integrations", "models"), 3),
    PrivateApi("torch._C._distributed_c10d:Store", ("distributed", "tuning")),
    PrivateApi("torch.distributed:ProcessGroup._get_backend", ("distributed",)),
    PrivateApi("torch.distributed._symmetric_memory:empty", ("distributed",)),
    PrivateApi("torch.distributed._symmetric_memory:rendezvous", ("distributed",), 2),
    PrivateApi("torch.distributed.distributed_c10d:_world.pg_names", ("fingerprint",)),
    PrivateApi("torch.distributed.distributed_c10d:_get_default_timeout", ("distributed",), 1),
    PrivateApi("torch.distributed.distributed_c10d:_get_process_group_store",
               ("distributed", "integrations", "tuning"), 1),
    PrivateApi("torch.distributed.distributed_c10d:_resolve_process_group",
               ("distributed", "graph", "verification"), 1),
    PrivateApi("torch.testing._internal.distributed.fake_pg:FakeStore", ("workloads",), 0),
)  # fmt: skip

PRIVATE_APIS: tuple[PrivateApi, ...] = (*FLOATS, *DYNAMO, *INDUCTOR, *PATTERN_MATCHER, *GRAPHS, *OPS)
"""All of it."""

TRACED: Mapping[str, tuple[str, ...]] = {
    "custom": ("canonical", "matching", "rewriting"),
    "example_value": ("floats",),
    "nn_module_stack": ("canonical", "graph", "rewriting"),
    "source_fn_stack": ("graph",),
    "stack_trace": ("canonical", "graph", "rewriting"),
    "val": (
        "canonical",
        "estimate",
        "graph",
        "matching",
        "ops",
        "parts",
        "rewriting",
        "testing",
        "tuning",
        "verification",
    ),
}
"""The keys of `Node.meta` that are read, and by whom. Which ones torch writes shows only when it traces a model: tests
look for them, not an import."""
