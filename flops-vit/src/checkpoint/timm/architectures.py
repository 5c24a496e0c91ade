"""Writes architectures.json: what timm's names of vision transformers mean.

    pip download timm==1.0.31 --no-deps && unzip timm-*.whl
    python architectures.py timm/models > architectures.json

For every registered name, and every former one, it holds the arguments that the entry point gives
to the constructor and that differ from the constructor's defaults. The source is read, not run: neither torch nor timm is
needed. Two keys are not timm's: `norm_eps`, the ε of the norms where it is not 1e-6, and `class`,
the class where it is not VisionTransformer.
"""

import ast
import functools
import json
import sys
from pathlib import Path

# constructor defaults of timm 1.0.31's VisionTransformer that the names may repeat
DEFAULTS = dict(
    patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4, qkv_bias=True, global_pool="token",
    class_token=True, no_embed_class=False, reg_tokens=0, pre_norm=False, final_norm=True,
)
# arguments that change nothing of a trained model
TRAINING = {"weight_init", "fix_init", "drop_rate", "drop_path_rate", "dynamic_img_size"}
# activations given as classes
ACTIVATIONS = {"SiLU": "silu", "GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}


class Name:
    """Stands for a class or a function of another module."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attr):
        return Name(attr)

    def __call__(self, *args, **kwargs):
        return self


class Globals(dict):
    def __missing__(self, key):
        return Name(key)


def norm(value):
    """Returns the name of a norm, and its ε."""
    if isinstance(value, functools.partial):
        return value.func.name, value.keywords.get("eps")
    return (value, None) if isinstance(value, str) else (value.name, None)


def plain(kwargs, nn_layer_norm):
    """Returns the arguments as JSON has them, without defaults."""
    out = {}
    for key, value in kwargs.items():
        if key in TRAINING or value is None or DEFAULTS.get(key, Name) == value:
            continue
        if key == "norm_layer":
            name, eps = norm(value)
            if name.lower() == "layernorm":
                # torch's own has an ε of 1e-5
                eps = eps or (1e-5 if value in nn_layer_norm else 1e-6)
                if eps != 1e-6:
                    out["norm_eps"] = eps
                continue
            value = name.lower()
        elif key == "act_layer":
            value = value if isinstance(value, str) else ACTIVATIONS[value.name]
        elif isinstance(value, functools.partial):
            value = value.func.name
        elif isinstance(value, Name):
            value = value.name
        out[key] = value
    return out


def architectures(path):
    """Yields the names that a file registers, with their arguments."""
    tree = ast.parse(path.read_text())
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        if not any(getattr(d, "id", "") == "register_model" for d in function.decorator_list):
            continue
        if path.name not in ("vision_transformer.py", "deit.py"):
            yield function.name, {"class": f"{getattr(function.returns, 'id', 'another')} of {path.name}"}
            continue
        function.decorator_list, function.returns = [], None
        for argument in function.args.args + [function.args.kwarg]:
            argument.annotation = None
        found, nn_norms = [], []

        class Nn(Name):
            def __getattr__(self, attr):
                layer = Name(attr)
                if attr == "LayerNorm":
                    nn_norms.append(layer)
                return layer

        def create(variant, pretrained=False, **kwargs):
            found.append((variant, kwargs))

        names = Globals(
            dict=dict, partial=functools.partial, nn=Nn("nn"),
            _create_vision_transformer=create, _create_deit=create,
        )
        exec(compile(ast.Module([function], []), str(path), "exec"), names)
        names[function.name]()
        [(variant, kwargs)] = found
        assert variant == function.name or path.name == "vision_transformer.py", (variant, function.name)
        yield function.name, plain(kwargs, nn_norms)


def former(path):
    """Yields the former names of a file's architectures, with the present ones."""
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register_model_deprecations":
            for old, new in ast.literal_eval(call.args[1]).items():
                yield old, new and new.split(".")[0]


def main():
    found = {}
    for path in sorted(Path(sys.argv[1]).glob("*.py")):
        whole = path.name in ("vision_transformer.py", "deit.py")
        for name, arguments in architectures(path):
            if whole or name.startswith(("vit_", "deit")):
                found[name] = arguments
        for old, new in former(path):
            if new in found and old.startswith(("vit_", "deit")):
                found[old] = found[new]
    lines = [f"{json.dumps(name)}: {json.dumps(arguments)}" for name, arguments in sorted(found.items())]
    print("{\n" + ",\n".join(lines) + "\n}")


main()
