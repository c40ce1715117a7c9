"""Make packlight's own layout known to transformers, without importing it: at once where the user has imported it
already, and otherwise in the moment in which they do. Neither torch nor transformers.

Transformers keeps its quantization methods in `transformers.quantizers.auto`. Until that module is imported, a finder
in front of `sys.meta_path` waits for its name and for no other; it lets the usual finders find the module, has it
executed by its own loader, registers, and removes itself.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # type checkers take this name for true; importing `typing` takes as long as starting Python
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

WAITED_FOR = "transformers.quantizers.auto"


def register_on_import() -> None:
    """Register with transformers, now or when it is imported; a second call does nothing."""
    auto = sys.modules.get(WAITED_FOR)
    # A module whose import is still going on, in another thread or further up, lies here too and is not whole yet.
    if auto is not None and not getattr(auto.__spec__, "_initializing", False):
        register(auto)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register(auto: Any) -> None:
    """Add packlight's quantizer to transformers' lists, once.

    A transformers that has no such lists, or other ones, works on without packlight: what is wrong is logged.

    Args:
        auto: the module `transformers.quantizers.auto`.
    """
    try:
        from packlight.runtime.hf_quantizer import METHOD, PacklightConfig, PacklightQuantizer

        if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
            auto.register_quantization_config(METHOD)(PacklightConfig)
        if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantizer(METHOD)(PacklightQuantizer)
    except (ImportError, AttributeError, TypeError) as error:
        import logging  # takes longer than everything else here

        logging.getLogger(__name__).warning(
            "the installed transformers cannot load packlight's own artifacts (%s): packlight needs 5.17 or newer",
            error,
        )


# Finder and loader have the methods of importlib.abc's classes and not their types, whose import is slow too.


class _Finder:
    """Finds one module, through all the other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WAITED_FOR:
            return None
        for finder in list(sys.meta_path):
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]  # see above
                return spec
        return None


class _Loader:
    """A module's own loader, and then `register`."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Where the module's own code raises, the finder stays, for the next attempt."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader  # whoever reads its source or resources later finds nothing changed
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        register(module)
