"""Answers questions with the tuned model, or lets another model judge such answers (paper section 4).

Reads the test split of the corpus, or --questions. Asks the model that the server has, nothing but the question, and
writes results/outputs: a dataset of question and answer, in the order of the questions. Run it again and it goes on
where it was.

    python serve.py --model results/sft_model -- python inference.py

With --judge the server's model is the judge of outputs made before, of one model or of several: it grades each answer
from 1 to 5, and of two models says for each question whose answer is better. Writes judge.jsonl (a line a question),
judge.json (means with 95% intervals) and judge.png.

    python inference.py --judge results/outputs,base/outputs --api-base https://… --api-model judge
"""

import asyncio
import hashlib
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from augcon import progress
from augcon.errors import UserError, stage
from augcon.llm.client import LLM, Refused, Reply, Request
from augcon.llm.ordered import map_in_order
from augcon.llm.store import Store
from augcon.method import judging as judge
from augcon.method.judging import Grades
from augcon.run.corpus import Unreadable, read_corpus
from augcon.run.recipes import corpus_source, prompts_for, report_calls, say, server
from augcon.run.results import Results
from augcon.text.parse import without_thinking
from augcon.text.prompts import Prompts
from augcon.text.units import clean, length
from config import Settings, load_settings


@stage
def main() -> None:
    settings = load_settings(__doc__)
    print(settings.describe(), flush=True)
    results = Results(settings.results)
    recipe = judge_outputs if settings.judge else answer_questions
    with results.held(), Store(results.store) as store:
        asyncio.run(recipe(settings, results, store))


async def answer_questions(settings: Settings, results: Results, store: Store) -> None:
    """The recipe: questions, answers in their order, figures."""
    started = time.monotonic()
    asked, left_out = questions(settings)
    outputs = place_of(settings.outputs, results) if settings.outputs else results.outputs
    async with LLM(server(settings), store) as llm:
        model = await llm.connect(settings.model, settings.api_model)
        folder = Path(llm.folders.get(model) or model)
        # Where the server is on another machine, the model that was merged here tells one from the next.
        llm.weights = f"{folder} {state_of(folder) or state_of(results.sft_model)}"
        print(f"server:  {settings.api_base} serves {model!r}" + (f" from {folder}" if folder.is_dir() else ""))
        print(f"asked:   {len(asked):,} questions{left_out}")

        async def answer(question: str) -> Reply | str:
            """The reply, or why the server refuses the question."""
            messages = [{"role": "user", "content": question}]
            try:
                return await llm.ask(Request(messages, settings.answer_temperature, settings.answer_max_tokens))
            except Refused as error:
                return str(error)
            finally:
                bar.update()

        with progress.bar(len(asked), "answers", "answers") as bar:
            replies = [reply async for reply in map_in_order(answer, asked, 2 * settings.max_in_flight)]
        answers = [clean(without_thinking(reply.text)).strip() if isinstance(reply, Reply) else "" for reply in replies]
        refused = Counter(reply for reply in replies if isinstance(reply, str))
        if refused.total() == len(asked):
            raise UserError(
                f"the server refused every question ({say(refused)}); where it says too long, "
                f"lower --answer-max-tokens {settings.answer_max_tokens}"
            )
        results.write_dataset(outputs, {"question": asked, "answer": answers})
        empty = sum(isinstance(reply, Reply) and not text for reply, text in zip(replies, answers, strict=True))
        cut = sum(isinstance(reply, Reply) and not reply.complete for reply in replies)
        flaws = +Counter({"empty": empty, "cut off": cut, **{f"refused ({why})": n for why, n in refused.items()}})
        print(f"answers: {len(answers):,}" + (f", of them {say(flaws)}; all are kept in their place" if flaws else ""))
        print(f"length:  {statistics.fmean(map(length, answers)):.0f} an answer in the mean")
        report_calls(llm, time.monotonic() - started)
        print(f"made:    {outputs}")


def place_of(outputs: str, results: Results) -> Path:
    """The folder for the outputs. Raises UserError when it holds something else, for what is there is replaced."""
    place = Path(outputs).expanduser().resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        if place == results.sft_data.resolve():
            raise UserError(f"--outputs {outputs!r} is the SFT data itself; name another folder")
        try:
            judge.read_outputs(outputs)
        except UserError as error:
            raise UserError(
                f"--outputs {outputs!r} is there and holds no outputs, and would be replaced; name another folder"
            ) from error
    return place


def questions(settings: Settings) -> tuple[list[str], str]:
    """The questions, and in words what was left out. Raises UserError where there are none."""
    skipped: Counter[str] = Counter()
    kept = []
    try:
        for row in question_rows(settings):
            if isinstance(row, Unreadable):
                skipped[row.reason] += 1
            elif isinstance(row, str) and (question := clean(row).strip()):
                kept.append(question)
            else:
                skipped["empty" if isinstance(row, str) else "not a text"] += 1
    except UserError as error:
        if settings.questions:
            raise
        raise UserError(f"{error}; or name a file of questions with --questions") from error
    left_out = f", {skipped.total()} skipped ({say(skipped)})" if skipped else ""
    if not kept:
        raise UserError(f"{settings.questions or settings.corpus!r} has no question{left_out}")
    return kept, left_out


