"""A module and a function -> an object that is the module in everything but its forward; and who holds it, guarded.

It shares the module's whole state, so what is set, loaded or moved through either holds for both, and nothing in the
module or its blocks is replaced. A copy of it, or what is pickled of it, is the module's. Knows nothing about caching.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

from torch import nn

Forward = Callable[..., Any]

# What accelerate's hooks set on a module, two of which hold the forward that they replaced.
_ACCELERATES = ("_hf_hook", "_old_forward", "forward")


def stand_in(module: nn.Module, forward: Forward) -> nn.Module:
    """An object of a subclass of the module's class, over the very same attributes, that computes `forward`.

    Hooks of `register_forward_hook` run as on the module. accelerate's, which replace `forward`, are run around the
    function, whether they were added before or after.
    """
    kind = type(module)

    @functools.wraps(MethodType(kind.forward, module))
    def hooked(*args: Any, **kwargs: Any) -> Any:
        hook = vars(module).get("_hf_hook")
        if hook is None:
            return forward(*args, **kwargs)
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return hook.post_forward(module, forward(*args, **kwargs))

    def replace_forward(self: nn.Module, value: Forward) -> None:
        if "_hf_hook" not in vars(self) and value is not hooked and value != MethodType(kind.forward, module):
            raise ValueError("expected forward to be left alone while FastCacheHelper is enabled; disable it first")
        vars(self)["forward"] = value

    def get_forward(self: nn.Module) -> Forward:
        return hooked

    # A property of the class comes before an attribute of the object, which accelerate may have set on the module.
    subclass: Any = _subclass(kind, forward=property(get_forward, replace_forward), __reduce_ex__=_reduce_as(kind))
    twin = subclass.__new__(subclass)
    object.__setattr__(twin, "__dict__", vars(module))
    return twin


def guard(owner: Any, names: Collection[str]) -> None:
    """Have these attributes of an object refuse other values, until `release`.

    Its class gets a subclass in its place, of the same name.
    """
    kind: Any = type(owner)

    def set_attribute(self: Any, name: str, value: object) -> None:
        if name in names and value is not getattr(self, name):
            raise ValueError(
                f"expected {name} to be left alone while FastCacheHelper is enabled, got another "
                f"{type(value).__name__}; disable it first, and enable it again afterwards"
            )
        kind.__setattr__(self, name, value)

    owner.__class__ = _subclass(kind, __setattr__=set_attribute, __reduce_ex__=_reduce_as(kind), _guarded=kind)


def release(owner: Any) -> None:
    """Give an object its own class back, if it is guarded."""
    kind = vars(type(owner)).get("_guarded")
    if kind is not None:
        owner.__class__ = kind


def _subclass(kind: type, **own: object) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, **own})


def _reduce_as(kind: type) -> Callable[[Any, Any], object]:
    """How an object of a subclass is copied and pickled: as one of the class, without hooks."""

    def reduce(self: Any, protocol: Any) -> object:
        """By protocol 1, for later ones check that an object's class is the one that is named."""
        state = dict(vars(self))
        if "_hf_hook" in state or "forward" in state:  # accelerate's, which hold the forward that they replaced
            state = {
                name: value for name, value in state.items() if name not in ("_hf_hook", "_old_forward", "forward")
            }
        plain = object.__new__(kind)
        object.__setattr__(plain, "__dict__", state)
        return plain.__reduce_ex__(1)

    return reduce


def dismiss(twin: nn.Module, module: nn.Module) -> None:
    """Leave no trace of a stand-in on the module that it stood for."""
    for name in ("forward", "_old_forward"):  # where accelerate's hooks came or went meanwhile
        if vars(module).get(name) is twin.forward:
            vars(module)[name] = MethodType(type(module).forward, module)


def check_free(module: nn.Module) -> None:
    """Raise `ValueError` for a module that is a stand-in, is compiled, or whose `forward` was replaced."""
    if isinstance(vars(type(module)).get("forward"), property):
        raise ValueError("expected a pipeline without a FastCacheHelper, got one that another has enabled; disable it")
    if isinstance(getattr(module, "_orig_mod", None), nn.Module) or vars(module).get("_compiled_call_impl") is not None:
        raise ValueError(f"expected a {type(module).__name__} that is not compiled; put the uncompiled one back first")
    own = vars(module).get("forward")
    plain = MethodType(type(module).forward, module)
    if own is not None and own != plain and not {"_hf_hook", "_old_forward"} <= vars(module).keys():
        raise ValueError(
            f"expected a {type(module).__name__} with its own forward, got one whose forward was replaced, as "
            "DeepCacheSDHelper does; undo that first"
        )
