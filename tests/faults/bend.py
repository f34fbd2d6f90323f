"""How a running program is bent: a function is exchanged wherever it was imported to, or gets something around it."""

import functools
import sys
from collections.abc import Callable
from typing import Any

FINISHED_IMPORTS = {"app": (), "worker": ("worker.tasks", "worker.slot"), "worker.dispatch": ()}
"""What each program imports only when it is needed."""
_OURS = ("app", "worker")


def exchange(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Put `replacement` wherever a module of the service refers to `function`."""
    places = [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.split(".")[0] in _OURS
        for name, value in list(vars(module).items())
        if value is function
    ]
    assert places, f"nobody uses {function.__qualname__}"
    for module, name in places:
        setattr(module, name, replacement)


def exchange_name(owner: Any, name: str, value: object) -> None:
    """Put another value under a name that a module or class has."""
    assert hasattr(owner, name), f"{owner} has no {name}"
    setattr(owner, name, value)


class Shadow:
    """Stands for a module in another one, with some names exchanged."""

    def __init__(self, module: Any, **changed: Any) -> None:
        self.__dict__.update(changed)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def exchange_method(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by what `make` makes of it."""
    setattr(owner, name, make(getattr(owner, name)))


def do_before(function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """Return the function with an act in front."""

    @functools.wraps(function)
    def changed(*arguments: Any, **named: Any) -> Any:
        act()
        return function(*arguments, **named)

    return changed


def do_after(function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """Return the function with an act at its end, where it returned."""

    @functools.wraps(function)
    def changed(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        act()
        return result

    return changed
