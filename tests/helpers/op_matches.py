"""The tolerance rule over one case of one op."""

from __future__ import annotations

import torch

from helpers.lanes import Way
from helpers.ops import (
    as_leaves,
    in_fp64,
    inputs_of,
    run,
    terms_of,
)
from stlm_kernels.spec import Case, OpSpec
from stlm_kernels.testing import assert_matches, poisoned_memory


def assert_op_matches(spec: OpSpec, case: Case, way: Way, seed: int = 0) -> None:
    inputs = inputs_of(spec, case, way, seed)
    wide = in_fp64(spec, inputs)
    narrow = as_leaves(spec, inputs)
    want, want_grads = run(spec, spec.reference, wide)
    allowed, allowed_grads = run(spec, spec.yardstick, narrow)
    with poisoned_memory():
        got, got_grads = run(spec, spec.op, inputs, impl=way.impl)
    exact, terms = spec.exact(case), terms_of(spec, wide, want)
    for name, x in got.items():
        if not x.is_floating_point():
            torch.testing.assert_close(x.cpu(), want[name].to(x.dtype), rtol=0, atol=0)
            continue
        assert x.dtype == allowed[name].dtype
        judged = {"name": name, "exact": name in exact, "terms": terms.get(name)}
        assert_matches(x, want[name], allowed[name], **judged)
    for name, grad in got_grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_matches(
            grad,
            want_grads[name],
            allowed_grads[name],
            name=f"gradient of {name}",
            exact=name in exact,
            rows=name in spec.row_args,
            terms=terms.get(name),
        )
