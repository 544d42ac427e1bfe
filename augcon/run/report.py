"""The figures at the end of a step."""

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from augcon.data import Answer, ScorerPair
from augcon.errors import one_line
from augcon.method.answers import Search
from augcon.method.diversity import likeness
from augcon.method.pairs import NEGATIVES
from augcon.method.questions import COPY, CUT
from augcon.method.tree import Grown, coverage
from augcon.run.prices import Prices
from augcon.run.results import ShortRoot
from augcon.text.units import language, length

if TYPE_CHECKING:
    from augcon.llm.client import LLM


def format_counts(counts: Counter[Any]) -> str:
    """Counts in words, the largest first; of many, the first eight."""
    words = [f"{name} {number:,}" for name, number in counts.most_common()]
    return ", ".join(words[:8] + [f"and {len(words) - 8:,} more"] * (len(words) > 8))


def format_skipped(skipped: Counter[str]) -> str:
    """What was skipped of a corpus, to be added to a line; nothing where nothing was."""
    return f", {skipped.total()} skipped ({format_counts(skipped)})" if skipped else ""


class TreeFigures:
    """The figures of step 1's trees, added up root by root."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.covered: list[tuple[int, list[float]]] = []  # of each tree, the length of its root and its coverage
        self.short: list[ShortRoot] = []

    def add(self, grown: Grown) -> None:
        """Counts the trees of one root context."""
        self.sums.update(roots=1, quota=grown.root.quota, diverse=grown.diverse)
        self.sums.update(passes=grown.passes, refills=grown.refills)
        for node in grown.nodes:
            self.outcomes[node.outcome] += 1
            self.sums.update(again=max(0, node.tries - 1), queries=len(node.queries), doubtful=bool(node.doubt))
            self.sums.update(copies=COPY in node.detail, cut=CUT in node.detail)
            if node.query is None and node.detail and COPY not in node.detail:
                self.lost[f"{node.outcome}: {node.detail}"] += 1
        for _, tree in itertools.groupby(grown.nodes, lambda node: node.pass_number):
            self.covered.append((grown.root.length, coverage(grown.root, list(tree))))
        if grown.shortfall:
            self.short.append(ShortRoot(grown.root.root, grown.root.quota, grown.shortfall))

    def table(self) -> dict[str, Any]:
        """The figures, for files."""
        depths = max((len(of) for _, of in self.covered), default=1) - 1
        covered = [round(self._covered(depth), 4) for depth in range(depths)]
        lost = {"lost": dict(self.lost), "short_roots": len(self.short)}
        return {**self.sums, "outcomes": dict(self.outcomes), **lost, "covered": covered}

    def print(self, short_roots: object = None) -> None:
        """Prints the figures; ``short_roots`` is the file that lists the roots short of their quota, if any does."""
        of = self.sums
        print(
            f"trees:   {self.outcomes.total():,} nodes in {of['passes']:,} passes: {format_counts(self.outcomes)}"
            + (f"; {of['refills']:,} of the passes for roots that step 2 left short" if of["refills"] else "")
            + (f"; asked again {of['again']:,} times" if of["again"] else "")
            + (f"; {of['cut']:,} cut in the middle" if of["cut"] else "")
        )
        if self.lost:
            print(f"lost:    {format_counts(self.lost)}")
        print(f"covered: {self._coverage()}")
        share = f"{of['diverse'] / of['quota']:.2f} of the quota"
        print(
            f"queries: {of['queries']:,}, of which mutually diverse within their root {of['diverse']:,} ({share})"
            + (f"; {of['doubtful']:,} doubtful: see doubt in nodes.jsonl" if of["doubtful"] else "")
            + (f"; {of['copies']:,} copies of the question above left out" if of["copies"] else "")
        )
        rest = f"; the others are listed with the reason in {short_roots}" if self.short and short_roots else ""
        print(f"roots:   {of['roots'] - len(self.short):,} of {of['roots']:,} have their quota{rest}")

    def _covered(self, depth: int) -> float:
        """The share of the corpus that asked leaves hold, of trees cut off below a depth; -1: with short parts."""
        shares = ((length, of[min(depth, len(of) - 2)] if depth >= 0 else of[-1]) for length, of in self.covered)
        return sum(length * share for length, share in shares) / sum(length for length, _ in self.covered)

    def _coverage(self) -> str:
        depths = max(len(of) for _, of in self.covered) - 1
        words = " ".join(f"{self._covered(depth):.2f}" for depth in range(depths))
        share = f"{self._covered(-1):.2f}"
        return f"{words} of the text by asked leaves, by depth from 0; with parts too short to be asked {share}"


def print_pairs(pairs: Sequence[ScorerPair], lost: Counter[str]) -> None:
    """Prints the figures of the scorer's pairs, and how alike the better and the worse question are."""
    print(f"pairs:   {len(pairs):,} for the scorer" + (f"; thrown away: {format_counts(lost)}" if lost else ""))
    if pairs:
        print("  worse question by            pairs  words shared with the better one (ROUGE-L)")
    for kind in NEGATIVES:
        if shared := [likeness(pair.pos_query, pair.neg_query) for pair in pairs if pair.type == kind]:
            print(f"  {kind:<26} {len(shared):>7,}  {statistics.fmean(shared):.2f}")


