"""Reading a pickle as data: tensors, plain containers, and inert stand-ins for the known classes of training code.

Python's unpickler imports and calls whatever a file names. This one is a machine of its own over the opcodes that
`pickletools.genops` decodes: it never imports, calls or changes an object that existed before, so there is no door to
leave open. A name is looked up in the tables below the moment it is read, and an unknown one ends the reading.
"""

import math
import pickletools
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.errors import CheckpointError, UnsafeCheckpoint

# (dtype, key, number of elements) -> the elements as a tensor (n,)
Storage = Callable[[torch.dtype, str, int], Tensor]

# The modules of Python 2, and where numpy 2 keeps what all others kept elsewhere.
OTHER_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg",
                 "numpy._core.multiarray": "numpy.core.multiarray", "numpy._core.numeric": "numpy.core.numeric"}

STORAGES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool, "torch.storage.UntypedStorage": torch.uint8,
    "torch.storage._UntypedStorage": torch.uint8,
}
DTYPES = {str(dtype): dtype for dtype in STORAGES.values()} | {
    str(dtype): dtype for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
}

# Classes that training code leaves beside the weights. Reading one stores what the file says of it, and that is all.
INERT = frozenset(
    f"{module}.{name}"
    for module, names in {
        "builtins": "bool bytearray bytes complex dict float frozenset int list long object range set slice str tuple "
                    "unicode xrange",
        "collections": "OrderedDict defaultdict Counter deque",
        "datetime": "date datetime time timedelta timezone",
        "fsspec.implementations.local": "LocalFileSystem",
        "fsspec.spec": "make_instance",
        "numpy": "dtype ndarray bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy.core.numeric": "_frombuffer",
        "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "torch": "Tensor device",
        "torch.nn.parameter": "Parameter",
        "typing": "Any Dict List Optional Tuple Union",
        "_codecs": "encode", "argparse": "Namespace", "copyreg": "_reconstructor", "functools": "partial",
        "types": "SimpleNamespace", "uuid": "UUID",
    }.items()
    for name in names.split()
)
INERT_PREFIXES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "omegaconf.",
                  "torch.optim.", "torch.nn.modules.", "ldm.", "taming.", "main.", "__main__.")

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
KEY = re.compile(r"\w{1,64}")  # of a storage: a number, as torch.save gives it

# Opcodes whose argument is the value itself.
VALUES = frozenset([
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
])
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}


@dataclass(frozen=True)
class Global:
    """A name that a pickle may mention. `make` builds what calling it stands for; without it, a StandIn."""

    name: str
    make: Callable[..., Any] | None = field(default=None, compare=False)


@dataclass(eq=False, repr=False)
class StandIn:
    """What a pickle says of an object of a known class: the arguments, the state and the items, and no behaviour."""

    name: str
    arguments: tuple = ()
    state: Any = None
    items: list = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<stand-in for {self.name}>"


def tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> Tensor:
    """A view of a storage (n,). Raises ValueError where the numbers, which come from the file, lead outside it."""
    if not (isinstance(storage, Tensor) and isinstance(size, tuple) and isinstance(stride, tuple)) or metadata:
        raise ValueError("a tensor without a plain storage, size and stride")
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise ValueError(f"a tensor of size {size} and stride {stride}")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if count > storage.numel() or (count and last >= storage.numel()):
        raise ValueError(f"a tensor of size {size} in a storage of {storage.numel()} elements")
    return storage.as_strided(size, stride, offset)


def typed_tensor(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    """The same over a storage of bytes, for types that have no storage class of their own."""
    return tensor(storage.view(dtype), offset, size, stride, metadata=metadata)


def subclass_tensor(rebuild, kind, arguments, state) -> Tensor:
    """A tensor that was saved with attributes: its numbers alone."""
    if not isinstance(rebuild, Global) or rebuild.make not in (tensor, typed_tensor):
        raise ValueError("a tensor of an unknown class")
    return _call(rebuild, arguments)


def plain(items: Iterable) -> Iterable:
    """The items of a plain container; a tensor is one too for Python, with as many items as the file pleases."""
    if not isinstance(items, (list, tuple, dict, set)):
        raise ValueError(f"items in a {type(items).__name__}")
    return items.items() if isinstance(items, dict) else items


def pairs(items: Iterable = ()) -> dict:
    """A mapping from its (key, value) pairs, or from another mapping."""
    return {hashable(key): value for key, value in map(plain, plain(items))}


def elements(items: Iterable = ()) -> set:
    return {hashable(item) for item in plain(items)}


def hashable(key):
    """The key if its hash is cheap: one of a deeply nested tuple could exhaust the C stack."""
    flat = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, (str, bytes, int, float, type(None), torch.dtype, Global, StandIn)) for part in flat):
        raise ValueError(f"a key of type {type(key).__name__}")
    return key


MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": subclass_tensor,
    "torch.Size": lambda sizes=(): tuple(plain(sizes)),
    "collections.OrderedDict": pairs,
    "collections.Counter": pairs,
    "collections.defaultdict": lambda factory=None, items=(): pairs(items),
    "builtins.set": elements,
    "builtins.frozenset": elements,
}