def question_rows(settings: Settings) -> Iterator[Any]:
    """The rows of the file of questions, or of the corpus's test split."""
    path = Path(settings.questions)
    if path.suffix.lower() != ".txt":
        source = settings.questions or corpus_source(settings)
        return read_corpus(source, settings.question_field, split="test", flag="--question-field")
    try:
        return iter(path.read_text(encoding="utf-8-sig").split("\n"))
    except (OSError, ValueError) as error:
        raise UserError(f"--questions: {path} cannot be read as text in UTF-8: {error}") from error


def state_of(folder: Path) -> str:
    """Names, sizes and times of a model's files, digested: two models merged into the same folder differ in it.

    Empty where the folder is not on this machine.
    """
    if not folder.is_dir():
        return ""
    files = sorted((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
    listing = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]


# Judging


async def judge_outputs(settings: Settings, results: Results, store: Store) -> None:
    """The recipe: outputs, grades, preferences where there are two, table and picture."""
    started = time.monotonic()
    outputs = {name: judge.read_outputs(name) for name in filter(None, map(str.strip, settings.judge.split(",")))}
    names = list(outputs)
    if not names:
        raise UserError(f"--judge {settings.judge!r} names no folder of outputs")
    asked = [question for question, _ in outputs[names[0]]]
    for name, pairs in outputs.items():
        if [question for question, _ in pairs] != asked:
            raise UserError(f"--judge: the questions in {name!r} are not those in {names[0]!r}, in their order")
    rules = judge.JudgeRules(settings.answer_max_tokens, settings.tries, settings.structured_output)
    window = 2 * settings.max_in_flight

    def prompts_of(question: str) -> Prompts:
        return prompts_for(settings, question)

    async with LLM(server(settings), store) as llm:
        model = await llm.connect(settings.model, settings.api_model)
        print(f"judge:   {model!r} at {settings.api_base}; {len(asked):,} questions, {len(names)} answers to each")
        with progress.bar(len(asked) * (len(names) + (len(names) == 2)), "judging", "calls") as bar:

            async def ask(request: Request) -> Reply:
                reply = await llm.ask(request)
                bar.update(request.sample == 0)
                return reply

            grades = {
                name: [graded async for graded in judge.grade_all(ask, prompts_of, pairs, rules, window)]
                for name, pairs in outputs.items()
            }
            better: list[int | str] = []
            if len(names) == 2:
                triples = [(question, a, b) for (question, a), (_, b) in zip(*outputs.values(), strict=True)]
                compared = judge.compare_all(ask, prompts_of, triples, rules, settings.seed, window)
                better = [place async for place in compared]
        report_judgement(settings, results, model, asked, grades, better)
        report_calls(llm, time.monotonic() - started)


def report_judgement(
    settings: Settings,
    results: Results,
    model: str,
    asked: list[str],
    grades: dict[str, list[Grades | str]],
    better: list[int | str],
) -> None:
    """Writes, prints and draws what the judge thinks. Raises UserError where nothing could be graded."""
    verdicts = [[*grades, "neither"][place] if isinstance(place, int) else None for place in better]
    rows = [
        {"question": question, "grades": {name: judge.row(of[n]) for name, of in grades.items()}}
        | ({"better": verdicts[n]} if better else {})
        for n, question in enumerate(asked)
    ]
    results.write_lines(results.judged, rows)
    reasons = Counter(reason for of in (*grades.values(), better) for reason in of if isinstance(reason, str))
    summary: dict[str, Any] = {name: judge.summary(of, settings.seed) for name, of in grades.items()}
    for name, means in summary.items():
        scores = [f"{score} {judge.in_words(means[score])}" for score in judge.SCORES if means[score]]
        print(f"grades:  {name}: {', '.join(scores) or 'none'}; {means['graded']:,} of {len(asked):,} answers graded")
    if better:
        won = Counter(verdict or "undecided" for verdict in verdicts)
        summary["better"] = {name: won[name] for name in (*grades, "neither", "undecided")}
        print("better:  " + ", ".join(f"{name} {number:,}" for name, number in summary["better"].items()))
    if reasons:
        print(f"lost:    {say(reasons)}")
    drawn = [name for name in grades if summary[name]["graded"]]
    if not drawn:
        raise UserError(f"no answer could be graded ({say(reasons)}); try another judge or --structured-output")
    results.write_json(results.judge, {"judge": model, **summary})
    judge.plot(results.judge_plot, drawn, [summary[name]["satisfaction"] for name in drawn])
    print(f"made:    {results.judged}, {results.judge}, {results.judge_plot}")


if __name__ == "__main__":
    main()
