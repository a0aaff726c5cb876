# SPDX-License-Identifier: Apache-2.0
"""One suite that every implementation of an operation passes.

The test module of an op subclasses `Suite`, says how to call the op and its reference, and gets for every
implementation, named shape and dtype: forward and gradients, bitwise repetition, jit and eager, vmap and grad of
vmap, shard_map on 8 simulated devices, and a proof that each argument changes the output or is refused.

Errors are judged by core/tolerance.py, against the reference in float64 and the naive way in the same precision.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedError
from pallas_kernels.core import tolerance
from pallas_kernels.core.arrays import arrays_of, is_array, with_arrays

DTYPES = ("float32", "bfloat16", "float16")


class Suite:
    """Subclass it as `Test...`, fill in the attributes and the methods that raise NotImplementedError.

    `plumbing` is how the work is done, not what it is: every other parameter must change the output.
    """

    function: ClassVar[Callable]
    shapes: ClassVar[Mapping[str, Any]]
    implementations: ClassVar[Sequence[str]]
    probe: ClassVar[str]  # the shape on which transformations are tried
    probe_dtypes: ClassVar[Mapping[str, str]] = {}  # and the dtype, for implementations that do not take float32
    differentiable: ClassVar[bool] = True
    on_gpu: ClassVar[bool] = True  # `pytest -m gpu` runs it
    slow_dtypes: ClassVar[frozenset[str]] = frozenset()  # in which named shapes are not part of `make test`, except
    soon: ClassVar[Mapping[str, frozenset[str]]] = {}  # those of each dtype that are
    plumbing: ClassVar[frozenset[str]] = frozenset({"implementation", "config", "return_lse"})

    def call(self, arguments: dict[str, Any], implementation: str) -> Any:
        """All outputs of the op, a pytree."""
        raise NotImplementedError

    def reference(self, arguments: dict[str, Any]) -> Any:
        """The same outputs by the specification."""
        raise NotImplementedError

    def naive(self, arguments: dict[str, Any]) -> Any:
        """The same outputs by the naive way, in the precision of the arguments."""
        raise NotImplementedError

    def assert_agrees(
        self, call: Callable, arguments, template=None, transform: Callable = lambda f: f, jit: bool = True
    ) -> None:
        """`call(arguments)` is as right as `naive` allows. With a template, `arguments` are its array leaves, and
        `transform` (vmap) applies to the reference and the naive way too."""

        def of(method):
            return transform(method if template is None else lambda arrays: method(with_arrays(template, arrays)))

        assert_agrees(call, of(self.reference), of(self.naive), arguments, jit, self.differentiable)

    def changes(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """For every parameter of the function another value than in `arguments`, which must show."""
        raise NotImplementedError

    def sharded(self) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """Arguments, their PartitionSpecs over the axes "data" (4) and "model" (2), and those of the outputs."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        def slow(shape, dtype):
            return dtype in self.slow_dtypes and shape not in self.soon.get(dtype, ())

        cases = [(name, dtype) for name, shape in self.shapes.items() if not shape.large for dtype in DTYPES]
        if "implementation" in metafunc.fixturenames:
            metafunc.parametrize("implementation", self.implementations)
        if "shape" in metafunc.fixturenames:
            marked = [pytest.param(*case, marks=[pytest.mark.slow] if slow(*case) else []) for case in cases]
            metafunc.parametrize(("shape", "dtype"), marked)

    def arguments(self, shape: str, dtype: str, implementation: str, seed: int = 0) -> dict[str, Any]:
        """Random arguments; skips the test, with the refusal as its reason, where the call is refused."""
        return self.accepted(self.shapes[shape].make(dtype, jax.random.key(seed)), implementation)

    def probe_arguments(self, implementation: str, seed: int = 0) -> dict[str, Any]:
        return self.arguments(self.probe, self.probe_dtypes.get(implementation, "float32"), implementation, seed)

    def accepted(self, arguments: dict[str, Any], implementation: str) -> dict[str, Any]:
        """The same arguments; skips the test, with the refusal as its reason, where the call is refused."""
        try:
            jax.eval_shape(lambda: self.call(arguments, implementation))
        except UnsupportedError as refusal:
            pytest.skip(str(refusal))
        return arguments

    def of_arrays(self, arguments: dict[str, Any], implementation: str) -> Callable[[Sequence[jax.Array]], Any]:
        """The call as a function of the array leaves of its arguments."""
        return lambda arrays: self.call(with_arrays(arguments, arrays), implementation)

    def test_agrees_with_the_reference(self, implementation, shape, dtype):
        arguments = self.arguments(shape, dtype, implementation)
        call = self.of_arrays(arguments, implementation)
        self.assert_agrees(call, arrays_of(arguments), arguments)

    def test_eager(self, implementation):
        arguments = self.probe_arguments(implementation)
        self.assert_agrees(lambda a: self.call(a, implementation), arguments, jit=False)

    def test_repeats_bit_for_bit(self, implementation):
        arguments = self.arguments(self.probe, "bfloat16", implementation)
        call = self.of_arrays(arguments, implementation)
        arrays = arrays_of(arguments)
        run = jax.jit(functools.partial(value_and_gradients if self.differentiable else value_alone, call))
        cotangents = random_cotangents(call, arrays, 0)
        first, second = run(arrays, cotangents), run(arrays, cotangents)
        jax.tree.map(np.testing.assert_array_equal, first, second)

    def test_vmap_and_grad_of_vmap(self, implementation):
        pair = [self.probe_arguments(implementation, seed) for seed in (1, 2)]
        stacked = [jnp.stack(arrays) for arrays in zip(*map(arrays_of, pair), strict=True)]
        call = jax.jit(jax.vmap(self.of_arrays(pair[0], implementation)))
        self.assert_agrees(call, stacked, pair[0], transform=jax.vmap)

    def test_shard_map(self, implementation):
        arguments, specs, out_specs = self.sharded()
        self.accepted(arguments, implementation)
        if jax.device_count() < 8:
            pytest.skip(f"a mesh of 4 x 2 needs 8 devices, here are {jax.device_count()}")
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        specs = [spec for name, spec in specs.items() for _ in arrays_of(arguments[name])]
        call = self.of_arrays(arguments, implementation)
        sharded = jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=out_specs)
        self.assert_agrees(jax.jit(sharded), arrays_of(arguments), arguments)

    def test_each_argument_changes_the_output_or_is_refused(self, implementation):
        arguments = self.probe_arguments(implementation)
        changes = self.changes(arguments)
        assert set(changes) == set(inspect.signature(self.function).parameters) - self.plumbing
        # One program for all changes of arrays; what is ignored among the others would give the same program again.
        compiled = jax.jit(self.of_arrays(arguments, implementation))
        before = jax.tree.leaves(compiled(arrays_of(arguments)))
        for name, value in changes.items():
            changed = {**arguments, name: value}
            alike = is_array(value) and is_array(arguments.get(name))
            run = compiled if alike else jax.jit(self.of_arrays(changed, implementation))
            try:
                after = jax.tree.leaves(run(arrays_of(changed)))
            except UnsupportedError:
                continue
            assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True)), f"{name} is ignored"


