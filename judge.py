"""Lets a model judge outputs of inference.py, of one model or of several (paper section 4).

Reads the folders of outputs. Asks the served model, the judge, to grade each answer from 1 to 5; of two models it also
says for each question whose answer is better. Writes into results/: judge.jsonl (the grades by question), judge.json
(means with 95% intervals) and judge.png.

    python judge.py --outputs results/outputs,base/outputs --api-base https://… --api-model judge
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from augcon.data import Grades, Pair, Reply, Request
from augcon.errors import UserError, stage
from augcon.files import new_picture, read_dataset, write_json, write_lines
from augcon.llm.store import Store
from augcon.method.answers import AnswerRules
from augcon.method.judging import SCORES, Mean, coins, compare, grade, means_of
from augcon.ordered import map_in_order
from augcon.progress import bar
from augcon.run.inputs import prompts_for
from augcon.run.prices import Prices
from augcon.run.recipe import run_recipe
from augcon.run.report import CallFigures, format_counts
from augcon.run.results import Results
from config import Settings, load_settings, pick

if TYPE_CHECKING:
    from augcon.llm.client import LLM


@dataclasses.dataclass
class Judgement:
    """What the judge thinks: by folder the grades of each answer, and of two folders which answer is better.

    ``better`` has the name of the folder, "neither", or None where that is not known; ``lost`` says why, in counts.
    """

    questions: list[str]
    grades: dict[str, list[Grades | None]]
    better: list[str | None]
    lost: Counter[str]


@stage
def main() -> None:
    run_recipe(judge_outputs, load_settings(__doc__, "inference and judging", "server"))


async def judge_outputs(settings: Settings, results: Results, store: Store) -> None:
    """The recipe: outputs, grades, preferences where there are two, table and picture."""
    from augcon.llm.client import LLM, Endpoint  # slow: not for --help

    started = time.monotonic()
    outputs = read_outputs(settings, results)
    number = len(next(iter(outputs.values())))
    async with LLM(pick(Endpoint, settings), store) as llm:
        model = await llm.connect(settings.model, settings.api_model)
        print(f"judge:   {model!r} at {settings.api_base}; {number:,} questions, {len(outputs)} answers to each")
        judgement = await ask_judge(settings, llm, outputs)
        write_judgement(settings, results, model, judgement)
        CallFigures.of(llm, time.monotonic() - started, Prices.read(settings.prices)).print()
        print(f"made:    {results.judged}, {results.judge}, {results.judge_plot}")


def read_outputs(settings: Settings, results: Results) -> dict[str, list[Pair]]:
    """The pairs in each folder of outputs. Raises UserError when they do not answer the same questions."""
    names = [name.strip() for name in (settings.outputs or str(results.outputs)).split(",") if name.strip()]
    if not names:
        raise UserError(f"--outputs {settings.outputs!r} names no folder of outputs")
    outputs = {name: read_dataset(Path(name), Pair, "inference.py") for name in names}
    asked = [pair.question for pair in outputs[names[0]]]
    for name, pairs in outputs.items():
        if [pair.question for pair in pairs] != asked:
            raise UserError(f"--outputs: the questions in {name!r} are not those in {names[0]!r}, in the same order")
    return outputs


async def ask_judge(settings: Settings, llm: "LLM", outputs: Mapping[str, Sequence[Pair]]) -> Judgement:
    """Has every answer graded, and of two folders the answers compared."""
    rules, room = pick(AnswerRules, settings), llm.servers.room
    folders = list(outputs.values())
    questions = [pair.question for pair in folders[0]]
    swapped = coins(len(questions), settings.seed)
    with bar(len(questions) * (len(folders) + (len(folders) == 2)), "judging", "calls") as progress:

        async def ask(request: Request) -> Reply:
            reply = await llm.ask(request)
            progress.set_postfix_str(llm.state, refresh=False)
            progress.update(request.sample == 0)
            return reply

        async def grades(pair: Pair) -> Grades | str:
            return await grade(ask, prompts_for(pair.question, settings.language), pair, rules)

        async def compared(place: int) -> int | str:
            first, second = folders[0][place], folders[1][place]
            prompts = prompts_for(first.question, settings.language)
            return await compare(ask, prompts, first, second, swapped[place], rules)

        graded = {name: [of async for _, of in map_in_order(grades, pairs, room)] for name, pairs in outputs.items()}
        places = range(len(questions)) if len(folders) == 2 else ()
        better = [each async for _, each in map_in_order(compared, places, room)]
    lost = Counter(each for of in graded.values() for each in of if isinstance(each, str))
    lost.update(each for each in better if isinstance(each, str))
    known = {name: [each if isinstance(each, Grades) else None for each in of] for name, of in graded.items()}
    names = [*outputs, "neither"]
    return Judgement(questions, known, [names[each] if isinstance(each, int) else None for each in better], lost)


def write_judgement(settings: Settings, results: Results, model: str, judged: Judgement) -> None:
    """Writes, prints and draws what the judge thinks. Raises UserError where nothing could be graded."""
    write_lines(results.judged, rows(judged))
    means = {name: means_of(list(filter(None, of)), settings.seed) for name, of in judged.grades.items()}
    summary: dict[str, object] = {"judge": model}
    for name, of in judged.grades.items():
        graded = len(of) - of.count(None)
        scores = {score: dataclasses.asdict(means[name][score]) if graded else None for score in SCORES}
        summary[name] = {"graded": graded, "ungraded": of.count(None), **scores}
        words = ", ".join(f"{score} {mean}" for score, mean in means[name].items()) or "none"
        print(f"grades:  {name}: {words}; {graded:,} of {len(of):,} answers graded")
    if judged.better:
        won = Counter(name or "undecided" for name in judged.better)
        summary["better"] = {name: won[name] for name in (*judged.grades, "neither", "undecided")}
        print("better:  " + ", ".join(f"{name} {won[name]:,}" for name in (*judged.grades, "neither", "undecided")))
    if judged.lost:
        print(f"lost:    {format_counts(judged.lost)}")
    drawn = {name: of["satisfaction"] for name, of in means.items() if of}
    if not drawn:
        reasons = format_counts(judged.lost)
        raise UserError(f"no answer could be graded ({reasons}); try another judge, or --structured-output")
    write_json(results.judge, summary)
    plot(results.judge_plot, drawn)


def rows(judged: Judgement) -> Iterator[dict[str, object]]:
    """The lines of judge.jsonl."""
    for n, question in enumerate(judged.questions):
        grades = {name: dataclasses.asdict(each) if (each := of[n]) else None for name, of in judged.grades.items()}
        yield {"question": question, "grades": grades} | ({"better": judged.better[n]} if judged.better else {})


def plot(path: Path, means: Mapping[str, Mean]) -> None:
    """One picture: the mean satisfaction with each folder of outputs, with its interval, in the order given."""
    with new_picture(path, width=max(4.0, 1.6 * len(means))) as axes:
        ends = [[of.mean - of.low for of in means.values()], [of.high - of.mean for of in means.values()]]
        axes.errorbar(range(len(means)), [of.mean for of in means.values()], yerr=ends, fmt="o-", capsize=5)
        for place, of in enumerate(means.values()):
            axes.annotate(f"{of.mean:.2f}", (place, of.mean), xytext=(7, 4), textcoords="offset points")
        axes.set_xticks(range(len(means)), list(means), rotation=20 if len(means) > 2 else 0)
        axes.set(xlim=(-0.5, len(means) - 0.5), ylabel="satisfaction (1 to 5), mean and 95% interval")


if __name__ == "__main__":
    main()
