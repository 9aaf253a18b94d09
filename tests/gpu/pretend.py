"""A GPU that is not there: tensors that claim to be on ``cuda:0`` and keep their values in host memory.

Whole runs then take the paths that they take on a GPU, with CUDA's autocast and the attention kernels that it would choose, and
it is counted how often the host waits for the device. What CUDA refuses is refused: an operation on tensors of two devices, and
random numbers on the device from a generator of the host. Speed, memory and the bits of a GPU's results cannot be seen.

Used through :func:`tests.gpu.launch.on_pretended_gpu`, which preloads ``runtime.c``: streams, events, page-locked memory and
the device's properties are torch's own objects over that library.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
#: packages by whose lines a wait is named; the innermost line of ldm, and the innermost line of any of them
NAMED = ("ldm/", "lightning/", "diffusers/", "transformers/", "torchmetrics/", "lpips/", "tests/")
#: operations without a kernel of their own
ALLOCATIONS = ("empty", "new_empty", "record_stream", "is_pinned", "sym_")
#: operations that take indices from the host, which they copy to the device
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
#: operations, not marked as pointwise, that take scalars from the host
TAKES_HOST_SCALARS = ("fill", "masked_fill", "_foreach", "_fused_adam", "clamp", "scatter")


@dataclass
class Counts:
    """What has been asked of the device so far."""

    #: times that the host could not continue before the device had finished, by reason and line
    waits: Counter[str] = field(default_factory=Counter)
    #: kernels, by operation; one for a ``_foreach`` operation
    launches: Counter[str] = field(default_factory=Counter)
    #: tensors of float64 on the device, by line: no other device than CUDA has them
    doubles: Counter[str] = field(default_factory=Counter)
    #: kernels launched between the recording of an event and the host's wait for it, by line: with many, the device still has
    #: work, and is done with what the event stands for
    lags: list[tuple[str, int]] = field(default_factory=list)

    def wait(self, why: str) -> None:
        self.waits[f"{why} at {line()}"] += 1

    def copy(self) -> Counts:
        return Counts(self.waits.copy(), self.launches.copy(), self.doubles.copy(), self.lags.copy())

    def since(self, before: Counts) -> Counts:
        """What has been added to an earlier copy."""
        return Counts(
            self.waits - before.waits,
            self.launches - before.launches,
            self.doubles - before.doubles,
            self.lags[len(before.lags) :],
        )


COUNTS = Counts()


def line() -> str:
    """Where the program is: the innermost line of ldm, and the innermost one of the libraries if that is another."""
    places = []
    for frame in traceback.extract_stack():
        name = frame.filename.rpartition("site-packages/")[2]
        name = name if name != frame.filename else name[name.rfind("/ldm/") + 1 :] if "/ldm/" in name else name
        if name.startswith(NAMED):
            places.append(f"{name}:{frame.lineno}")
    ours = [place for place in places if place.startswith("ldm/")]
    return " via ".join(dict.fromkeys([*ours[-1:], *places[-1:]])) or "a line of torch"


class DeviceTensor(Tensor):
    """A tensor on ``cuda:0``, whose values are those of ``host``."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device("cuda", 0),
        )

    def __init__(self, host: Tensor):
        self.host = host
        if host.dtype in (torch.float64, torch.complex128):
            COUNTS.doubles[line()] += 1

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return dispatch(function, args, kwargs or {})

    # with these two methods torch moves a module's parameters to the device in place, as it does on a true one
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> DeviceTensor:
        return DeviceTensor(inner["host"])

    # what torch does in C++ below the dispatcher
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor of cuda:0 has no NumPy array; copy it to the host first")

    def storage(self) -> Any:  # safetensors compares pointers, to find tensors that share memory
        return self.host._typed_storage()

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def __format__(self, form: str) -> str:
        return format(self.item() if self.dim() == 0 else self.host, form)

    def __repr__(self, **_: Any) -> str:
        return f"{self.host!r} on cuda:0"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)


class OnDevice(TorchDispatchMode):
    """Within this context ``device="cuda"`` makes a :class:`DeviceTensor`."""

    def __enter__(self):
        self._lifts_all = not torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): first on the host, then copied
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(not self._lifts_all)
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def host_of(value: Any) -> Any:
    """A tensor of the device, or the device, as what stands for it on the host."""
    if isinstance(value, DeviceTensor):
        return value.host
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def dispatch(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation of ATen: on the device if a tensor is there, or if a tensor is asked for there."""
    name = function._schema.name.partition("::")[2]
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    on_device = any(isinstance(operand, DeviceTensor) for operand in operands)
    if not on_device and (asked is None or asked.type != "cuda"):
        return function(*args, **kwargs)
    if name in COPIES:
        return COPIES[name](*args, **kwargs)
    if name in ("lift", "lift_fresh", "record_stream"):
        return args[0]
    if asked is not None and asked.type != "cuda":  # one like another, on the host
        return function(*tree_map(host_of, args), **tree_map(host_of, kwargs))
    check(function, name, operands, args, kwargs)
    if waits(function, name, args):
        COUNTS.wait(name)
    if not (function.is_view or name.startswith(ALLOCATIONS) or name == "detach"):
        COUNTS.launches[name] += 1
    if name.startswith("_scaled_dot_product_") and "math" not in name:
        return tree_map(placed, attention(function, args, kwargs))
    found = function(
        *tree_map(host_of, args), **tree_map(host_of, kwargs) | ({"pin_memory": False} if "pin_memory" in kwargs else {})
    )
    own = {id(operand.host): operand for operand in operands if isinstance(operand, DeviceTensor)}  # changed in place
    return tree_map(lambda value: own.get(id(value), placed(value)), found)


def placed(value: Any) -> Any:
    """A tensor as one of the device."""
    return DeviceTensor(value) if isinstance(value, Tensor) else value


def check(function: Any, name: str, operands: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise :class:`RuntimeError` for what CUDA refuses."""
    on_host = [operand for operand in operands if not isinstance(operand, DeviceTensor)]
    scalars = torch.Tag.pointwise in function.tags or name.startswith(TAKES_HOST_SCALARS)
    wrong = [] if name in INDEXING else [operand for operand in on_host if operand.dim() > 0 or not scalars]
    if wrong and len(wrong) < len(operands):
        raise RuntimeError(f"{name} on tensors of cuda:0 and of the host, {[tuple(each.shape) for each in wrong]}, at {line()}")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name} on cuda:0 with a generator of the host, at {line()}")


