"""The figures at the end of a step."""

import dataclasses
import itertools
import operator
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from augcon.data import Answer, ScorerPair
from augcon.errors import one_line
from augcon.method.answers import Search
from augcon.method.diversity import likeness
from augcon.method.pairs import NEGATIVES
from augcon.method.questions import COPY, CUT
from augcon.method.tree import Grown, coverage
from augcon.run.prices import Prices
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


@dataclasses.dataclass
class TreeFigures:
    """The figures of step 1's trees, added up root by root, and part by part.

    ``trees`` is the length of the root contexts of all trees. Of that, asked leaves hold ``held`` by depth, of trees
    cut off below it, and with parts too short to be asked ``held_with_short``. ``short`` counts the roots that are
    short of their quota.
    """

    sums: Counter[str] = dataclasses.field(default_factory=Counter)
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    lost: Counter[str] = dataclasses.field(default_factory=Counter)
    trees: int = 0
    held: list[float] = dataclasses.field(default_factory=list)
    held_with_short: float = 0
    short: int = 0

    def add(self, grown: Grown) -> None:
        """Counts the trees of one root context."""
        length = grown.root.length
        self.sums.update(roots=1, quota=grown.root.quota, diverse=grown.diverse)
        self.sums.update(passes=grown.passes, refills=grown.refills)
        for node in grown.nodes:
            self.outcomes[node.outcome] += 1
            self.sums.update(again=max(0, node.tries - 1), queries=len(node.queries), doubtful=bool(node.doubt))
            self.sums.update(copies=COPY in node.detail, cut=CUT in node.detail)
            if node.query is None and node.detail and COPY not in node.detail:
                self.lost[f"{node.outcome}: {node.detail}"] += 1
        for _, tree in itertools.groupby(grown.nodes, lambda node: node.pass_number):
            *held, with_short = coverage(grown.root, list(tree))
            self._add_held([length * share for share in held])
            self.held_with_short += length * with_short
            self.trees += length
        self.short += bool(grown.shortfall)

    def __iadd__(self, other: "TreeFigures") -> "TreeFigures":
        """Adds the figures of other root contexts."""
        for mine, theirs in ((self.sums, other.sums), (self.outcomes, other.outcomes), (self.lost, other.lost)):
            mine.update(theirs)
        self._add_held(other.held)
        self.held_with_short += other.held_with_short
        self.trees += other.trees
        self.short += other.short
        return self

    def _add_held(self, held: Sequence[float]) -> None:
        """Adds up by depth. Where one has fewer depths, its deepest counts for all below."""
        depths = max(len(self.held), len(held))
        mine, theirs = ([*of, *[of[-1] if of else 0.0] * (depths - len(of))] for of in (self.held, held))
        self.held = list(map(operator.add, mine, theirs))

    def table(self) -> dict[str, Any]:
        """The figures, for files."""
        covered = [round(held / self.trees, 4) for held in self.held]
        lost = {"lost": dict(self.lost), "short_roots": self.short}
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
        print(
            f"covered: {' '.join(f'{held / self.trees:.2f}' for held in self.held)} of the text by asked leaves, by "
            f"depth from 0; with parts too short to be asked {self.held_with_short / self.trees:.2f}"
        )
        share = f"{of['diverse'] / of['quota']:.2f} of the quota"
        print(
            f"queries: {of['queries']:,}, of which mutually diverse within their root {of['diverse']:,} ({share})"
            + (f"; {of['doubtful']:,} doubtful: see doubt in nodes.jsonl" if of["doubtful"] else "")
            + (f"; {of['copies']:,} copies of the question above left out" if of["copies"] else "")
        )
        rest = f"; the others are listed with the reason in {short_roots}" if self.short and short_roots else ""
        print(f"roots:   {of['roots'] - self.short:,} of {of['roots']:,} have their quota{rest}")


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


@dataclasses.dataclass
class AnswerFigures:
    """The figures of step 3's answers, added up part by part; ``length`` is that of all kept, ``pairs`` the first one
    in each language."""

    queries: int = 0
    kept: int = 0
    again: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    length: int = 0
    pairs: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> "AnswerFigures":
        """The figures of some answers."""
        figures = cls()
        for answer in answers:
            figures.queries += 1
            figures.again += max(0, answer.tries - 1)
            if answer.text is None:
                figures.dropped[answer.reason] += 1
                continue
            figures.kept += 1
            figures.length += length(answer.text)
            figures.pairs.setdefault(language(answer.query.text), (answer.query.text, answer.text))
        return figures

    def __iadd__(self, other: "AnswerFigures") -> "AnswerFigures":
        """Adds the figures of other answers, which come later."""
        self.queries += other.queries
        self.kept += other.kept
        self.again += other.again
        self.dropped.update(other.dropped)
        self.length += other.length
        self.pairs = {**other.pairs, **self.pairs}
        return self

    def print(self, dropped_queries: object = None) -> None:
        """Prints them, and a pair in each language; ``dropped_queries`` lists the queries without an answer."""
        print(
            f"answers: {self.kept:,} of {self.queries:,} queries"
            + (f"; asked again {self.again:,} times" if self.again else "")
            + (f"; dropped: {format_counts(self.dropped)}" if self.dropped else "")
            + (f", listed in {dropped_queries}" if self.dropped and dropped_queries else "")
        )
        if self.kept:
            print(f"length:  {self.length / self.kept:.0f} words or characters on average")
        for question, answer in self.pairs.values():
            print(f"pair:    {one_line(question, 160)} → {one_line(answer, 160)}")


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

    def beside(self, others: Sequence["CallFigures"]) -> "CallFigures":
        """With what others asked meanwhile, whose pace is left out."""
        every = [self, *others]
        counts = [name for name, value in vars(self).items() if isinstance(value, int)]
        return dataclasses.replace(
            self,
            **{name: sum(getattr(of, name) for of in every) for name in counts},
            retries=dict(sum((Counter(of.retries) for of in every), Counter[str]())),
            cost=None if self.cost is None else sum(of.cost or 0 for of in every),
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
