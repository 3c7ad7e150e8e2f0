"""A module and a function -> an object that is the module in everything but its forward.

It shares the module's whole state, so what is set, loaded or moved through either holds for both, and nothing in the
module or its blocks is replaced. Knows nothing about caching.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

Forward = Callable[..., Any]


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
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    subclass: Any = type(kind.__name__, (kind,), {**names, "forward": property(get_forward, replace_forward)})
    twin = subclass.__new__(subclass)
    object.__setattr__(twin, "__dict__", vars(module))
    return twin


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
