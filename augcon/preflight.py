"""What a run will take, by a trial on a part of it (AugCon's own). Steps 1 and 3 start it with --dry-run.

The requests are those of the run. So with the run's own server little is asked for twice: the run finds the replies of
the trial in its store.
"""

import dataclasses
import math
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from augcon.data import Answer, Ask, Query, Reply, Request, RootContext, ScorerPair
from augcon.llm.store import Store
from augcon.method.answers import AnswerRules, Graded, Search, Trial, answer_query, plan_search, try_examples
from augcon.method.diversity import DiverseQueries
from augcon.method.pairs import NEGATIVES, make_pair
from augcon.method.tree import Grown, TreeRules, fill_root
from augcon.ordered import map_in_order
from augcon.plan import DEMO_MODEL
from augcon.progress import bar
from augcon.run.cut import CorpusRules, read_corpus
from augcon.run.inputs import prompts_for, read_examples, text_for
from augcon.run.prices import Prices
from augcon.run.report import AnswerFigures, TreeFigures
from augcon.run.results import Results
from augcon.text.prompts import load_prompts
from config import Settings, pick

if TYPE_CHECKING:
    from augcon.llm.client import LLM

Item = TypeVar("Item")
Made = TypeVar("Made")
LONG_ENOUGH = 30.0  # seconds after which nothing more of a part is tried
FEW, MANY = 2, 256  # items tried together at first, then twice as many, and so on; and in all
SIZES = ("", " k", " M", " G")
ON_DISK = 5.5  # bytes for each byte of a reply: in the store, and in what is made of it


