"""Answers questions with the tuned model.

Reads the test split of the corpus, or --questions. Asks the served model each question alone, and writes
results/outputs: a dataset of question and answer, in the order of the questions. Run it again and it goes on where it
was. judge.py grades the outputs.

    python serve.py --model results/sft_model -- python inference.py
"""

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from augcon.data import Pair, Refused, Reply, Request
from augcon.errors import UserError, stage
from augcon.files import digest, read_dataset, write_dataset
from augcon.llm.store import Store
from augcon.ordered import map_in_order
from augcon.progress import bar
from augcon.run.corpus import is_of_rows
from augcon.run.inputs import names_in
from augcon.run.prices import Prices
from augcon.run.recipe import run_recipe
from augcon.run.report import CallFigures, format_counts, format_skipped
from augcon.run.results import Results
from augcon.run.rows import Unreadable, read_column, text_of
from augcon.text.parse import without_thinking
from augcon.text.prompts import disarm
from augcon.text.units import clean, length
from config import Settings, load_settings, pick

if TYPE_CHECKING:
    from augcon.llm.client import LLM


@stage
def main() -> None:
    run_recipe(answer_questions, load_settings(__doc__, "inference and judging", "server"))


async def answer_questions(settings: Settings, results: Results, store: Store) -> None:
    """The recipe: questions, answers in their order, figures."""
    from augcon.llm.client import LLM, Endpoint  # slow: not for --help

    started = time.monotonic()
    questions, blank = read_questions(settings)
    outputs = outputs_folder(settings, results)
    async with LLM(pick(Endpoint, settings), store) as llm:
        model = await llm.connect(settings.model, settings.api_model)
        folder = Path(llm.served.get(model) or model)
        # Where the server is on another machine, the model that was merged here tells one from the next.
        llm.weights = f"{folder} {files_digest(folder) or files_digest(results.sft_model)}"
        print(f"server:  {settings.api_base} serves {model!r}" + (f" from {folder}" if folder.is_dir() else ""))
        asked = len(questions) - blank.total()
        print(f"asked:   {asked:,} questions{format_skipped(blank)}")
        replies = await ask_all(settings, llm, questions)
        refused = Counter(reply for reply in replies if isinstance(reply, str))
        if refused.total() == asked:
            raise UserError(
                f"the server refused every question ({format_counts(refused)}); if they are too long, "
                f"lower --answer-max-tokens {settings.answer_max_tokens}"
            )
        written = [reply.text if isinstance(reply, Reply) else "" for reply in replies]  # empty where refused or blank
        answers = [clean(without_thinking(text)).strip() for text in written]
        pairs = zip(questions, answers, strict=True)
        write_dataset(outputs, ({"question": question, "answer": answer} for question, answer in pairs))
        flaws = Counter({f"refused ({reason})": number for reason, number in refused.items()})
        flaws["without a question"] = blank.total()
        flaws["empty"] = answers.count("") - flaws.total()
        flaws["cut off"] = sum(isinstance(reply, Reply) and not reply.complete for reply in replies)
        kept = f", of them {format_counts(+flaws)}; all are kept in their place" if +flaws else ""
        print(f"answers: {len(answers):,}{kept}")
        print(f"length:  {statistics.fmean(map(length, answers)):.0f} words or characters on average")
        CallFigures.of(llm, time.monotonic() - started, Prices.read(settings.prices)).print()
        print(f"made:    {outputs}")


def read_questions(settings: Settings) -> tuple[list[str], Counter[str]]:
    """The question of each row, and how many are blank, by reason. Raises UserError where all are."""
    try:
        rows = list(map(text_of, question_rows(settings)))
    except UserError as error:
        if settings.questions:
            raise
        raise UserError(f"{error}; or name a file of questions with --questions") from error
    blank = Counter(row.reason for row in rows if isinstance(row, Unreadable))
    if len(rows) == blank.total():
        raise UserError(f"{settings.questions or settings.corpus!r} has no question{format_skipped(blank)}")
    return ["" if isinstance(row, Unreadable) else row.strip() for row in rows], blank


def question_rows(settings: Settings) -> Iterator[Any]:
    """The rows of the file of questions, of a .txt file its lines with text, or of the corpus's test split.

    Raises UserError where they would be articles.
    """
    path = Path(settings.questions)
    if path.suffix.lower() != ".txt":
        sources = [settings.questions] if settings.questions else names_in(settings.corpus)
        for source in sources:
            if not is_of_rows(source):
                raise UserError(f"{source!r} holds whole articles, and no questions")
        columns = (read_column(source, settings.question_field, "test", "--question-field") for source in sources)
        return itertools.chain.from_iterable(columns)
    try:
        return filter(str.strip, path.read_text(encoding="utf-8-sig").split("\n"))
    except (OSError, ValueError) as error:
        raise UserError(f"--questions: cannot read {path} as UTF-8 text: {error}") from error


def outputs_folder(settings: Settings, results: Results) -> Path:
    """Where the answers go. Raises UserError when something other than outputs would be replaced there."""
    folder = Path(settings.outputs).expanduser().resolve() if settings.outputs else results.outputs
    if folder != results.outputs and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        try:
            read_dataset(folder, Pair, "inference.py")
        except UserError as error:
            message = f"--outputs {settings.outputs!r} holds something other than outputs; choose another folder"
            raise UserError(message) from error
    if folder == results.sft_data.resolve():
        raise UserError(f"--outputs {settings.outputs!r} is the SFT data itself; choose another folder")
    return folder


def files_digest(folder: Path) -> str:
    """Tells models that are merged into the same folder apart: names, sizes and times of its files; "" without it."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return digest([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]) if files else ""


async def ask_all(settings: Settings, llm: "LLM", questions: list[str]) -> list[Reply | str]:
    """The reply to each question, or why the server refused it. A blank one has an empty reply."""

    async def ask(question: str) -> Reply | str:
        messages = [{"role": "user", "content": disarm(question)}]
        try:
            request = Request(messages, settings.answer_temperature, settings.answer_max_tokens)
            return await llm.ask(request) if question else Reply("", complete=True)
        except Refused as error:
            return str(error)
        finally:
            progress.set_postfix_str(llm.state, refresh=False)
            progress.update()

    with bar(len(questions), "answers", "answers") as progress:
        return [reply async for _, reply in map_in_order(ask, questions, llm.servers.room)]


if __name__ == "__main__":
    main()
