"""Registers the ops with PyTorch and chooses their backend: the one file that knows torch.library.

An op is registered twice. ``fmkernels::<op>`` has the Python reference for every device and, on
top of it, whatever kernels exist: PyTorch's dispatcher chooses by device. The same reference is
also an op of its own, ``fmkernels::<op>_reference``, because a kernel hides the first from its own
device; forcing the reference, and a kernel for inputs past its limits, call the second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

BACKENDS = ("cpp", "triton", "cuda", "reference")
DEVICE_OF = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}

LIBRARY = torch.library.Library("fmkernels", "DEF")
OPS: dict[str, Op] = {}


def _load_native() -> tuple[ModuleType | None, str | None]:
    """The compiled extension, or None and the reason in words."""
    if os.environ.get("FMKERNELS_NO_EXTENSION", "0") not in ("", "0"):
        return None, "switched off by FMKERNELS_NO_EXTENSION"
    if importlib.util.find_spec("fmkernels._C") is None:
        try:
            from fmkernels._build_info import reason
        except ImportError:
            reason = None
        return None, reason or "the extension was not built"
    try:
        return importlib.import_module("fmkernels._C"), None
    except ImportError as error:
        return None, f"the extension does not load: {error}"


native, native_error = _load_native()


def _why_no_triton() -> str | None:
    """Looks for Triton without importing it, which would take longer than all the rest."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except ImportError:
        found = False
    return None if found else "triton is not installed"


def _why_no_cuda() -> str | None:
    """Looks for the CUDA library without loading it, which takes a GPU: see ``cuda_error``."""
    if native is None:
        return native_error
    if importlib.util.find_spec("fmkernels._cuda") is None:
        try:
            from fmkernels._build_info import cuda_reason
        except ImportError:
            cuda_reason = None
        return cuda_reason or "the CUDA library was not built"
    return None if torch.version.cuda else "this torch is built without CUDA"


def native_function(name: str, signature: str) -> Any:
    """Declare a function of the extension that only this package calls; returns what to call."""
    LIBRARY.define(name + signature)
    return getattr(torch.ops.fmkernels, name).default


GPU_ERRORS = {"cuda": _why_no_cuda(), "triton": _why_no_triton()}
"""Why there are no kernels of a GPU backend, on any GPU."""

MIN_CAPABILITY = (8, 0)
"""Of a GPU for which the CUDA library has code."""

MISSING_CAPABILITY = 11
"""Between the machine code for 10 and the PTX for 12."""


@functools.cache
def cuda_error(device: int) -> str | None:
    """Why the CUDA library does not run on this GPU, or None; loads it to find out."""
    try:
        library = importlib.import_module("fmkernels._cuda")
    except ImportError as error:
        return f"the CUDA library does not load: {error}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY or capability[0] == MISSING_CAPABILITY:
        needed, found = ("{}.{}".format(*pair) for pair in (MIN_CAPABILITY, capability))
        return f"needs compute capability {needed} or later, not 11; this GPU has {found}"
    try:
        library.shared_limits(device)  # the least that asks the driver
    except RuntimeError as error:
        return f"the CUDA library does not run on this GPU: {error}"
    return None


def _gpu_error(backend: str, device: int) -> str | None:
    """Why there are no kernels of a GPU backend on this GPU."""
    error = GPU_ERRORS[backend]
    return cuda_error(device) if error is None and backend == "cuda" else error


GPU_ORDER = json.loads((Path(__file__).parent / "configs" / "gpu_order.json").read_text())["order"]
"""In which GPU kernels are preferred; the file also has the figures that it rests on."""


class GpuKernel(NamedTuple):
    """One kernel of an op for CUDA tensors."""

    backend: str
    """``"cuda"`` or ``"triton"``."""
    module: str
    """Its function of the op's name is the kernel; imported when it is first used."""
    limits: Callable[..., str | None]
    """Why the kernel refuses these arguments, or None."""


