"""Reads the signatures of the functions that fuseplan calls out of a library's source, for tests/providers/data.

    python -m tests.providers.read_signatures flashinfer 0.6.18.post1 COMMIT FOLDER > tests/providers/data/NAME.json

FOLDER holds the package. Nothing of it is imported.
"""

import ast
import json
import sys
from pathlib import Path

FUNCTIONS = {
    "flashinfer": {
        "flashinfer.comm.allreduce_fusion": "flashinfer/comm/allreduce.py",
        "flashinfer.comm.create_allreduce_fusion_workspace": "flashinfer/comm/allreduce.py",
        "flashinfer.comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion": "flashinfer/comm/trtllm_ar.py",
        "flashinfer.norm.rmsnorm_quant": "flashinfer/norm/__init__.py",
        "flashinfer.norm.fused_add_rmsnorm_quant": "flashinfer/norm/__init__.py",
    },
    "aiter": {
        f"{module}.{name}": f"{module.replace('.', '/')}.py"
        for module, names in {
            "aiter.ops.triton.normalization.fused_add_rmsnorm_pad": ("fused_add_rmsnorm_pad",),
            "aiter.dist.device_communicators.custom_all_reduce": (
                "CustomAllreduce.__init__",
                "CustomAllreduce.close",
                "CustomAllreduce.custom_fused_ar_rms",
                "CustomAllreduce.custom_fused_ar_rms_quant",
            ),
        }.items()
        for name in names
    },
}
CONSTANTS = {"flashinfer": {"flashinfer.comm.AllReduceFusionPattern": "flashinfer/comm/trtllm_ar.py"}, "aiter": {}}


def definition(tree: ast.AST, name: str) -> ast.AST:
    """The class or function of that dotted name."""
    for part in name.split("."):
        body = tree.body if isinstance(tree, (ast.Module, ast.ClassDef)) else []
        tree = next(each for each in body if isinstance(each, (ast.ClassDef, ast.FunctionDef)) and each.name == part)
    return tree


def signature(function: ast.FunctionDef) -> str:
    """Names, kinds and defaults of the parameters; no annotations."""
    for each in ast.walk(function.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    return f"({ast.unparse(function.args)})"


def main() -> None:
    library, version, commit, folder = sys.argv[1:]
    trees = {path: ast.parse((Path(folder) / path).read_text()) for path in {*FUNCTIONS[library].values()}}
    functions, constants = {}, {}
    for name, path in FUNCTIONS[library].items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        local = name.removeprefix(f"{module}.") if name.startswith(f"{module}.") else name.rpartition(".")[2]
        found = definition(trees[path], local)
        assert isinstance(found, ast.FunctionDef), name
        functions[name] = signature(found)
    for name, path in CONSTANTS[library].items():
        found = definition(trees[path], name.rpartition(".")[2])
        assert isinstance(found, ast.ClassDef), name
        constants[name] = {
            each.targets[0].id: ast.literal_eval(each.value)
            for each in found.body
            if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name)
        }
    result = {
        "library": library, "version": version, "commit": commit, "functions": functions, "constants": constants,
    }  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
