"""Replaces modules of a transformers model by our ops, without a fork of any model's code.

A module is replaced only if its code is, statement by statement, code that we know: the syntax
trees of its ``forward`` and of Llama's (or Gemma's, or Phi-3's) are compared, so a new family gets
what fits it and a changed release gets nothing. Replacements belong to one model instance.

* RMSNorm becomes ``rms_norm``; in decoder layers like Llama's the addition before the second norm
  joins it (``add_rms_norm``).
* A gated SiLU MLP computes gate and up in one product over a merged weight, then ``silu_and_mul``.
* An attention that rotates queries and keys just before it attends leaves that to ``write_kv``.
"""

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from antiphon.kernels.kernel_set import KernelSet
from antiphon.workers.few_rows import linear

Defer = Callable[[Tensor, Tensor], bool]
"""Takes cos and sin ``[1, num_tokens, rotary_dim]``; False: rotate now, nobody will later."""

_ROTATE = "apply_rotary_pos_emb"
_ROTATE_HALF = "rotate_half"


def patch_model(model: nn.Module, kernels: KernelSet, defer: Defer) -> Counter[str]:
    """Replace what is known.

    Args:
        model: In evaluation mode; changed.
        kernels: The ops.
        defer: Asked in every attention that could leave its rotation to ``write_kv``.

    Returns:
        How many modules were replaced, by kind.
    """
    patched: Counter[str] = Counter()
    module: Any
    for module in model.modules():
        kind: Any = type(module)
        if _same_code(kind, modeling_llama.LlamaRMSNorm, "forward"):
            _patch_norm(module, kernels, module.variance_epsilon, unit_offset=False)
            patched["rms_norm"] += 1
        elif _same_code(kind, GemmaRMSNorm, "forward", "_norm"):
            _patch_norm(module, kernels, module.eps, unit_offset=True)
            patched["rms_norm"] += 1
        elif _same_code(kind, modeling_llama.LlamaMLP, "forward") and _is_silu(module.act_fn):
            if _patch_mlp(module, kernels):
                patched["silu_and_mul"] += 1
        elif _same_code(kind, Phi3MLP, "forward") and _is_silu(module.activation_fn):
            _patch_merged_mlp(module, kernels)
            patched["silu_and_mul"] += 1
        elif _same_code(kind, modeling_llama.LlamaDecoderLayer, "forward"):
            norm = module.post_attention_layernorm
            if _same_code(type(norm), modeling_llama.LlamaRMSNorm, "forward"):
                _patch_layer(module, kernels)
                patched["add_rms_norm"] += 1
        elif _rotates_last(kind.forward):
            _patch_rotation(module, defer)
            patched["rotation"] += 1
    return patched


def _patch_norm(module: Any, kernels: KernelSet, eps: float, *, unit_offset: bool) -> None:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return kernels.rms_norm(hidden_states, self.weight, eps, unit_offset)

    module.forward = MethodType(forward, module)


def _patch_mlp(module: Any, kernels: KernelSet) -> bool:
    gate, up = module.gate_proj, module.up_proj
    if type(gate) is not nn.Linear or type(up) is not nn.Linear:
        return False
    weight = torch.cat([gate.weight.data, up.weight.data])
    half = gate.weight.shape[0]
    # The old parameters become views: nothing is held twice, and a state dict is what it was.
    gate.weight.data, up.weight.data = weight[:half], weight[half:]
    bias = None
    if gate.bias is not None and up.bias is not None:
        bias = torch.cat([gate.bias.data, up.bias.data])

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden: Tensor = linear(x, weight, bias)
        out: Tensor = self.down_proj(kernels.silu_and_mul(hidden))
        return out

    module.forward = MethodType(forward, module)
    return True


def _patch_merged_mlp(module: Any, kernels: KernelSet) -> None:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.down_proj(kernels.silu_and_mul(self.gate_up_proj(hidden_states)))
        return out

    module.forward = MethodType(forward, module)


def _patch_layer(module: Any, kernels: KernelSet) -> None:
    norm = module.post_attention_layernorm

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        normed, total = kernels.add_rms_norm(
            attended, hidden_states, norm.weight, norm.variance_epsilon
        )
        out: Tensor = total + self.mlp(normed)
        return out

    module.forward = MethodType(forward, module)


def _patch_rotation(module: Any, defer: Defer) -> None:
    original = type(module).forward
    rotate = original.__globals__[_ROTATE]

    def rotate_later(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if defer(cos, sin):
            return query, key
        rotated: tuple[Tensor, Tensor] = rotate(query, key, cos, sin, unsqueeze_dim)
        return rotated

    # The same code with one other global: the module's own is left as it is for everybody else.
    forward = FunctionType(
        original.__code__,
        {**original.__globals__, _ROTATE: rotate_later},
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    forward.__kwdefaults__ = original.__kwdefaults__
    module.forward = MethodType(forward, module)


def _is_silu(activation: object) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _same_code(kind: Any, known: Any, *methods: str) -> bool:
    return all(
        _code(getattr(kind, method, None)) == _code(getattr(known, method)) for method in methods
    )


def _rotates_last(forward: Any) -> bool:
    """Whether it rotates halves and then only consults the cache before it attends."""
    namespace = getattr(forward, "__globals__", {})
    if _ROTATE not in namespace or hasattr(forward, "__wrapped__"):
        return False
    rotate = inspect.unwrap(namespace[_ROTATE])
    half = rotate.__globals__.get(_ROTATE_HALF)
    if _code(rotate) != _code(inspect.unwrap(modeling_llama.apply_rotary_pos_emb)):
        return False
    if _code(half) != _code(modeling_llama.rotate_half):
        return False
    tree = _tree(forward)
    return tree is not None and _statements_after_rotation(tree) == _llama_statements()


@cache
def _llama_statements() -> tuple[str, ...] | None:
    tree = _tree(modeling_llama.LlamaAttention.forward)
    return None if tree is None else _statements_after_rotation(tree)


def _statements_after_rotation(function: ast.FunctionDef) -> tuple[str, ...] | None:
    """From the rotation to the call of the attention, of which only the tensors count."""
    texts = [ast.unparse(statement) for statement in function.body]
    rotations = [i for i, text in enumerate(texts) if _ROTATE in text]
    calls = [i for i, text in enumerate(texts) if "= attention_interface(" in text]
    if len(rotations) != 1 or len(calls) != 1:
        return None
    call = function.body[calls[0]]
    assert isinstance(call, ast.Assign)
    assert isinstance(call.value, ast.Call)
    tensors = tuple(ast.unparse(argument) for argument in call.value.args[1:4])
    return (*texts[rotations[0] : calls[0]], *tensors)


@cache
def _code(function: Any) -> str | None:
    tree = _tree(function)
    return None if tree is None else ast.dump(tree)


@cache
def _tree(function: Any) -> ast.FunctionDef | None:
    """The function's syntax without names, decorators, annotations and docstring."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (TypeError, OSError):
        return None
    tree = ast.parse(source).body[0]
    if not isinstance(tree, ast.FunctionDef):
        return None
    tree.name, tree.decorator_list, tree.returns = "f", [], None
    for argument in ast.walk(tree):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    first = tree.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        tree.body = tree.body[1:]
    return tree
