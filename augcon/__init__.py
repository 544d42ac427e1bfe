"""What AugCon's stage scripts share, a file a concept; and for use from Python, ``from augcon import generate``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from augcon.api import generate, read_pairs
    from augcon.errors import UserError

__all__ = ["UserError", "generate", "read_pairs"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and no more: the scripts start sooner without it."""
    if name not in __all__:
        raise AttributeError(f"module 'augcon' has no attribute {name!r}")
    from augcon import api

    return getattr(api, name)
