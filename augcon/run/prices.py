"""What tokens cost."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Prices:
    """Money for a million tokens: of prompts, of prompts that the server has in its cache, and written."""

    prompt: float
    cached: float
    written: float

    @classmethod
    def read(cls, setting: str) -> "Prices | None":
        """The prices of the setting of that name, three numbers separated by commas; None where it is empty."""
        return cls(*map(float, setting.split(","))) if setting else None

    def of(self, prompt: float, cached: float, written: float) -> float:
        """What so many tokens cost; ``prompt`` counts those in the cache, too."""
        return ((prompt - cached) * self.prompt + cached * self.cached + written * self.written) / 1e6