def _check_backend(name: str, what: str = "backend: name") -> str:
    if name != "auto" and name not in BACKENDS:
        choices = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"{what}: expected one of {choices}, got {name!r}")
    return name


_requested = _check_backend(os.environ.get("FMKERNELS_BACKEND") or "auto", "FMKERNELS_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend, for parity checks and for bisecting.

    Args:
        name: ``"auto"`` (the fastest that can run, the default), ``"reference"`` (PyTorch),
            ``"cpp"``, ``"triton"`` or ``"cuda"``. The environment variable ``FMKERNELS_BACKEND``
            sets the same for a whole process.

    Raises:
        ValueError: if there is no backend of that name. An op that the backend cannot run raises
            ``RuntimeError`` when it is called, with the reason of every backend.

    The choice holds for the whole process, other threads included. The backward pass of a forward
    pass on the reference runs on the reference, that of any other on the fastest that can run.

    Example:
        >>> import torch, fmkernels
        >>> with fmkernels.backend("reference"):
        ...     values, permutation = fmkernels.soft_sort(torch.tensor([0.3, 0.1]))
    """
    global _requested
    previous = _requested
    _requested = _check_backend(name)
    try:
        yield
    finally:
        _requested = previous


class _Autograd(NamedTuple):
    """How the apply of the two autograd functions of an op is reached."""

    eager: Callable[..., Any]
    functional: Callable[..., Any]


@dataclasses.dataclass
class _Route:
    """One registered name of an op."""

    overload: torch._ops.OpOverload
    autograd: _Autograd | None = None


class Op:
    """One registered op: callable, differentiable, and able to say which backends can run it."""

    def __init__(
        self,
        name: str,
        signature: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        only_first: bool = False,
        limits: Callable[..., str | None] = lambda *args: None,
        cpu: Callable[..., Any] | None = None,
        gpu: tuple[GpuKernel, ...] = (),
    ) -> None:
        """Define and register the op.

        Args:
            name: its name in ``torch.ops.fmkernels``.
            signature: the schema without the name, ``"(Tensor x, float s=1.0) -> Tensor"``.
            reference: the PyTorch implementation that defines what is right.
            fake: shapes and dtypes of the outputs, for ``torch.compile`` and the meta device.
            setup_context: what to keep for backward, as in ``torch.autograd.Function``; trailing
                inputs that have the schema's defaults may be missing.
            backward: ``backward(ctx, on_reference, *grads)``, the gradient of the first input, or a
                tuple of those of the first inputs. Both or neither; what it gives cannot be
                differentiated again.
            only_first: calling gives the first output alone; backward needs the others.
            limits: why the compiled kernels hand these arguments to the reference, or None.
            cpu: the kernel for CPU tensors where it is written in Python, over functions of the
                extension (:func:`native_function`); None where the extension has the whole op.
            gpu: the kernels for CUDA tensors: the first that takes the arguments runs, and if none
                does, the reference.
        """
        self.name = name
        self.gpu = sorted(gpu, key=lambda kernel: GPU_ORDER.index(kernel.backend))
        self.limits = {"cpp": limits} | {kernel.backend: kernel.limits for kernel in gpu}
        self.only_first = only_first
        self._main = self._register(name, signature, reference, fake)
        self._reference = self._register(f"{name}_reference", signature, reference, fake)
        if setup_context is not None and backward is not None:
            for route in (self._main, self._reference):
                route.autograd = self._differentiable(route.overload, setup_context, backward)
        if cpu is not None and native is not None:
            LIBRARY.impl(name, untouched_by_autocast(cpu), "CPU")
        if any(GPU_ERRORS[kernel.backend] is None for kernel in gpu):
            LIBRARY.impl(name, untouched_by_autocast(self._run_gpu), "CUDA")
        OPS[name] = self

    def _run_gpu(self, *args: Any) -> Any:
        """The preferred kernel that is there and takes the arguments, else the reference."""
        device = next(arg for arg in args if isinstance(arg, Tensor)).device
        for backend, module, limits in self.gpu:
            if _requested in GPU_ERRORS and _requested != backend:
                continue
            if _gpu_error(backend, device.index) is None and limits(*args) is None:
                kernel = getattr(importlib.import_module(module), self.name)
                with torch.cuda.device(device):  # kernels start on the current device
                    return kernel(*args)
        if _requested in GPU_ERRORS:  # a call that was compiled, or a backward pass
            raise self._refusal(args)
        return self._reference.overload(*args)

    def _register(
        self, name: str, signature: str, reference: Callable[..., Any], fake: Callable[..., Any]
    ) -> _Route:
        LIBRARY.define(name + signature)
        LIBRARY.impl(name, untouched_by_autocast(reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fmkernels::{name}", fake, lib=LIBRARY)
        torch.library.register_vmap(f"fmkernels::{name}", _refuse_vmap(self.name), lib=LIBRARY)
        return _Route(getattr(torch.ops.fmkernels, name).default)

    def _differentiable(
        self,
        overload: torch._ops.OpOverload,
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
    ) -> _Autograd:
        only_first, on_reference = self.only_first, overload is self._reference.overload

        def backward_once(ctx: Any, *grads: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                found = backward(ctx, on_reference, *grads)
            else:
                with torch.no_grad():
                    found = backward(ctx, on_reference, *grads)
                found = self._once(found, ctx.saved_tensors)
            several = found if isinstance(found, tuple) else (found,)
            return *several, *(None,) * (len(ctx.needs_input_grad) - len(several))

        # This is what torch.compile sees. In eager mode an autograd.Function does the same at a
        # quarter of the host time.
        torch.library.register_autograd(
            overload, backward_once, setup_context=setup_context, lib=LIBRARY
        )

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = _below_autograd(overload, args)
                setup_context(ctx, args, output)
                return output[0] if only_first else output

        # torch.func wants forward and setup_context apart, and asks for a vmap rule.
        class Functional(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return overload(*args)

            vmap = staticmethod(_refuse_vmap(self.name))

        Functional.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
        for function in (Eager, Functional):
            function.backward = staticmethod(backward_once)  # type: ignore[method-assign]
            function.__name__ = function.__qualname__ = self.name
        # Function.apply binds its arguments through inspect.signature; that of its base does not
        return _Autograd(super(torch.autograd.Function, Eager).apply, Functional.apply)

    def _once(self, found: Any, saved: tuple[Tensor, ...]) -> Any:
        """The gradient, or several, such that another backward pass through them is refused."""
        if isinstance(found, tuple):
            return tuple(self._once(grad, saved) for grad in found)
        return None if found is None else _Once.apply(self.name, found, *saved)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any) -> Any:
        """Run the op on the backend that the dispatcher or ``fmkernels.backend`` chooses."""
        if forward_ad._current_level >= 0:
            self._refuse_tangents(args)
        route = self._main if _requested == "auto" else self._select(args)
        if is_compiling():
            output = route.overload(*args)
        elif route.autograd is None:
            return route.overload._op(*args)
        elif torch._C._are_functorch_transforms_active():
            output = route.autograd.functional(*args)
        elif torch.is_grad_enabled() and _any_requires_grad(args):
            return route.autograd.eager(*args)
        else:
            output = _below_autograd(route.overload, args)
        return output[0] if self.only_first else output

    def run(self, on_reference: bool, *args: Any) -> Any:
        """Run the op below autograd, on the reference or on the fastest that can run."""
        return (self._reference if on_reference else self._main).overload._op(*args)

    def _refuse_tangents(self, args: tuple[Any, ...]) -> None:
        for arg in args:
            if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
                raise NotImplementedError(
                    f"{self.name}: forward-mode differentiation (jvp, jacfwd) is not supported; "
                    "use reverse mode"
                )

    def without_defaults(self, *last: Any) -> tuple[Any, ...]:
        """The last arguments of a call, as few of them as the schema's defaults allow.

        To parse an argument takes as long as to sort a few values.
        """
        arguments = self._main.overload._schema.arguments[-len(last) :]
        defaults = [argument.default_value for argument in arguments]
        while last and last[-1] == defaults[len(last) - 1]:
            last = last[:-1]
        return last

    def _select(self, args: tuple[Any, ...]) -> _Route:
        if _requested == "reference":
            return self._reference
        # a GPU and its limits are asked where compiled code runs: that cannot be traced
        why_not = self._why_not_anywhere if is_compiling() else self.why_not
        if why_not(_requested, *args) is not None:
            raise self._refusal(args)
        return self._main

    def _refusal(self, args: tuple[Any, ...]) -> RuntimeError:
        reasons = "; ".join(
            f"{name}: {self.why_not(name, *args) or 'can run'}" for name in BACKENDS
        )
        return RuntimeError(f"{self.name}: backend {_requested!r} cannot run this call ({reasons})")

    def why_not(self, backend: str, *args: Any) -> str | None:
        """Why ``backend`` cannot run this op (on these arguments, if given), or None if it can."""
        reason = self._why_not_anywhere(backend, *args)
        if reason is not None or backend == "reference":
            return reason
        if backend in GPU_ERRORS:
            gpus = [arg.device.index for arg in args if isinstance(arg, Tensor)]
            error = _gpu_error(backend, gpus[0] if gpus else torch.cuda.current_device())
            if error is not None:
                return error
        return self.limits[backend](*args) if args else None

    def _why_not_anywhere(self, backend: str, *args: Any) -> str | None:
        """The reasons that hold on any GPU and for any size."""
        if backend == "reference":
            return None
        if backend == "cpp" and native is None:
            return native_error
        if backend not in self.limits:
            return "there is no such kernel"
        if GPU_ERRORS.get(backend) is not None:
            return GPU_ERRORS[backend]
        if backend in GPU_ERRORS and not torch.cuda.is_available():
            return "needs an NVIDIA GPU, and there is none"
        devices = {arg.device.type for arg in args if isinstance(arg, Tensor)}
        if devices - {DEVICE_OF[backend]}:
            return f"needs tensors on {DEVICE_OF[backend]}, got {', '.join(sorted(devices))}"
        return None

    @property
    def gpu_kernels(self) -> tuple[str, ...]:
        """The GPU backends that have a kernel of this op, the preferred one first."""
        return tuple(kernel.backend for kernel in self.gpu)

    def backends(self) -> dict[str, str | None]:
        """For every backend None if it can run this op on its device, else the reason."""
        return {name: self.why_not(name) for name in BACKENDS}


def untouched_by_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel in Python whose products are in the dtypes that it chose.

    Autocast is still on below an op: in a backward pass inside of it, say, of a forward pass that
    was outside.
    """

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), "meta")
        if device == "meta" or not torch.is_autocast_enabled(device):
            return kernel(*args)
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    return run


_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_set_excluded = torch._C._dispatch_tls_set_dispatch_key_excluded


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    for arg in args:  # noqa: SIM110, a generator takes three times as long
        if isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False


def _below_autograd(overload: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
    """Call past the Python autograd kernel, which costs 8 µs even if no gradient is asked for."""
    excluded = _is_excluded(_AUTOGRAD)
    _set_excluded(_AUTOGRAD, True)
    try:
        return overload._op(*args)
    finally:
        _set_excluded(_AUTOGRAD, excluded)


def _refuse_vmap(name: str) -> Callable[..., Any]:
    name = name.removesuffix("_reference").removesuffix("_backward")

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"{name}: vmap is not supported; the op takes any leading batch shape, "
            "so call it on the whole batch"
        )

    return refuse


class _Once(torch.autograd.Function):
    """The identity on a gradient; differentiating it again raises instead of giving zeros."""

    @staticmethod
    def forward(name: str, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name}: double backward is not supported: its gradient cannot be differentiated"
        )
