"""GPUs that are not there: CPU tensors that carry a device, and the refusals of CUDA.

Every tensor is a real one on the CPU, so code that depends on values runs too. The device belongs
to a tensor's storage: views, parameters whose data is replaced, and tensors that autograd saves
all share it. What asks for a device (``to``, ``cuda``, ``device=``, ``torch.device`` as a context)
gets a copy with that label, ``tensor.device`` answers with it, and an operation on tensors of two
devices fails as on CUDA, with the same exceptions: single values on the CPU, CPU indices in
``x[index]``, and copies from one device to another.

A tensor that C++ makes by itself (a mask inside attention, zeros in a backward pass) has no label
until it meets one; nothing here can say on which device CUDA would have put it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CPU = torch.device("cpu")
_PURGE_EVERY = 2000
_MOVES = ("copy_", "_to_copy", "set_", "_foreach_copy_")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
Device = torch.device


class _Labels:
    """Device of each storage; None: not known yet. A storage that is not listed is on the CPU."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, Device | None]] = {}

    def get(self, tensor: Tensor) -> Device | None:
        if tensor.device.type == "meta":
            return None
        found = self._known.get(tensor.untyped_storage()._cdata)
        return CPU if found is None else found[1]

    def set(self, tensor: Tensor, device: Device | None) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if device == CPU:
            self._known.pop(storage._cdata, None)
            return
        # while the weak reference lives, no other storage gets this address
        self._known[storage._cdata] = (StorageWeakRef(storage), device)
        if len(self._known) % _PURGE_EVERY == 0:
            dead = [key for key, (ref, _) in self._known.items() if ref.expired()]
            for key in dead:
                del self._known[key]