def waits(function: Any, name: str, args: tuple) -> bool:
    """Whether the host needs a value from the device before it can continue: the result, or the result's size."""
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        filled = name != "index" and args[2].numel() == 1  # by a mask: becomes masked_fill
        return any(
            not isinstance(index, DeviceTensor) or (index.dtype in (torch.bool, torch.uint8) and not filled)
            for index in indices
        )
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return not tags.isdisjoint(function.tags) or name.startswith("linalg_eig")


# -- copies -------------------------------------------------------------------------------------------------------------


def to_copy(
    source: Tensor, *, device: Any = None, non_blocking: bool = False, pin_memory: Any = None, **options: Any
) -> Tensor:
    """``Tensor.to``."""
    target = source.device if device is None else torch.device(device)
    if target.type not in ("cpu", "cuda"):
        return aten._to_copy(host_of(source), device=target, **options)
    made = aten._to_copy(host_of(source), **options)
    if target.type == "cpu" and non_blocking:
        made = made.pin_memory()  # torch allocates page-locked memory then
    result = DeviceTensor(made) if target.type == "cuda" else made
    copied(source, result, non_blocking)
    return result


def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``Tensor.copy_``."""
    aten.copy_(host_of(target), host_of(source))
    copied(source, target, non_blocking)
    return target


def copy_each(targets: list[Tensor], sources: list[Tensor], non_blocking: bool = False) -> None:
    """``torch._foreach_copy_``."""
    for target, source in zip(targets, sources, strict=True):
        copy(target, source, non_blocking)


COPIES = {"_to_copy": to_copy, "copy_": copy, "_foreach_copy_": copy_each}


def copied(source: Tensor, target: Tensor, non_blocking: bool) -> None:
    """Count a copy: the host waits for one to or from it, unless asked not to; and page-locked memory is needed for that."""
    upload, download = (isinstance(each, DeviceTensor) for each in (target, source))
    if upload == download:
        COUNTS.launches["copy_"] += 1
        return
    if not (non_blocking and (source if upload else target).is_pinned()):
        where = "not page-locked" if non_blocking else "blocking"
        COUNTS.wait(f"copy to the {'device' if upload else 'host'}, {where},")


# -- attention ----------------------------------------------------------------------------------------------------------


def attention(function: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """A fused attention kernel of CUDA, computed by the host's, in the form of the one that was asked for."""
    schema = function._schema
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    given = tree_map(host_of, given)
    q, k, v, bias = given["query"], given["key"], given["value"], given.get("attn_bias")
    options = {"attn_mask": bias, "scale": given.get("scale")}
    causal = given.get("is_causal", False)
    if not function._schema.name.endswith("_backward"):
        found = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, **options)
        kinds = [returned.type.kind() for returned in schema.returns[2:]]
        return *found, *(torch.zeros((), dtype=torch.int64) if kind == "TensorType" else k.shape[2] for kind in kinds)
    gradient = given["grad_out_"] if "grad_out_" in given else given["grad_out"]
    out, lse = given["out"], given["logsumexp"]
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(gradient, q, k, v, out, lse, 0.0, causal, **options)
    return *found, *[None] * (len(schema.returns) - 3)


# -- the context --------------------------------------------------------------------------------------------------------


def counted(why: str) -> Callable[..., None]:
    """A replacement of a function that waits for the device."""
    return lambda *_, **__: COUNTS.wait(why)


class Nothing(nullcontext):
    """A context that does nothing, also as a decorator."""

    def __call__(self, function: Any) -> Any:
        return function


@contextmanager
def pretended_gpu() -> Iterator[Counts]:
    """A process's only GPU, for this thread and for those that start within."""
    run_thread, record = threading.Thread.run, torch.cuda.Event.record

    def run_thread_on_device(thread: threading.Thread) -> None:
        with OnDevice():
            run_thread(thread)

    def recorded(event: Any, stream: Any = None) -> None:
        event.launches = COUNTS.launches.total()
        record(event, stream)

    def waited(event: Any) -> None:
        COUNTS.lags.append((line(), COUNTS.launches.total() - event.launches))

    replaced = [
        (threading.Thread, "run", run_thread_on_device),
        (torch.cuda.Event, "record", recorded),
        (torch.cuda.Event, "synchronize", waited),
        (torch.cuda.Stream, "synchronize", counted("Stream.synchronize")),
        (torch.cuda, "synchronize", counted("synchronize")),
        (torch.accelerator, "synchronize", counted("synchronize")),
        # a DeviceTensor needs a version counter, which tensors of inference mode have not
        (torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else Nothing()),
    ]
    with ExitStack() as stack:
        for place, name, by in replaced:
            stack.enter_context(mock.patch.object(place, name, by))
        for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            types = import_module(module)._foreach_supported_types  # of other types, parameters are updated one by one
            types.append(DeviceTensor)
            stack.callback(types.remove, DeviceTensor)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # its threads would not see the context
        stack.enter_context(OnDevice())
        yield COUNTS
