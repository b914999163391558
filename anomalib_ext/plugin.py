# SPDX-License-Identifier: Apache-2.0
"""The plugin mechanism that Anomalib lacks: models of other packages, under Anomalib's own names.

A package declares its model in the entry-point group ``anomalib.models``, with the class's name as name::

    [project.entry-points."anomalib.models"]
    MyModel = "my_package.models:MyModel"

The class must derive directly from ``AnomalibModule``, since Anomalib lists no other, and bear a name that
no other model has. The models are added when the import of ``anomalib.models`` ends, and not before.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["install"]

_MODELS = "anomalib.models"  # both the module that gains the models and the entry-point group
# What imports of Anomalib's models warn of, though no user of theirs can do anything about it.
_HINTS = (
    "Importing from timm.models.layers is deprecated",
    "The anomalib.models.components.dinov2 package is deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
_LOCK = threading.Lock()


def install() -> None:
    """Have every declared model added to ``anomalib.models``, whether that is imported yet or not.

    It imports nothing of Anomalib and does nothing without it. Calling it again has no effect.
    """
    with _LOCK:
        if any(isinstance(finder, _Finder) for finder in sys.meta_path):
            return
        sys.meta_path.insert(0, _Finder())
    models = sys.modules.get(_MODELS)
    if models is not None and models.__spec__ is not None:
        # `import anomalib.models` itself imports torch, which calls this function, so it may be under way.
        _after_import(models.__spec__, _add_all)


class _Finder(MetaPathFinder):
    """Has the models added after each later import, or reload, of ``anomalib.models``."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        # The command `anomalib` imports OpenVINO, which reports that, whatever is asked of it.
        is_in_command = fullname == "openvino" and "anomalib.cli" in sys.modules
        if fullname != _MODELS and not is_in_command:
            return None
        finders = sys.meta_path[sys.meta_path.index(self) + 1 :]  # those before have found nothing
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader) if fullname == _MODELS else _QuietLoader(spec.loader)
        return spec


class _Loader(Loader):
    """Executes ``anomalib.models`` by its own loader, without its hints, then adds the models."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        """Answer as the module's own loader, for whoever inspects the spec without importing it."""
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._give_back(module)
        for hint in _HINTS:
            warnings.filterwarnings("ignore", hint, append=True)  # what the user asks for counts first
        self._loader.exec_module(module)
        _add_all(_MODELS)

    def _give_back(self, module: ModuleType) -> None:
        """Leave the module as its own loader would."""
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader


class _QuietLoader(_Loader):
    """Executes ``openvino`` by its own loader, without what it reports to Intel."""

    def exec_module(self, module: ModuleType) -> None:
        from openvino_export.device import telemetry_hidden

        self._give_back(module)
        with telemetry_hidden():
            self._loader.exec_module(module)


class _ImportingSpec(ModuleSpec):
    """The spec of a module under way, which makes calls once its import has ended.

    The import system clears the flag ``_initializing`` in the end, whether the import failed or not. Until
    then other threads that want the module wait, so the calls come before it.
    """

    def __setattr__(self, name: str, value: object) -> None:
        try:
            if name == "_initializing" and not value:
                self.make_calls()
        finally:
            ModuleSpec.__setattr__(self, name, value)

    def make_calls(self) -> None:
        """Leave a plain spec behind and make the calls."""
        self.__class__ = ModuleSpec  # type: ignore[assignment]
        # `pop`, since two threads can come here, and each call is to be made once.
        for call in self.__dict__.pop("_calls", ()):
            call(self.name)


def _is_importing(spec: ModuleSpec) -> bool:
    return getattr(spec, "_initializing", False)


def _after_import(spec: ModuleSpec, call: Callable[[str], None]) -> None:
    """Pass the name of the spec's module to ``call`` once its import has ended, which may be now."""
    spec.__dict__.setdefault("_calls", []).append(call)
    spec.__class__ = _ImportingSpec
    if not _is_importing(spec):  # asked last, since another thread's import can end at any time
        _ImportingSpec.make_calls(spec)  # type: ignore[arg-type]


def _add_all(ended: str) -> None:
    """Add every declared model. The import of the module ``ended`` is to be taken as ended."""
    from importlib.metadata import entry_points

    for entry in sorted(entry_points(group=_MODELS)):  # by name, so that of two namesakes the same one always wins
        _add(entry, ended)


def _add(entry: "EntryPoint", ended: str) -> None:
    """Add one model, if need be after a later import; warn if it cannot be added."""
    models = sys.modules.get(_MODELS)
    if models is None:  # its import has failed, and says so itself
        return
    try:
        _set(models, entry)
    except (Exception, SystemExit) as error:  # ruff: ignore[blind-except]  # whatever a plugin does wrong, all else must go on
        # A model that imports, say, `anomalib.engine` fails while that is what imports `anomalib.models`,
        # and so does one whose own package is. So try again each time that an import under way has ended.
        spec = _innermost_import(ended)
        if spec is not None:
            _after_import(spec, partial(_add, entry))
        else:
            _warn(entry, error)


def _innermost_import(ended: str) -> ModuleSpec | None:
    """Return the spec of the module whose import began last, of those under way but ``ended``."""
    for module in reversed(list(sys.modules.values())):
        spec = getattr(module, "__spec__", None)
        if isinstance(spec, ModuleSpec) and spec.name != ended and _is_importing(spec):
            return spec
    return None


def _set(models: ModuleType, entry: "EntryPoint") -> None:
    """Import a model's class and set it in ``anomalib.models``, or raise what is wrong with it."""
    name = entry.name
    if not entry.pattern.match(entry.value):
        msg = f"{entry.value!r} is not of the form 'module:Class'"
        raise ValueError(msg)
    if entry.attr != name:
        msg = f"the entry point must be named as its class, not {name!r}"
        raise ValueError(msg)
    # Asked before the import: an imported class would stand in for its namesake, as names ignore case.
    if name.lower() in {other.lower() for other in models.__all__}:
        msg = f"the name {name!r} is taken by another model, so the class must be renamed"
        raise ValueError(msg)
    model = entry.load()
    if not isinstance(model, type) or models.AnomalibModule not in model.__bases__ or model.__name__ != name:
        msg = f"{entry.value!r} must be a class of that name, derived directly from AnomalibModule"
        raise TypeError(msg)
    setattr(models, name, model)
    models.ALLOWED_MODULES.add(entry.module)
    models.__all__.append(name)


def _warn(entry: "EntryPoint", error: BaseException) -> None:
    plugin = (entry.dist and entry.dist.name) or "unknown"
    msg = (
        f"Anomalib goes on without the model {entry.name!r} ({entry.value!r}) of the distribution {plugin!r}. "
        f"{type(error).__name__}: {error}. Repair, update or uninstall {plugin!r}."
    )
    warnings.warn(msg, stacklevel=2)
