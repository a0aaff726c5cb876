# SPDX-License-Identifier: Apache-2.0
"""Run Pallas kernels on the CPU, with their memory spaces, barriers and copies simulated and races looked for.

What JAX's Mosaic GPU interpreter leaves out and our kernels need is added in `_MosaicGpuRules`: accumulators in
`pl.run_state`, left operands in registers, copies that add, `mma`. What it still lacks it refuses with
NotImplementedError: cp.async, semaphores, inline PTX without a stand-in. It computes a product at once, but looks for
races as if that took until the wait for it. A deadlock hangs for ever: mark such tests
`@pytest.mark.timeout(60, method="thread")`.
"""

import collections
import contextlib
import dataclasses
import functools
import inspect
import io
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback


class RaceDetected(AssertionError):
    """Two accesses to one place in memory, at least one a write, that nothing orders."""


@contextlib.contextmanager
def mosaic_gpu(stand_ins: Mapping[str, Callable] = types.MappingProxyType({}), **options) -> Iterator[None]:
    """Kernels built inside run in the Mosaic GPU interpreter; `options` are InterpretGPUParams' own.

    `stand_ins` say what functions of inline instructions mean, by name: of the equation and arrays, of references what
    lies there, a list of arrays.

    Several simulated CPU devices are needed (tests/conftest.py): with one, threads that wait at barriers can take all
    of XLA's.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the reset is not exported
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # Pseudo-threads for what is asynchronous. Two accesses by one of them are never a race: few would hide some.
    options = {"num_tma_threads_per_device": 64, **options}
    params = plgpu.InterpretGPUParams(detect_races=True, **options)
    with (
        _watching(gpu_callbacks.reset_gpu_interpret_mode_state),
        _numpy_callbacks(),
        plgpu.force_gpu_interpret_mode(params),
        _MosaicGpuRules({**_STAND_INS, **stand_ins}).installed(),
    ):
        yield


@contextlib.contextmanager
def mosaic_tpu(**options) -> Iterator[None]:
    """Kernels built inside run in the Mosaic TPU interpreter; `options` are InterpretParams' own."""
    from jax.experimental.pallas import tpu as pltpu

    params = pltpu.InterpretParams(detect_races=True, **options)
    with (
        _watching(pltpu.reset_tpu_interpret_mode_state),
        _numpy_callbacks(),
        pltpu.force_tpu_interpret_mode(params),
    ):
        yield