def _normal(device: Any) -> Device:
    """A device with its number."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    found = torch.device(device)
    return torch.device("cuda", 0) if found.type == "cuda" and found.index is None else found


def _tensors(*trees: Any) -> list[Tensor]:
    return [one for one in tree_iter(trees) if isinstance(one, Tensor)]


class _Operations(TorchDispatchMode):
    """Below autograd: refuses two devices, and hands the device on to what an operation makes."""

    def __init__(self, labels: _Labels) -> None:
        super().__init__()
        self._labels = labels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        given = _tensors(args, kwargs)
        device = self._common(name, given, args)
        known = {one.untyped_storage()._cdata for one in given if one.device.type != "meta"}
        found = func(*args, **kwargs)
        for one in given:
            if device is not None and self._labels.get(one) is None:
                self._labels.set(one, device)
        for one in _tensors(found):
            if one.device.type != "meta" and one.untyped_storage()._cdata not in known:
                self._labels.set(one, device)
        return found

    def _common(self, name: str, given: list[Tensor], args: Any) -> Device | None:
        """The one device of an operation."""
        if name in _MOVES:
            return self._labels.get(given[0]) if given else None
        indices: list[int] = []
        if name in _INDEXING:
            indices = [id(one) for one in _tensors(args[1]) if self._labels.get(one) == CPU]
        labels = [(one, self._labels.get(one)) for one in given if id(one) not in indices]
        wide = {label for one, label in labels if label is not None and one.dim()}
        single = {label for one, label in labels if label is not None and not one.dim()} - {CPU}
        both = wide | single
        if len(both) > 1:
            names = " and ".join(sorted(map(str, both)))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{names}! (in {name})"
            )
        if both:
            return both.pop()
        return CPU if any(label == CPU for _, label in labels) else None


class _Calls(TorchFunctionMode):
    """Above autograd: what Python asks of a device."""

    def __init__(self, labels: _Labels, count: int) -> None:
        super().__init__()
        self._labels, self._count = labels, count
        tensor: Any = Tensor
        self._special: dict[Any, Callable[..., Any]] = {
            tensor.device.__get__: lambda one: self._of(one),
            tensor.is_cuda.__get__: lambda one: self._of(one).type == "cuda",
            tensor.is_cpu.__get__: lambda one: self._of(one).type == "cpu",
            tensor.get_device: lambda one: -1 if self._of(one) == CPU else self._of(one).index,
            tensor.to: self._to,
            tensor.cuda: lambda one, device=None, *_, **__: self._move(one, device or "cuda"),
            tensor.cpu: lambda one, *_, **__: self._move(one, CPU),
            tensor.numpy: self._numpy(tensor.numpy),
            tensor.__array__: self._numpy(tensor.__array__),
            tensor.__deepcopy__: self._deepcopy,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = self._special.get(func)
        if special is not None:
            return special(*args, **kwargs)
        if func is torch.device and args and isinstance(args[0], int):
            return torch.device("cuda", args[0])  # a bare number asks for the machine's GPU
        wanted = kwargs.get("device")
        if wanted is not None:
            wanted = self._checked(wanted)
            kwargs["device"] = wanted if wanted.type == "meta" else CPU
        self._check_generator(kwargs.get("generator"), wanted, args)
        given = _tensors(args, {k: v for k, v in kwargs.items() if k != "generator"})
        found = func(*args, **kwargs)
        if wanted is None and given:
            return found
        for one in _tensors(found):
            device = wanted or CPU
            if device.type == "meta":
                continue
            if any(one is other for other in given) and self._of(one) != device:
                found = self._move(one, device)  # as_tensor of what lies elsewhere
            else:
                self._labels.set(one, device)
        return found

    def _of(self, tensor: Tensor) -> Device:
        real = tensor.device
        return real if real.type == "meta" else self._labels.get(tensor) or CPU

    def _checked(self, device: Any) -> Device:
        found = _normal(device)
        if found.type == "cuda" and (found.index or 0) >= self._count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {found}")
        return found

    def _move(self, tensor: Tensor, device: Any, dtype: Any = None) -> Tensor:
        target = self._checked(device)
        if target.type == "meta" or tensor.device.type == "meta":
            return tensor.to(target, dtype)
        if self._of(tensor) == target:
            return tensor if dtype is None else tensor.to(dtype)
        moved = tensor.to(dtype or tensor.dtype, copy=True)
        self._labels.set(moved, target)
        return moved

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        args, kwargs = (_Calls._named(tree) for tree in (list(args), kwargs))
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        for other in _tensors(args, kwargs):
            device, dtype = self._of(other), other.dtype
        if copy and (device is None or self._checked(device) == self._of(tensor)):
            return tensor.to(dtype or tensor.dtype, copy=True)
        return self._move(tensor, self._of(tensor) if device is None else device, dtype)

    @staticmethod
    def _named(values: Any) -> Any:
        """Bare numbers, which only a machine with a GPU can read, as devices."""
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in list(pairs):
            if type(value) is int and key in (0, "device"):
                values[key] = torch.device("cuda", value)
        return values

    def _numpy(self, func: Any) -> Callable[..., Any]:
        def refused_on_a_gpu(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._of(tensor) != CPU:
                raise TypeError(
                    f"can't convert {self._of(tensor)} device type tensor to numpy. Use "
                    f"Tensor.cpu() to copy the tensor to host memory first."
                )
            return func(tensor, *args, **kwargs)

        return refused_on_a_gpu

    def _deepcopy(self, tensor: Tensor, memo: Any) -> Tensor:
        found: Tensor = Tensor.__deepcopy__(tensor, memo)
        self._labels.set(found, self._of(tensor))
        return found

    def _check_generator(self, generator: Any, wanted: Device | None, args: Any) -> None:
        if generator is None:
            return
        on = getattr(generator, "label", CPU)
        tensors = _tensors(args)
        target = wanted or (self._of(tensors[0]) if tensors else CPU)
        if on != target:
            raise RuntimeError(
                f"Expected a {str(target)!r} device type for generator but found {str(on)!r}"
            )


class _Generator(torch.Generator):
    """A generator that says on which device it is."""

    label: Device

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made: _Generator = super().__new__(cls, "cpu")
        made.label = _normal(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> Device:  # type: ignore[override]
        return self.label


@contextlib.contextmanager
def simulated_gpus(count: int = 1) -> Iterator[None]:
    """This machine seems to have GPUs inside the block, in this thread.

    Tensors made before are on the CPU.
    """
    labels = _Labels()
    memory = 80 << 30
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "set_device": lambda *_: None,
        "mem_get_info": lambda *_: (memory, memory),
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "get_device_name": lambda *_: "simulated",
        "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_: True,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda: None))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(_Operations(labels))
        calls = stack.enter_context(_Calls(labels, count))
        run_backward = torch.autograd._engine_run_backward

        def with_calls(*args: Any, **kwargs: Any) -> Any:
            with calls:  # off inside a call, but backward functions in Python ask for devices too
                return run_backward(*args, **kwargs)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", with_calls))
        yield