def is_floating(leaf) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def value_and_gradients(function: Callable, arguments, cotangents: Sequence[jax.Array]) -> tuple[list, list]:
    """Outputs, and the gradients of all floating inputs for the given cotangents."""
    leaves, tree = jax.tree.flatten(arguments)

    def of_floats(floats):
        replacements = iter(floats)
        return jax.tree.leaves(function(tree.unflatten([next(replacements) if is_floating(x) else x for x in leaves])))

    outputs, vjp = jax.vjp(of_floats, [x for x in leaves if is_floating(x)])
    return outputs, vjp([ct.astype(x.dtype) for ct, x in zip(cotangents, outputs, strict=True)])[0]


def value_alone(function: Callable, arguments, cotangents: Sequence[jax.Array]) -> tuple[list, list]:
    """As `value_and_gradients`, of what has no gradient."""
    return jax.tree.leaves(function(arguments)), []


def random_cotangents(function: Callable, arguments, seed: int) -> list[jax.Array]:
    """Cotangents in the precision of the function's outputs, so that every other precision can hold them."""
    return random_like(jax.tree.leaves(jax.eval_shape(function, arguments)), seed)


def random_like(outputs: Sequence[jax.ShapeDtypeStruct], seed: int) -> list[jax.Array]:
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(x.shape), x.dtype) for x in outputs]


def assert_agrees(
    function: Callable, reference: Callable, naive: Callable, arguments, jit: bool = True, gradients: bool = True
) -> None:
    """Outputs and gradients of `function(arguments)` are as near to `reference` in float64 as core/tolerance.py
    asks, with `naive` as the naive way. Python numbers among the arguments stay static."""

    def evaluate(function):
        def run(arrays, cotangents):
            evaluated = value_and_gradients if gradients else value_alone
            return evaluated(lambda a: function(with_arrays(arguments, a)), arrays, cotangents)

        return run

    arrays = arrays_of(arguments)
    outputs = jax.tree.leaves(jax.eval_shape(lambda a: function(with_arrays(arguments, a)), arrays))
    inputs = [(shuffled(arrays, seed), random_like(outputs, seed)) for seed in range(4)]
    actual = (jax.jit(evaluate(function)) if jit else evaluate(function))(*inputs[0])
    evaluate_naive, evaluate_exact = jax.jit(evaluate(naive)), jax.jit(evaluate(reference))
    usual = [evaluate_naive(*x) for x in inputs]
    with jax.enable_x64(True):
        exact = [
            evaluate_exact(*jax.tree.map(lambda x: x.astype("float64") if is_floating(x) else x, x)) for x in inputs
        ]
    for part, what in enumerate(("output", "gradient")):
        for i, result in enumerate(actual[part]):
            (expected, naive_result), *more = [(e[part][i], u[part][i]) for e, u in zip(exact, usual, strict=True)]
            tolerance.assert_normal(result, expected, naive_result, f"{what} {i}", more)


def shuffled(arrays: Sequence[jax.Array], seed: int) -> list[jax.Array]:
    """The same entries of each floating array in another order: another draw of the same distribution."""
    random = np.random.default_rng(seed)
    return [
        jnp.asarray(random.permutation(np.array(x).ravel()).reshape(x.shape)) if is_floating(x) else x for x in arrays
    ]