@contextlib.contextmanager
def _watching(reset) -> Iterator[None]:
    """Turns a race into RaceDetected (jax 0.11 prints it, 0.12 raises it), and never leaves a broken state behind."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
            jax.effects_barrier()  # kernels are dispatched asynchronously
    except Exception as error:
        reset()
        if "RACE DETECTED" in str(error):
            raise RaceDetected(str(error)) from error
        raise
    print(printed.getvalue(), end="")
    if "RACE DETECTED" in printed.getvalue():
        reset()
        raise RaceDetected(printed.getvalue())


def _numpy_callbacks():
    """Callbacks get NumPy arrays. JAX puts each argument on a device first, which takes longer than what they do."""
    from jax._src import callback as jax_callback

    def call(*args, callback, result_avals, sharding, ordered):
        del result_avals, sharding, ordered
        return [np.asarray(x) for x in callback(*map(np.array, args))]  # copies: the program takes its memory back

    return mock.patch.object(jax_callback, "io_callback_impl", call)


class _MosaicGpuRules:
    """Rules for what JAX's interpreter has none for. All of it is private to JAX: nothing is exported to extend it."""

    def __init__(self, stand_ins: Mapping[str, Callable]):
        from jax._src import core as jax_core
        from jax._src.pallas.mosaic_gpu import core as gpu_core
        from jax._src.pallas.mosaic_gpu import primitives
        from jax._src.pallas.mosaic_gpu.interpret import (
            gpu_callbacks,
            jaxpr_interpret,
            race_detection_state,
            shared_memory,
        )
        from jax._src.state import discharge
        from jax._src.state import types as state_types

        self.stand_ins = stand_ins
        self.core, self.callbacks, self.memory, self.state = jax_core, gpu_callbacks, shared_memory, state_types
        self.races = race_detection_state.GPURaceDetectionState
        self.primitives, self.registers = primitives, gpu_core.MemorySpace.REGS
        self.interpreter = jaxpr_interpret.JaxprInterpreter
        self.resolve = jaxpr_interpret.resolve_ref
        self.rules = {discharge.run_state_p: self.run_state, primitives.wgmma_ref_p: self.wgmma}
        self.rules |= {primitives.mma_p: self.mma, primitives.inline_mgpu_p: self.inline}
        self.rules[primitives.wgmma_wait_p] = self.wgmma_wait
        have_read = functools.partial(gpu_callbacks.wait_smem_to_gmem, n=0, wait_read_only=True)
        self.waits = {"copies_have_read": have_read, "fence_async_shared_cta": gpu_callbacks.commit_smem}
        # In flight, of each thread: the accumulator, and the clock of the pseudo-thread that works on it.
        self.products = collections.defaultdict(collections.deque)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        interpret, copy = self.interpreter.interpret, self.callbacks.copy_smem_to_gmem
        with (
            mock.patch.object(self.interpreter, "interpret", functools.partialmethod(_interpret, self, interpret)),
            mock.patch.object(self.callbacks, "copy_smem_to_gmem", self.copying(copy)),
            mock.patch.object(self.memory, "_to_int", lambda x: x if isinstance(x, jax.core.Tracer) else int(x)),
            mock.patch.object(self.memory.GPUSharedMemory, "_abort_waiters", self.aborting()),
            mock.patch.object(self.callbacks.AsyncCopyGmemToSmemTask, "post_read", self.filling()),
            self.products_take_time(),
            self.racing_beyond_registers(),
        ):
            yield

    @contextlib.contextmanager
    def racing_beyond_registers(self) -> Iterator[None]:
        """Registers belong to one thread; the detector does not expect any but accumulators there."""
        state, registers = self.races, self.memory.get_memory_space_idx(self.registers)

        def unless_registers(check):
            def checked(races, thread, clock, key, *rest, **options):
                if key.memory_space_id != registers:
                    check(races, thread, clock, key, *rest, **options)

            return checked

        with (
            mock.patch.object(state, "check_read", unless_registers(state.check_read)),
            mock.patch.object(state, "check_write", unless_registers(state.check_write)),
        ):
            yield

    def has_rule(self, eqn) -> bool:
        if eqn.primitive is self.primitives.wgmma_ref_p:
            return not isinstance(eqn.invars[1].aval, self.state.AbstractRef)
        if eqn.primitive is self.primitives.inline_mgpu_p:
            return eqn.params["mgpu_fn"].__name__ in ("bar_op", *self.waits, *self.stand_ins)
        return eqn.primitive in self.rules

    def run_state(self, interpreter, eqn, token, values):
        """References that live for the length of a jaxpr, from their first values to their last."""
        assert all(eqn.params["is_initialized"])
        # A reference among the inputs is one that the jaxpr closes over, not a value to make one of.
        made = [not isinstance(atom.aval, self.state.AbstractRef) for atom in eqn.invars]
        keys = []
        for value, make in zip(values, made, strict=True):
            token, key = self.allocate(interpreter, eqn, token, value) if make else (token, value)
            keys.append(key)
        token, _ = interpreter.interpret(eqn.params["jaxpr"], token, *keys)
        last = []
        for key, make, variable in zip(keys, made, eqn.outvars, strict=True):
            if make:
                token, value = self.read(interpreter, eqn, token, key, variable.aval)
                token = self.free(interpreter, eqn, token, key)
            last.append(value if make else key)
        return token, last

    def wgmma(self, interpreter, eqn, token, values):
        """acc += a @ b with `a` in registers: put where the interpreter's own rule expects it."""
        acc, a, b, *leaves = values
        trees = [eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
        transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
        acc, acc_transforms = self.resolve(eqn.invars[0].aval, acc, transforms[0])
        b, b_transforms = self.resolve(eqn.invars[2].aval, b, transforms[2])
        token, key = self.allocate(interpreter, eqn, token, a)
        token = self.call(
            interpreter,
            eqn,
            token,
            self.callbacks.wgmma,
            acc_allocation_key_as_array=acc,
            acc_transforms=acc_transforms,
            a_allocation_key_as_array=key,
            a_transforms=(),
            b_allocation_key_as_array=b,
            b_transforms=b_transforms,
        )
        return self.free(interpreter, eqn, token, key), []

    def mma(self, interpreter, eqn, token, values):
        acc, a, b = values
        return token, acc + jnp.matmul(a, b, preferred_element_type=acc.dtype)

    def inline(self, interpreter, eqn, token, values):
        function, count = eqn.params["mgpu_fn"], eqn.params["pytree_args"].num_leaves
        values, transforms = values[:count], eqn.params["pytree_ref_transforms"].unflatten(values[count:])
        if function.__name__ in self.waits:
            return self.call(interpreter, eqn, token, self.waits[function.__name__]), []
        if function.__name__ != "bar_op":
            values = list(values)
            for i, atom in enumerate(eqn.invars[: len(values)]):
                if isinstance(atom.aval, self.state.AbstractRef):
                    key, own = self.resolve(atom.aval, values[i], transforms[i])
                    shape = own[-1].get_indexer_shape() if own else atom.aval.shape  # they are indices, all of them
                    token, values[i] = self.get(interpreter, eqn, token, key, shape, atom.aval.dtype, own)
            return token, self.stand_ins[function.__name__](eqn, *values)
        closure = inspect.getclosurevars(function).nonlocals
        token = self.callbacks.call_named_barrier(
            token,
            interpreter.mesh_location,
            interpreter.thread,
            *values,
            num_threads=closure["num_threads"],
            sync=closure["operation"] == "sync",
            source_info=eqn.source_info,
        )
        return token, []

    def allocate(self, interpreter, eqn, token, value):
        token, request = self.callbacks.call_make_allocation_request_array(
            token=token,
            compute_unit=interpreter.thread,
            memory_space_id=self.memory.get_memory_space_idx(self.registers),
            initial_ref_count=1,
        )
        return self.callbacks.call_allocate_buffer(
            token=token,
            mesh_location=interpreter.mesh_location,
            thread=interpreter.thread,
            allocation_request_as_array=request,
            value=value,
            source_info=eqn.source_info,
        )

    def read(self, interpreter, eqn, token, key, aval):
        read = functools.partial(self.callbacks.wgmma_accumulator_deref, wait_n=0)
        shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return self.call(interpreter, eqn, token, read, shape, acc_allocation_key_as_array=key)

    def get(self, interpreter, eqn, token, key, shape, dtype, transforms):
        return self.callbacks.call_get(
            token=token,
            result_shape_and_dtype=jax.ShapeDtypeStruct(shape, dtype),
            mesh_location=interpreter.mesh_location,
            thread=interpreter.thread,
            allocation_key_as_array=key,
            transforms=transforms,
            source_info=eqn.source_info,
        )

    def free(self, interpreter, eqn, token, key):
        return self.callbacks.call_deallocate_buffer(
            token=token,
            mesh_location=interpreter.mesh_location,
            thread=interpreter.thread,
            allocation_key_as_array=key,
            source_info=eqn.source_info,
        )

    def call(self, interpreter, eqn, token, function, *results, **arguments):
        token_shape = self.callbacks.TOKEN_SHAPE_DTYPE
        return io_callback(
            functools.partial(function, source_info=eqn.source_info),
            (token_shape, *results) if results else token_shape,
            token=token,
            mesh_location=interpreter.mesh_location,
            thread=interpreter.thread,
            **arguments,
        )

    def filling(self):
        """The check of a copy's write to shared memory. It needs a fence after what threads wrote there before, but not
        after what they read: a barrier is enough. JAX asks for a fence after both."""
        callbacks = self.callbacks

        def post_read(task, tma_thread_id: int, shared_memory):
            task.clock.inc(tma_thread_id)
            races = callbacks.get_races()
            place = task.dst_allocation_key, task.dst_access
            for clock, left_out in ((task.clock.async_smem_clock, "reads"), (task.clock.generic_clock, "writes")):
                part = dataclasses.replace(races, **{left_out: collections.defaultdict(list)})
                part.check_write(task.thread, clock.copy(), *place, source_info=task.source_info)

        return post_read

    def aborting(self):
        """What wakes up the threads that wait when one has failed; JAX forgets those at named barriers."""
        abort = self.memory.GPUSharedMemory._abort_waiters

        def abort_all(shared_memory):
            abort(shared_memory)
            for barrier in shared_memory.named_barriers.values():
                barrier.abort()

        return abort_all

    @contextlib.contextmanager
    def products_take_time(self) -> Iterator[None]:
        """wgmma reads shared memory and fills its accumulator until it is waited for. The interpreter computes at once,
        and does not look for races there."""
        callbacks, memory = self.callbacks, self.memory.GPUSharedMemory
        reset = memory.reset_per_cluster_state

        def forgetting(shared_memory):
            self.products.clear()
            reset(shared_memory)

        with (
            mock.patch.object(callbacks, "wgmma", self.starting(callbacks.wgmma)),
            mock.patch.object(callbacks, "wgmma_accumulator_deref", self.loading(callbacks.wgmma_accumulator_deref)),
            mock.patch.object(memory, "reset_per_cluster_state", forgetting),
        ):
            yield

    def starting(self, wgmma):
        callbacks, key_of = self.callbacks, self.callbacks.HostAllocationKey.from_array

        @callbacks.fail_on_exception
        def start(*, thread, source_info=None, **arguments):
            shared_memory = callbacks._get_shared_memory()
            # A pseudo-thread reads, as for a TMA store: nobody is ordered after it who has not seen a wait for it.
            clock = shared_memory.get_clock(thread)
            clock.inc(shared_memory.get_next_tma_thread_id())
            for operand in ("a", "b"):
                key = key_of(arguments[f"{operand}_allocation_key_as_array"])
                transforms = callbacks._remove_noop_transforms(arguments[f"{operand}_transforms"])
                access = shared_memory.access(key, jax.tree.map(int, transforms))
                races, proxy = callbacks.get_races(), clock.async_smem_clock
                races.check_read(thread, proxy, key, access, source_info=source_info)
            self.products[thread].append((key_of(arguments["acc_allocation_key_as_array"]), clock))
            return wgmma(thread=thread, source_info=source_info, **arguments)

        return start

    def loading(self, deref):
        callbacks = self.callbacks

        @callbacks.fail_on_exception
        def load(*, thread, acc_allocation_key_as_array, wait_n, **arguments):
            if wait_n is not None:
                self.wait_for_products(thread, wait_n)
            key = callbacks.HostAllocationKey.from_array(acc_allocation_key_as_array)
            if any(accumulator == key for accumulator, _ in self.products[thread]):
                raise ValueError(f"RACE DETECTED\n  read of {key} by {thread}, whose products are not waited for")
            arguments |= {"acc_allocation_key_as_array": acc_allocation_key_as_array, "wait_n": wait_n}
            return deref(thread=thread, **arguments)

        return load

    def wait_for_products(self, thread, in_flight: int) -> None:
        shared_memory, products = self.callbacks._get_shared_memory(), self.products[thread]
        with shared_memory.lock:
            while len(products) > in_flight:
                shared_memory.clocks[thread].update(products.popleft()[1])

    def wgmma_wait(self, interpreter, eqn, token, values):
        def wait(*, token, mesh_location, thread, source_info):
            self.wait_for_products(thread, eqn.params["n"])
            return token

        return self.call(interpreter, eqn, token, self.callbacks.fail_on_exception(wait)), []

    def copying(self, copy):
        """copy_smem_to_gmem with reduction_op="add" too."""
        callbacks, adding, lock = self.callbacks, self.adding_task(), threading.Lock()

        def place(which, arguments):
            key = callbacks.HostAllocationKey.from_array(arguments[f"{which}_allocation_key_as_array"])
            transforms = jax.tree.map(int, callbacks._remove_noop_transforms(arguments[f"{which}_transforms"]))
            return {
                f"{which}_allocation_key": key,
                f"{which}_access": callbacks._get_shared_memory().access(key, transforms),
            }

        def copy_smem_to_gmem(*, reduction_op, **arguments):
            if reduction_op is None:
                return copy(reduction_op=None, **arguments)
            assert reduction_op == "add", reduction_op
            shared_memory, thread = callbacks._get_shared_memory(), arguments["thread"]
            task = adding(
                mesh_location=arguments["mesh_location"],
                thread=thread,
                **place("src", arguments),
                **place("dst", arguments),
                source_info=arguments["source_info"],
                clock=shared_memory.incr_clock(thread),
            )
            with lock:
                shared_memory.execute_async_task(task)
            return arguments["token"]

        return copy_smem_to_gmem

    def adding_task(self):
        callbacks = self.callbacks

        class Adding(callbacks.AsyncCopySmemToGmemTask):
            """Adds to what is there. Any order of additions is right, so that they are no race with each other."""

            def __call__(self, tma_thread_id: int):
                shared_memory = callbacks._get_shared_memory()
                shape = tuple(shared_memory.buffer_shape_and_dtype(self.dst_allocation_key).shape)
                self.pre_read(tma_thread_id, shared_memory)
                read = functools.partial(
                    shared_memory.get_buffer_content, thread=self.thread, logging_info=self.logging_info
                )
                value, _, _ = read(self.src_allocation_key, self.src_access)
                self.clock.inc(tma_thread_id)
                self.write_clock = self.clock.copy()
                store = callbacks._clip_store_to_shape(self.dst_access, value, shape)
                if store is not None:
                    access, value = store
                    before, _, _ = read(self.dst_allocation_key, access)
                    shared_memory.store_buffer_content(
                        self.dst_allocation_key,
                        access,
                        before + value,
                        self.thread,
                        logging_info=self.logging_info,
                    )
                self.post_write(tma_thread_id, shared_memory)

        return Adding


def _interpret(interpreter, rules: _MosaicGpuRules, interpret, jaxpr, token, *arguments):
    """JaxprInterpreter.interpret, with `rules` for the equations that they are for."""
    if not any(map(rules.has_rule, jaxpr.eqns)):
        return interpret(interpreter, jaxpr, token, *arguments)
    core, values = rules.core, dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if rules.has_rule(eqn):
            token, outputs = rules.rules[eqn.primitive](interpreter, eqn, token, inputs)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        else:
            variables = list(dict.fromkeys(atom for atom in eqn.invars if not isinstance(atom, core.Literal)))
            outvars = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
            alone = core.Jaxpr([], variables, outvars, [eqn], eqn.effects, jaxpr.debug_info)
            token, some = interpret(interpreter, alone, token, *(values[v] for v in variables))
            named = dict(zip(outvars, some, strict=True))
            outputs = [named.get(v) for v in eqn.outvars]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return token, [read(atom) for atom in jaxpr.outvars]


def _relabel(eqn, x):
    """sm80._to_left: the same numbers, cut in pieces and rounded."""
    pieces = eqn.params["flat_ret_ty"]
    width = pieces[0].shape[1]
    return [x[:, i * width : (i + 1) * width].astype(piece.dtype) for i, piece in enumerate(pieces)]


def _any_positive(eqn, rows):
    return [jnp.any(rows > 0).astype(jnp.int32)]


def _nearest_int32(eqn, x):
    limits = jnp.iinfo(jnp.int32)
    inside = jnp.clip(jnp.rint(x), limits.min, 2.0**31 - 128)  # the largest float32 that is one
    return [jnp.where(jnp.isnan(x), 0, jnp.where(x >= 2.0**31, limits.max, inside.astype(jnp.int32)))]


# What functions of inline instructions mean, by name.
_STAND_INS = {"relabel": _relabel, "any_positive": _any_positive, "nearest_int32": _nearest_int32}
