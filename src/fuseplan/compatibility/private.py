"""Every private interface of torch that fuseplan uses. A test compares the list with the source."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateApi:
    """Something of torch that may move or change without notice.

    Attributes:
        path: `module:attribute`, as entry points are written. Attributes that only instances have are listed below
            their class.
        users: the rooms of fuseplan that use it; for `compilation.floats`, which is optional, the module.
        args: the number of positional arguments that it is called with; None: it isn't called.
        keywords: the arguments that it is called with by name.
    """

    path: str
    users: tuple[str, ...]
    args: int | None = None
    keywords: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module to import."""
        return self.path.partition(":")[0]

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes that lead from the module to it."""
        return tuple(self.path.partition(":")[2].split("."))

    @property
    def dotted(self) -> str:
        """The path as in Python code."""
        return self.path.replace(":", ".")


ASIDE = frozenset({"integrations", "measurement", "testing", "workloads"})
"""Rooms that build workloads for the command line, measure, or check rules for those who write them. `fuseplan.compile`
does without."""

OPTIONAL = frozenset({"compilation.floats"})
"""Modules without which fuseplan fuses less, and says so in its reports."""

FLOATS = (
    PrivateApi("torch._dynamo.exc:TensorifyScalarRestartAnalysis", ("compilation.floats",), 0),
    PrivateApi("torch._dynamo.symbolic_convert:TensorifyState.force_specializations", ("compilation.floats",)),
    PrivateApi("torch._dynamo.symbolic_convert:TensorifyState.specialize", ("compilation.floats",), 1),
)

DYNAMO = (
    PrivateApi("torch._dynamo:OptimizedModule", ("compilation",)),
    PrivateApi("torch._dynamo:OptimizedModule._initialize", ("compilation",), 0),
    PrivateApi("torch._dynamo.config:accumulated_recompile_limit", ("compilation",)),
    PrivateApi("torch._dynamo.config:assume_static_by_default", ("rules",)),
    PrivateApi("torch._dynamo.config:disable", ("frontend",)),
    PrivateApi("torch._dynamo.config:patch", ("compilation", "explanation", "measurement"), 0,
               ("recompile_limit", "run_gc_after_compile")),
    PrivateApi("torch._C:_len_torch_dispatch_stack", ("providers",), 0),
    PrivateApi("torch.autograd.profiler:_is_profiler_enabled", ("providers",)),
    PrivateApi("torch._C._dynamo:guards", ("providers",)),
    PrivateApi("torch.nn.attention:_cur_sdpa_kernel_backends", ("caching",), 0, ("with_priority",)),
    PrivateApi("torch._dynamo.config:recompile_limit", ("compilation", "measurement")),
    PrivateApi("torch._dynamo.config:run_gc_after_compile", ("explanation",)),
    PrivateApi("torch._dynamo:maybe_mark_dynamic", ("explanation",), 2),
    PrivateApi("torch._dynamo:reset", ("explanation", "measurement"), 0),
    PrivateApi("torch._dynamo.output_graph:GraphCompileReason", ("explanation",)),
    PrivateApi("torch._dynamo.output_graph:GraphCompileReason.reason", ("explanation",)),
    PrivateApi("torch._dynamo.output_graph:GraphCompileReason.user_stack", ("explanation",)),
    PrivateApi("torch._dynamo.utils:counters", ("explanation",)),
    PrivateApi("torch._dynamo.utils:graph_break_reasons", ("explanation",)),
    PrivateApi("torch._functorch.config:enable_autograd_cache", ("explanation",)),
    PrivateApi("torch._functorch.config:enable_remote_autograd_cache", ("explanation",)),
    PrivateApi("torch._functorch.config:patch", ("explanation",), 0,
               ("enable_autograd_cache", "enable_remote_autograd_cache")),
    PrivateApi("torch._guards:CompileContext.current_compile_id", ("compilation.floats",), 0),
    PrivateApi("torch._guards:detect_fake_mode", ("explanation", "graph"), 1),
    PrivateApi("torch._guards:TracingContext.try_get", ("frontend",), 0),
    PrivateApi("torch._guards:tracing", ("frontend",), 1),
    PrivateApi("torch._logging._internal:trace_structured", ("report",), 1,
               ("metadata_fn", "payload_fn", "expect_trace_id")),
    PrivateApi("torch._logging._internal:warning_once", ("caching", "compilation", "planner"), 2),
)  # fmt: skip

INDUCTOR = (
    PrivateApi("torch:_TorchCompileInductorWrapper", ("frontend",), 3),
    PrivateApi("torch:_TorchCompileInductorWrapper.__call__", ("frontend",), 2),
    PrivateApi("torch:_TorchCompileInductorWrapper.config", ("frontend",)),
    PrivateApi("torch._inductor:compile", ("measurement",), 2, ("options",)),
    PrivateApi("torch._inductor:list_mode_options", ("compatibility", "frontend"), 2),
    PrivateApi("torch._inductor.compile_fx:_recursive_post_grad_passes", ("explanation",), 1, ("is_inference",)),
    PrivateApi("torch._inductor.compile_fx:compile_fx", ("explanation",), 2, ("inner_compile",)),
    PrivateApi("torch._inductor.config:fx_graph_cache", ("explanation",)),
    PrivateApi("torch._inductor.config:fx_graph_remote_cache", ("explanation",)),
    PrivateApi("torch._inductor.config:patch", ("compilation", "explanation"), 0, ("post_grad_custom_post_pass",)),
    PrivateApi("torch._inductor.config:post_grad_custom_post_pass", ("compilation", "explanation")),
    PrivateApi("torch._inductor.config:save_config_portable", ("caching",), 0),
    PrivateApi("torch._inductor.custom_graph_pass:CustomGraphPass", ("caching", "compilation")),
    PrivateApi("torch._inductor.custom_graph_pass:CustomGraphPass.__call__", ("caching",), 1),
    PrivateApi("torch._inductor.custom_graph_pass:CustomGraphPass.uuid", ("caching",), 0),
    PrivateApi("torch._inductor.inductor_prims:force_stride_order", ("rewriting",), 2),
    PrivateApi("torch._inductor.ir:FallbackKernel.codegen_args", ("rewriting",), 0),
    PrivateApi("torch._inductor.ir:FallbackKernel.create", ("rewriting",), 1),
    PrivateApi("torch._inductor.ir:FallbackKernel.get_kernel_name", ("rewriting",), 0),
    PrivateApi("torch._inductor.ir:IRNode", ("rewriting",)),
    PrivateApi("torch._inductor.ir:TensorBox.create", ("rewriting",), 1),
    PrivateApi("torch._inductor.lowering:lowerings", ("rewriting",)),
    PrivateApi("torch._inductor.lowering:make_fallback", ("rewriting",), 1, ("layout_constraint", "warn")),
    PrivateApi("torch._inductor.lowering:tag_to_layout_constraint", ("rewriting",), 1),
    PrivateApi("torch._library.utils:get_layout_constraint_tag", ("rewriting",), 1, ("with_default",)),
    PrivateApi("torch._inductor.fx_passes.post_grad:view_to_reshape", ("explanation",), 1),
    PrivateApi("torch._inductor.runtime.cache_dir_utils:cache_dir", ("caching", "planner", "verification"), 0),
    PrivateApi("torch._inductor.virtualized:V.aot_compilation", ("compilation",)),
    PrivateApi("torch._inductor.virtualized:V.graph", ("rewriting",)),
    PrivateApi("torch._inductor.virtualized:V.set_fake_mode", ("explanation",), 1),
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
        "Match.args", "Match.kwargs", "Match.nodes", "Match.output_nodes", "Match.replacement_graph",
        "MatchContext.pattern_to_node",
        "MultiOutputPattern.outputs", "PatternEntry", "PatternEntry.extra_check", "PatternEntry.pattern", "PatternExpr",
        "PatternMatcherPass", "PatternMatcherPass.pass_name", "PatternMatcherPass.patterns", "ReplacementPatternEntry",
        "ReplacementPatternEntry.normalize_args",
    )),
)  # fmt: skip

GRAPHS = (
    PrivateApi("torch.fx:Graph._find_nodes_lookup_table", ("graph",)),
    PrivateApi("torch.fx:Graph._graph_namespace", ("graph",)),
    PrivateApi("torch.fx:Graph._len", ("graph",)),
    PrivateApi("torch.fx:Graph._root", ("graph",)),
    PrivateApi("torch.fx:Graph._target_to_str", ("graph",), 1),
    PrivateApi("torch.fx.graph:_Namespace._obj_to_name", ("graph",)),
    PrivateApi("torch.fx.graph:_Namespace._used_names", ("graph",)),
    PrivateApi("torch.fx:Node._erased", ("graph", "matching", "rewriting")),
    PrivateApi("torch.fx:Node._input_nodes", ("graph",)),
    PrivateApi("torch.fx:Node._remove_from_list", ("graph",), 0),
    PrivateApi("torch.fx:Node._sort_key", ("matching", "planner")),
    PrivateApi("torch.fx:Node._update_args_kwargs", ("graph",), 2),
    PrivateApi("torch.fx.experimental.symbolic_shapes:DimDynamic.DUCK", ("testing",)),
    PrivateApi("torch.fx.experimental.symbolic_shapes:DimDynamic.STATIC", ("testing",)),
    PrivateApi("torch.fx.experimental.symbolic_shapes:ShapeEnv", ("testing", "workloads"), 0),
    PrivateApi("torch.fx.experimental.symbolic_shapes:ShapeEnv.bound_sympy", ("planner", "verification"), 1),
    PrivateApi("torch.fx.experimental.symbolic_shapes:ShapeEnv.replace", ("planner", "verification"), 1),
    PrivateApi("torch.fx.experimental.symbolic_shapes:StatelessSymbolicContext", ("testing",), 0, ("dynamic_sizes",)),
    PrivateApi("torch.fx.experimental.symbolic_shapes:statically_known_true", ("graph",), 1),
    PrivateApi("torch._subclasses.fake_tensor:FakeTensor", ("graph",), 3),
    PrivateApi("torch._subclasses.fake_tensor:FakeTensor.fake_mode", ("graph",)),
    PrivateApi("torch._subclasses.fake_tensor:FakeTensorMode", ("testing", "verification", "workloads"), 0,
               ("shape_env", "allow_non_fake_inputs")),
    PrivateApi("torch._subclasses.fake_tensor:FakeTensorMode.from_tensor", ("testing", "verification"), 1,
               ("symbolic_context",)),
    PrivateApi("torch._subclasses.fake_tensor:in_kernel_invocation_manager", ("graph",), 1),
    PrivateApi("torch.utils._mode_utils:no_dispatch", ("graph",), 0),
    PrivateApi("torch.utils._python_dispatch:TorchDispatchMode", ("providers", "verification"), 0),
    PrivateApi("torch.utils._python_dispatch:TorchDispatchMode.__torch_dispatch__", ("providers", "verification"), 4),
    PrivateApi("torch.utils._pytree:tree_leaves", ("graph", "rewriting", "verification"), 1),
    PrivateApi("torch.utils._pytree:tree_map", ("verification",), 2),
)  # fmt: skip

OPS = (
    PrivateApi("torch._C:DispatchKey", ("verification",)),
    PrivateApi("torch._C:DispatchKeySet", ("verification",), 1),
    PrivateApi("torch._higher_order_ops.auto_functionalize:auto_functionalized_dense", ("verification",), 1),
    PrivateApi("torch._higher_order_ops.auto_functionalize:auto_functionalized_v2_dense", ("verification",), 1),
    PrivateApi("torch._ops:HigherOrderOperator", ("explanation", "graph", "verification")),
    PrivateApi("torch._ops:HigherOrderOperator.name", ("graph",), 0),
    PrivateApi("torch._ops:OpOverload",
               ("caching", "explanation", "graph", "matching", "measurement", "planner", "rules", "verification")),
    PrivateApi("torch._ops:OpOverload._schema",
               ("caching", "graph", "rewriting", "rules", "verification")),
    PrivateApi("torch._ops:OpOverload.is_view", ("graph", "planner")),
    PrivateApi("torch._ops:OpOverload.namespace", ("graph", "planner", "verification")),
    PrivateApi("torch._ops:OpOverload.redispatch", ("verification",), 1),
    PrivateApi("torch._ops:OpOverload.tags", ("graph", "measurement", "planner", "verification")),
    PrivateApi("torch:UntypedStorage._cdata", ("graph",)),
    PrivateApi("torch:ops.aten._foreach_add.Scalar", ("rewriting",)),
    PrivateApi("torch:ops.aten._unsafe_index_put.default", ("graph",)),
    PrivateApi("torch:ops.aten._scaled_dot_product_cudnn_attention.default", ("rules",)),
    PrivateApi("torch:ops.aten._scaled_dot_product_efficient_attention.default", ("rules",)),
    PrivateApi("torch:ops.aten._scaled_dot_product_flash_attention.default", ("rules",)),
    PrivateApi("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu.default", ("rules",)),
    PrivateApi("torch:ops.aten._scaled_dot_product_fused_attention_overrideable.default", ("rules",)),
    PrivateApi("torch:ops.aten._scaled_mm", ("planner", "rules")),
    PrivateApi("torch:ops.aten._unsafe_view.default", ("graph",)),
    PrivateApi("torch:ops._c10d_functional.all_gather_into_tensor", ("integrations", "workloads")),
    PrivateApi("torch:ops._c10d_functional.all_reduce.default",
               ("graph", "rules", "verification", "workloads")),
    PrivateApi("torch:ops._c10d_functional.all_reduce_coalesced.default", ("graph", "rules")),
    PrivateApi("torch:ops._c10d_functional.reduce_scatter_tensor.default", ("rules",)),
    PrivateApi("torch:ops._c10d_functional.reduce_scatter_tensor_coalesced.default", ("rules",)),
    PrivateApi("torch:ops._c10d_functional.wait_tensor.default",
               ("graph", "integrations", "rules", "verification", "workloads")),
    PrivateApi("torch.distributed._functional_collectives:all_reduce", ("integrations", "workloads"), 3),
    PrivateApi("torch._C._distributed_c10d:Store", ("distributed", "measurement")),
    PrivateApi("torch._C._autograd:DeviceType.CUDA", ("planner",)),
    PrivateApi("torch._C._distributed_c10d:_SymmetricMemory.has_multicast_support", ("planner",), 2),
    PrivateApi("torch.distributed:ProcessGroup._get_backend", ("distributed",)),
    PrivateApi("torch.distributed._symmetric_memory:empty", ("distributed",)),
    PrivateApi("torch.distributed._symmetric_memory:rendezvous", ("distributed",), 2),
    PrivateApi("torch.distributed.distributed_c10d:_world.pg_names", ("caching",)),
    PrivateApi("torch.distributed.distributed_c10d:_get_default_timeout", ("distributed",), 1),
    PrivateApi("torch.distributed.distributed_c10d:_get_process_group_store",
               ("distributed", "integrations", "measurement"), 1),
    PrivateApi("torch.distributed.distributed_c10d:_resolve_process_group",
               ("distributed", "graph", "verification"), 1),
    PrivateApi("torch.testing._internal.distributed.fake_pg:FakeStore", ("workloads",), 0),
)  # fmt: skip

PRIVATE_APIS: tuple[PrivateApi, ...] = (*FLOATS, *DYNAMO, *INDUCTOR, *PATTERN_MATCHER, *GRAPHS, *OPS)
"""All of it."""

TRACED: Mapping[str, tuple[str, ...]] = {
    "custom": ("graph", "matching", "rewriting"),
    "example_value": ("compilation.floats",),
    "nn_module_stack": ("graph", "rewriting"),
    "source_fn_stack": ("graph",),
    "stack_trace": ("graph", "rewriting"),
    "val": ("explanation", "graph", "matching", "measurement", "rewriting", "rules", "testing", "verification"),
}
"""The keys of `Node.meta` that are read, and their readers. Which ones torch writes shows only when it traces a model,
so tests check them, not the import.
"""