def print_search(search: Search) -> None:
    """Prints the figures of the search for examples in one language."""
    whose = "" if search.own else f"no examples in {search.language}, so those in other languages are used; "
    shown, there = len(search.sets[0]), len(search.examples)
    if len(search.sets) == 1:
        print(f"search:  {search.language}: {whose}no choice, {shown} of {there} examples are shown")
        return
    means = [mean for candidate in range(len(search.sets)) if (mean := search.mean(candidate)) is not None]
    ungraded = Counter(graded.detail for graded in search.graded.values() if graded.grade is None)
    graded = len(search.graded) - ungraded.total()
    outcome = "no set has half of its answers graded, so the first is used"
    if means:
        outcome = f"best mean {max(means):.2f}, mean of all {statistics.fmean(means):.2f}"
    print(
        f"search:  {search.language}: {whose}{len(search.sets)} sets of {shown} of {there} examples, "
        f"{graded:,} answers graded; {outcome}" + (f"; ungraded: {format_counts(ungraded)}" if ungraded else "")
    )


def print_answers(answers: Sequence[Answer], dropped_queries: object = None) -> None:
    """Prints the figures of the answers and a pair in each language; ``dropped_queries`` lists those without one."""
    kept = [answer for answer in answers if answer.text is not None]
    dropped = Counter(answer.reason for answer in answers if answer.text is None)
    again = sum(max(0, answer.tries - 1) for answer in answers)
    print(
        f"answers: {len(kept):,} of {len(answers):,} queries"
        + (f"; asked again {again:,} times" if again else "")
        + (f"; dropped: {format_counts(dropped)}" if dropped else "")
        + (f", listed in {dropped_queries}" if dropped and dropped_queries else "")
    )
    if kept:
        mean = statistics.fmean(length(answer.text or "") for answer in kept)
        print(f"length:  {mean:.0f} words or characters on average")
    for answer in {language(answer.query.text): answer for answer in reversed(kept)}.values():
        print(f"pair:    {one_line(answer.query.text, 160)} → {one_line(answer.text, 160)}")


@dataclasses.dataclass(frozen=True)
class CallFigures:
    """What asking the LLM took in one run of a step; tokens, seconds, and ``cost`` in the money of the prices.

    ``pace`` has samples of seconds since the start, calls and written tokens.
    """

    seconds: float
    calls: int
    replayed: int
    shared: int
    most_in_flight: int
    prompt_tokens: int
    cached_tokens: int
    written_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    retries: dict[str, int]
    cost: float | None
    pace: list[tuple[float, int, int]]

    @classmethod
    def of(cls, llm: "LLM", seconds: float, prices: Prices | None) -> "CallFigures":
        """The figures of the client, and of vLLM's prefix cache and speculation where it tells them."""
        counts, gained = llm.counts, llm.servers.gained
        prompt, written = counts["prompt tokens"], counts["reply tokens"]
        cached = min(prompt, counts["cached tokens"] or int(gained("prefix_cache_hits")))
        return cls(
            seconds=round(seconds, 1),
            calls=counts["calls"],
            replayed=counts["replayed"],
            shared=counts["shared"],
            most_in_flight=llm.most_in_flight,
            prompt_tokens=prompt,
            cached_tokens=cached,
            written_tokens=written,
            drafted_tokens=int(gained("spec_decode_num_draft_tokens")),
            accepted_tokens=int(gained("spec_decode_num_accepted_tokens")),
            retries={kind[9:]: number for kind, number in counts.items() if kind.startswith("retries: ")},
            cost=prices.of(prompt, cached, written) if prices else None,
            pace=llm.pace.samples,
        )

    def print(self) -> None:
        """Prints them on one line."""
        drafted, prompt = self.drafted_tokens, self.prompt_tokens
        retries = Counter({f"retries: {kind}": number for kind, number in self.retries.items()})
        rate = self.calls / max(self.seconds, 0.1)  # all that was replayed takes no time
        print(
            f"calls:   {self.calls:,} in this run ({rate:.0f}/s, up to {self.most_in_flight:,} in "
            f"flight), {self.replayed:,} replayed from the store, {self.shared:,} shared by equal requests, "
            f"{prompt:,} prompt tokens"
            + (f" ({self.cached_tokens / prompt:.0%} from the prefix cache)" if self.cached_tokens else "")
            + f" and {self.written_tokens:,} reply tokens"
            + (f" ({self.accepted_tokens / drafted:.0%} of {drafted:,} speculative tokens accepted)" if drafted else "")
            + (f", {format_counts(retries)}" if retries else "")
            + f"; {self.seconds:.0f} s"
            + ("" if self.cost is None else f"; cost {self.cost:,.2f}")
        )