def lookup(module: str, name: str, source) -> Global | torch.dtype:
    """What a name in a pickle stands for here. Raises UnsafeCheckpoint for a name in none of the tables."""
    if not (isinstance(module, str) and isinstance(name, str) and NAME.fullmatch(f"{module}.{name}")):
        raise ValueError("a name that is none")
    full = f"{OTHER_MODULES.get(module, module)}.{name}"
    for table in (STORAGES, DTYPES):
        if full in table:
            return table[full]
    if full in MAKERS:
        return Global(full, MAKERS[full])
    # A dotted name walks from one object to the next; no class that is met in checkpoints needs that.
    if full in INERT or (full.startswith(INERT_PREFIXES) and "." not in name):
        return Global(full)
    raise UnsafeCheckpoint(
        f"{source} asks to run {full[:100]}: weights need no code, so it was not read and nothing was run; "
        "get a .safetensors file, or one from a source that you trust"
    )


def unpickle(file: BinaryIO, storage: Storage | None = None, source="the file") -> Any:
    """Read the one pickle that starts where `file` stands; `source` is how errors name the file.

    Raises UnsafeCheckpoint where the pickle asks for a class or function that is not in the tables of this module, and
    CheckpointError where it is damaged or not a pickle.
    """
    try:
        # Python warns of odd escapes in texts, which only a damaged file has.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return Machine(storage, source).run(file)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source} is damaged ({what}): download it again") from error


class Machine:
    """The stack machine that a pickle is a program for."""

    def __init__(self, storage: Storage | None, source):
        self.storage, self.source = storage, source
        self.stack: list = []
        self.below: list[list] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        """Carry out the opcodes up to STOP and return what is then on top of the stack."""
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in VALUES:
                self.stack.append(argument)
            else:
                self.step(opcode.name, argument)
        raise ValueError("no end")

    def marked(self) -> list:
        """Everything since the last mark; the stack is again what it was there."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def step(self, name: str, argument) -> None:
        """Carry out one opcode that is more than a value."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(CONSTANTS[name])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET" | "EMPTY_TUPLE":
                stack.append(EMPTY[name]())
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.marked()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                items = self.marked()
                make = {"TUPLE": tuple, "LIST": list, "DICT": _by_twos, "FROZENSET": elements}[name]
                self.stack.append(make(items))
            case "APPEND" | "SETITEM":
                count = 1 if name == "APPEND" else 2
                items = stack[-count:]
                del stack[-count:]
                _extend(stack[-1], items)
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                items = self.marked()
                _extend(self.stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(lookup(*argument.split(" ", 1), self.source))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(lookup(module, attribute, self.source))
            case "REDUCE" | "NEWOBJ":
                arguments, known = stack.pop(), stack.pop()
                stack.append(_call(known, arguments))
            case "NEWOBJ_EX":
                _, arguments, known = stack.pop(), stack.pop(), stack.pop()
                stack.append(_call(known, arguments))
            case "INST":
                known = lookup(*argument.split(" ", 1), self.source)
                items = self.marked()
                self.stack.append(_call(known, tuple(items)))
            case "OBJ":
                known, *items = self.marked()
                self.stack.append(_call(known, tuple(items)))
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
            case "BINPERSID":
                stack.append(self.stored(stack.pop()))
            case "EXT1" | "EXT2" | "EXT4":
                raise UnsafeCheckpoint(f"{self.source} asks to run entry {argument} of copyreg's registry: refused")
            case _:
                raise ValueError(f"the opcode {name}, which weights do not need")

    def stored(self, identity) -> Tensor:
        """The storage that a persistent id names: ("storage", type, key, device, number of elements[, view])."""
        match identity:
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as count, *view) if not any(view):
                if self.storage is None or count < 0 or not KEY.fullmatch(key):
                    raise ValueError("a storage where none is expected")
                return self.storage(dtype, key, count)
        raise ValueError("a storage that is described in an unknown way")


def _call(known, arguments):
    if not isinstance(known, Global) or not isinstance(arguments, tuple):
        raise ValueError("a call of something that is not a class")
    return known.make(*arguments) if known.make else StandIn(known.name, arguments)


def _by_twos(items: list) -> dict:
    return pairs(list(zip(items[::2], items[1::2], strict=True)))


def _extend(container, items: list) -> None:
    """Put items into a list, a set or a stand-in, or alternating keys and values into a dict."""
    match container:
        case list():
            container.extend(items)
        case set():
            container |= elements(items)
        case dict():
            container.update(_by_twos(items))
        case StandIn():
            container.items.extend(items)
        case _:
            raise ValueError(f"items for a {type(container).__name__}")


def _set_state(target, state) -> None:
    """Store the state of a stand-in; containers and tensors are complete without theirs (OrderedDict._metadata ...)."""
    if isinstance(target, StandIn):
        target.state = state
    elif not isinstance(target, (dict, Tensor)):
        raise ValueError(f"a state for a {type(target).__name__}")