@dataclasses.dataclass(frozen=True)
class Cost:
    """Calls, tokens and seconds. Those of prompts include the ones in the server's cache; ``kept``: bytes on disk."""

    calls: float = 0
    prompt: float = 0
    cached: float = 0
    written: float = 0
    kept: float = 0
    seconds: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(times * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass
class Tried(Generic[Item, Made]):
    """A part of the work that was tried: items, what was made of them and took, and the tokens written a second."""

    items: list[Item] = dataclasses.field(default_factory=list)
    made: list[Made] = dataclasses.field(default_factory=list)
    costs: list[Cost] = dataclasses.field(default_factory=list)
    speed: float = 0.0

    def of(self, share: float) -> Cost:
        """What the whole will take, of which this is a ``share``."""
        if not self.items:
            return Cost()
        cost = sum(self.costs, Cost()) * (1 / share)
        return dataclasses.replace(cost, seconds=cost.written / self.speed if self.speed else math.nan)


async def attempt(
    settings: Settings, llm: "LLM", what: str, items: Sequence[Item], work: Callable[[Ask, Item], Awaitable[Made]]
) -> Tried[Item, Made]:
    """Does the work on items drawn at random, ever more at once, until that has taken long enough."""
    order, tried = random.Random(settings.seed).sample(items, min(len(items), MANY)), Tried[Item, Made]()
    longest = most = 0  # tokens of a prompt; of a reply, as allowed

    async def metered(item: Item) -> tuple[Made, Cost]:
        costs = [Cost()]

        async def ask(request: Request) -> Reply:
            reply = await llm.ask(request)
            size = len(reply.text.encode("utf-8", "replace"))
            nonlocal longest, most
            longest, most = max(longest, reply.prompt_tokens), max(most, request.max_tokens + llm.dialect.room)
            costs.append(Cost(1, reply.prompt_tokens, reply.cached_tokens, reply.written_tokens, size))
            progress.set_postfix_str(llm.state, refresh=False)
            progress.update(0)
            return reply

        return await work(ask, item), sum(costs, Cost())

    started, number = time.monotonic(), FEW
    with bar(len(order), f"trial of {what}", "items") as progress:
        while order and time.monotonic() - started < LONG_ENOUGH:
            batch, order, began = order[:number], order[number:], time.monotonic()
            async for item, (made, cost) in map_in_order(metered, batch, llm.servers.room):
                tried.items.append(item)
                tried.made.append(made)
                tried.costs.append(cost)
                progress.update()
            written = sum(cost.written for cost in tried.costs[-len(batch) :])
            tried.speed, number = written / max(time.monotonic() - began, 1e-3), 2 * number
    window = min(server.window for server in llm.servers.all)
    if longest + most > window:
        print(
            f"warning: prompts of {longest:,} tokens, as in the {what} tried, leave {max(0, window - longest):,.0f} of "
            f"the server's {window:,.0f} for a reply, which may take {most:,}; the longest will be cut off",
            file=sys.stderr,
        )
    if settings.speed or (llm.model == DEMO_MODEL and not settings.demo):  # which then stands in for a model
        tried.speed = settings.speed
    return tried


async def try_step_1(settings: Settings, results: Results, store: Store) -> None:
    """The recipe: grows trees over some root contexts and goes on with their queries as steps 1 to 3 do; figures."""
    from augcon.llm.client import LLM, Endpoint  # slow: not for --help

    cut = read_corpus(pick(CorpusRules, settings), results)
    cut.print()
    roots, rules = cut.roots, pick(TreeRules, settings)
    quota = sum(root.quota for root in roots)

    async def fill(ask: Ask, root: RootContext) -> Grown:
        return await fill_root(ask, prompts_for(root.text, settings.language), root, rules)

    async def worse(ask: Ask, drawn: tuple[str, Query]) -> ScorerPair | str:
        kind, query = drawn
        return await make_pair(ask, prompts_for(query.text, settings.language), roots[query.root], rules, kind, query)

    async with LLM(pick(Endpoint, settings), store) as llm:
        model = await llm.connect(settings.model, settings.api_model)
        print(f"server:  {settings.api_base} serves {model!r}")
        trees = await attempt(settings, llm, "trees", roots, fill)
        figures = TreeFigures()
        for grown in trees.made:
            figures.add(grown)
        figures.print()
        share = sum(root.quota for root in trees.items) / quota
        good = [query for grown in trees.made for query in grown.good_queries]
        wanted = min(settings.negatives, int(len(good) / share / len(NEGATIVES)))  # of each kind
        drawn = [(kind, query) for query in good[: min(wanted, len(good))] for kind in NEGATIVES]
        pairs = await attempt(settings, llm, "worse questions", drawn[:MANY], worse)
        some = trees.of(share) + pairs.of(len(pairs.items) / max(1, len(NEGATIVES) * wanted))
        nodes = sum(len(grown.nodes) for grown in trees.made) / share
        report(settings, llm, "step 1", some, f"{amount(nodes)} nodes (± {error_of(trees, quota):.0%}), ")
        queries = sum(len(node.queries) for grown in trees.made for node in grown.nodes) / share
        print(
            f"step 2:  about {len(NEGATIVES) * wanted:,} pairs to learn from in {settings.scorer_epochs} epochs, and "
            f"{amount(queries)} queries to score"
        )
        kept = [query for grown in trees.made for query in best(grown, settings.rouge_threshold)]
        later = await try_answers(settings, llm, roots, kept, share)
        report(settings, llm, "in all", some + later)


async def try_step_3(settings: Settings, results: Results, store: Store) -> None:
    """The recipe: answers some of the queries that step 2 has kept; figures."""
    from augcon.llm.client import LLM, Endpoint  # slow: not for --help

    queries = [query for _, listed in results.each_root(results.filtered_queries) for query in listed]
    roots = results.read_contexts() if results.contexts.exists() else []
    print(f"queries: {len(queries):,} to answer")
    async with LLM(pick(Endpoint, settings), store) as llm:
        await llm.connect(settings.model, settings.api_model)
        await try_answers(settings, llm, roots, queries, 1)


async def try_answers(
    settings: Settings, llm: "LLM", roots: Sequence[RootContext], queries: Sequence[Query], share: float
) -> Cost:
    """What step 3 takes for all queries, of which these are a ``share``; shows a pair in each language."""
    rules, examples = pick(AnswerRules, settings), read_examples(settings.qa_examples)
    languages = Counter(prompts_for(query.text, settings.language).language for query in queries)
    by_number = {root.root: root for root in roots}
    searches = {
        of: plan_search(examples, of, settings.examples_shown, settings.candidates, settings.seed) for of in languages
    }

    async def answer(ask: Ask, query: Query) -> Answer:
        prompts = prompts_for(query.text, settings.language)
        context, title = text_for(query, by_number.get(query.root), settings.answer_from)
        search = searches[prompts.language]
        drawn = search.shown(zlib.crc32(query.id.encode()) % len(search.sets))  # which will win is not known yet
        return await answer_query(ask, prompts, drawn, query, context, rules, title)

    async def grade(ask: Ask, drawn: tuple[Search, Trial]) -> Graded:
        search, (candidate, out) = drawn
        prompts = load_prompts(search.language)
        return await try_examples(ask, prompts, search.shown(candidate), search.examples[out], rules)

    trials = [(search, trial) for search in searches.values() for trial in search.trials()]
    searched = await attempt(settings, llm, "the search for examples", trials, grade)
    answers = await attempt(settings, llm, "answers", queries, answer)
    AnswerFigures.of(answers.made).print()
    cost = answers.of(share * len(answers.items) / max(1, len(queries)))
    cost += searched.of(len(searched.items) / max(1, len(trials)))
    report(settings, llm, "step 3", cost)
    return cost


def best(grown: Grown, threshold: float) -> list[Query]:
    """As many queries that differ as step 2 keeps of a root context, in the order of its trees."""
    diverse = DiverseQueries(threshold)
    differ = [query for node in grown.nodes for query in node.queries if diverse.offer(query.text)]
    return differ[: grown.root.quota]


def error_of(trees: Tried[RootContext, Grown], quota: int) -> float:
    """The relative error, by its 95% interval, of the calls foretold from some root contexts by their quotas."""
    calls, tried = sum(cost.calls for cost in trees.costs), sum(of.quota for of in trees.items)
    number = len(trees.items)
    if number < 2:
        return 1.0
    off = (cost.calls - of.quota * calls / tried for cost, of in zip(trees.costs, trees.items, strict=True))
    return 2 * math.sqrt(sum(each**2 for each in off) * number / (number - 1) * max(0.0, 1 - tried / quota)) / calls


def report(settings: Settings, llm: "LLM", what: str, cost: Cost, first: str = "") -> None:
    """Prints what something takes."""
    prices = Prices.read(settings.prices)
    money = prices and prices.of(cost.prompt, cost.cached, cost.written)
    print(
        f"{what + ':':<9}about {first}{amount(cost.calls)} calls, {amount(cost.prompt)} prompt tokens"
        + (f" ({cost.cached / cost.prompt:.0%} from the cache)" if cost.cached else "")
        + f", {amount(cost.written)} written tokens, {amount(ON_DISK * cost.kept)}B on disk"
        + ("" if math.isnan(cost.seconds) else f", {span(cost.seconds)}")
        + (f", cost {money:,.2f}" if prices else "")
    )


def amount(number: float) -> str:
    """A number with three digits that count."""
    size = min(int(math.log10(max(number, 1)) // 3), len(SIZES) - 1)
    return f"{float(f'{number:.3g}') / 1000**size:,.{3 if size else 4}g}{SIZES[size]}"


def span(seconds: float) -> str:
    """A time in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
