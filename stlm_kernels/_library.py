"""Registration of the Triton implementations as `torch.ops.stlm.*`.

Each pass of an op is one functional dispatcher op under an autograd.Function with `setup_context`:
the design that keeps fullgraph compile, export, FLOP counting, selective checkpointing and
torch.func working. An op supplies a schema, the launcher's address and a Meta function.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import runtime
from ._dispatch import kernels_interpreted
from ._flops import register_flops
from ._launch import is_recording
from ._sharding import register_rows
from ._torch import function
from ._torch.function import Function, Kept

NAMESPACE = "stlm"
_library = torch.library.Library(NAMESPACE, "DEF")
_launchers: dict[Any, Callable[..., Any]] = {}
"""Launchers of registered ops on a device."""


def register(
    schema: str,
    *,
    launcher: str,
    meta: Callable[..., Any],
    flops: Callable[..., int],
    per_row: Sequence[str] = (),
    results: Sequence[str] = (),
) -> Any:
    """Define `stlm::<schema>` and return its default overload.

    Args:
        schema: torch schema text, e.g. "byte_pool_fwd(Tensor ids, ...) -> Tensor".
        launcher: "<op>:<function>" in `ops/<op>/triton_impl.py`, or "<op>.<file>:<function>";
            imported at the first call, so that importing the package never imports triton.
        meta: shapes and dtypes of the results from those of the arguments that its parameters
            name.
        flops: the FLOP formula, likewise; called with shapes in place of tensors.
        per_row, results: for DTensors with divided rows, as in `_sharding.register_rows`; without
            results the op refuses DTensors.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    place, function = launcher.split(":")
    folder, _, file = place.partition(".")

    @functools.cache
    def resolve() -> Callable[..., Any]:
        module = importlib.import_module(f"{__package__}.ops.{folder}.{file or 'triton_impl'}")
        return getattr(module, function)

    def on_cuda(*args: Any) -> Any:
        return resolve()(*args)

    def on_cpu(*args: Any) -> Any:
        if not (kernels_interpreted() or is_recording()):
            raise NotImplementedError(
                f"{NAMESPACE}::{name} is a Triton kernel and its tensors are on cpu: "
                "use impl='torch', or triton's interpreter for testing"
            )
        return resolve()(*args)

    _library.impl(name, on_cuda, "CUDA")
    _library.impl(name, on_cpu, "CPU")
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_fake(f"{NAMESPACE}::{name}", _by_name(meta, overload), lib=_library)
    register_flops(overload.overloadpacket, _by_name(flops, overload))
    if results:
        register_rows(overload, per_row, results)
    _launchers[overload] = on_cuda
    return overload


def launcher_of(op: Any) -> Callable[..., Any]:
    """Return what a registered op runs on a GPU."""
    return _launchers[op]


def direct(op: Any) -> Callable[..., Any]:
    """Make the call of a registered op that goes to its launcher where nothing else would see it.

    The way through torch's dispatcher takes longer than all checks of a call.
    """
    launcher = launcher_of(op)

    def call(*args: Any) -> Any:
        if runtime.is_plain_eager(*args):
            first = next(x for x in args if type(x) in runtime.PLAIN)
            if first.is_cuda or (first.is_cpu and (is_recording() or kernels_interpreted())):
                return launcher(*args)
        return op(*args)

    return call


def _by_name(rule: Callable[..., Any], op: Any) -> Callable[..., Any]:
    """A function of some of an op's arguments as one of all of them."""
    names = names_of(op)
    wanted = list(inspect.signature(rule).parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return rule(*(given[name] for name in wanted))

    return call


def differentiable(
    op: Any,
    *,
    of: Sequence[str],
    keep: Callable[..., Kept] | Sequence[str],
    gradients: Callable[..., Tensor | Sequence[Tensor | None]],
    derived: int = 1,
    fills: bool = True,
    public: str | None = None,
    returned: str | None = None,
) -> type[Function]:
    """Make the Function of a registered op; differentiating its gradients raises.

    Args:
        op: what `register` returned; its schema gives the names.
        public: the public op that errors name, where the schema names another one.
        keep: as in `function.differentiable`, or only names, those of tensors first.
        of, gradients, derived, fills: as there.
        returned: an argument that comes back as the last result, as it is.
    """
    schema = op._schema
    name = schema.name.removeprefix(f"{NAMESPACE}::").removesuffix("_fwd").removesuffix("_chunked")
    name = public or name
    results = [result.name or str(i) for i, result in enumerate(schema.returns)]
    forward = direct(op)
    if returned is not None:
        forward, results = _beside(forward, names_of(op).index(returned)), [*results, "returned"]

    def first_order(needs: Sequence[bool], *args: Any) -> Any:
        return run_backward(gradients, name, needs, *args)

    return function.differentiable(
        "".join(word.title() for word in name.split("_")),
        forward,
        of=of,
        keep=keep if callable(keep) else _kept(schema, keep),
        gradients=first_order,
        arguments=names_of(op),
        results=results,
        derived=derived,
        fills=fills,
    )


def _beside(forward: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Function of the results and, last, the argument at a place."""

    def call(*args: Any) -> Any:
        return *forward(*args), args[place].view_as(args[place])

    return call


def names_of(op: Any) -> list[str]:
    """The names of a registered op's arguments."""
    return [argument.name for argument in op._schema.arguments]


def _kept(schema: Any, names: Sequence[str]) -> Callable[..., Kept]:
    """Function that keeps the arguments and results of these names; results are tensors."""
    plain = {x.name for x in schema.arguments if "Tensor" not in str(x.type)}
    tensors = sum(name not in plain for name in names)

    def keep(*values: Any) -> Kept:
        return values[:tensors], values[tensors:]

    keep.__signature__ = function.signature(names)  # type: ignore[attr-defined]
    return keep


def empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of the same shapes and dtypes, as the backwards give them."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def register_vmap_loop(op: Any) -> None:
    """Let vmap call a registered op once for each element, as it does by itself without Tensor[].

    Args:
        op: what `register` returned, with one Tensor as its result.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        flat, spec = tree_flatten(args)
        dims = tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]

        def call(index: int) -> Any:
            picked = (
                x if dim is None else x.select(dim, index)
                for x, dim in zip(flat, dims, strict=True)
            )
            return op(*tree_unflatten(picked, spec))

        return torch.stack([call(index) for index in range(info.batch_size)]), 0

    torch.library.register_vmap(op, rule, lib=_library)


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """A view in place of a tensor that was given before: Dynamo traces no autograd.Function that
    gets one tensor twice, such as a key that is the value as well."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(
        x.view_as(x) if any(x is before for before in tensors[:i]) else x
        for i, x in enumerate(tensors)
    )


class _FirstOrderOnly(Function):
    """Run a backward op while autograd records, and refuse to be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, name: str, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op_name = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            f"{ctx.op_name}: the Triton kernels have no double backward; use impl='torch'"
        )


def run_backward(op: Any, name: str, *args: Any) -> Any:
    """Call the backward op of `name`; differentiating its result raises NotImplementedError."""
    if torch.is_grad_enabled():
        return _FirstOrderOnly.apply(op, name, *args)
    return op(*args)
