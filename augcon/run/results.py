"""The results folder: the names of its files, and the shapes of those that several steps share."""

import contextlib
import dataclasses
import fcntl
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from augcon.data import Node, Query, RootContext, ScorerPair
from augcon.errors import UserError, one_line
from augcon.files import digest, new_file, read_dataset, read_json, read_lines, write_dataset
from augcon.run.record import Record

STEP_1, STEP_2, STEP_3 = "step1_gen_q.py", "step2_scorer.py", "step3_gen_a.py"


@dataclasses.dataclass(frozen=True, slots=True)
class _NodeRow:
    """What is read of a line of ``nodes.jsonl``."""

    id: str
    context: str
    query: str | None


class Results:
    """One results folder, used by one run at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.record = Record(self.folder)
        self.store = self.folder / "replies.sqlite"
        self.contexts = self.folder / "contexts.jsonl"
        self.nodes = self.folder / "nodes.jsonl"
        self.queries = self.folder / "queries.json"
        self.scorer_pairs = self.folder / "scorer_pairs"
        self.short_roots = self.folder / "short_roots.jsonl"
        self.refills = self.folder / "refills.json"  # the roots that step 2 sends back to step 1, round by round
        self.scorer = self.folder / "scorer"
        self.scorer_checkpoints = self.folder / "scorer_checkpoints"
        self.scores = self.folder / "scores.jsonl"
        self.scores_parts = self.folder / "scores_parts"  # scores as they come, a folder for each scorer
        self.filtered_queries = self.folder / "filtered_queries.json"
        self.example_search = self.folder / "example_search.json"
        self.sft_data = self.folder / "sft_data"
        self.sft_origins = self.folder / "sft_origins.jsonl"  # where each pair of sft_data came from
        self.dropped_queries = self.folder / "dropped_queries.jsonl"
        self.checkpoints = self.folder / "ckpts"
        self.lora = self.folder / "LoRA"
        self.log = self.folder / "log.json"
        self.loss_plot = self.folder / "loss.png"
        self.sft_model = self.folder / "sft_model"
        self.outputs = self.folder / "outputs"
        self.judged = self.folder / "judge.jsonl"  # the judge's grades of each model's answer, by question
        self.judge = self.folder / "judge.json"  # their means
        self.judge_plot = self.folder / "judge.png"
        self.server_log = self.folder / "server.log"

    def made(self, stage: str) -> list[Path]:
        """What making a stage again would replace: what it has made, and what was made from that."""
        chain = {
            "step 1": [self.queries, self.scorer_pairs],
            "scorer": [self.scorer, *self.scorer_checkpoints.glob("checkpoint-*")],
            "step 2": [self.filtered_queries],
            "step 3": [self.sft_data],
        }
        if stage == "finetune":
            return [self.lora, *self.checkpoints.glob("checkpoint-*")]
        return [path for name in list(chain)[list(chain).index(stage) :] for path in chain[name]]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it. Raises UserError when that cannot be done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write to the results folder {self.folder}: {one_line(error)}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"another run is using {self.folder}; wait, or choose another --results") from error
            yield

    def read_contexts(self) -> list[RootContext]:
        """The root contexts, as step 1 wrote them."""
        return list(read_lines(self.contexts, RootContext, STEP_1))

    def read_queries(self, path: Path) -> dict[int, list[Query]]:
        """The queries of ``queries.json`` or ``filtered_queries.json`` by root context, with their ids.

        Both files hold (context, query) only; ``nodes.jsonl`` beside them knows the ids. A query that is not there
        was added by hand, and gets an id that says so.
        """
        made_by = STEP_1 if path == self.queries else STEP_2
        listed = read_json(path, dict[int, list[tuple[str, str]]], made_by)
        ids: defaultdict[tuple[int, str, str | None], list[str]] = defaultdict(list)
        for node in read_lines(self.nodes, _NodeRow, STEP_1) if self.nodes.exists() else ():
            ids[int(node.id.partition(":")[0]), node.context, node.query].append(node.id)
        queries: dict[int, list[Query]] = {}
        for root, pairs in listed.items():
            queries[root] = []
            for context, text in pairs:
                known = ids[root, context, text]
                id_ = known.pop(0) if known else f"{root}:added:{digest(context, text)[:8]}"
                queries[root].append(Query(id_, root, context, text))
        return queries

    def write_queries(self, path: Path, queries: Mapping[int, Sequence[Query]]) -> None:
        """Writes (context, query) by root context."""
        with new_file(path) as file:
            rows = (_queries_row(root, of) for root, of in queries.items())
            file.write("{\n" + ",\n".join(rows) + "\n}\n")

    @contextlib.contextmanager
    def writing_trees(self) -> Iterator[Callable[[int, Iterable[Node]], None]]:
        """Writes ``nodes.jsonl`` and ``queries.json`` together, root by root, through the function given."""
        with new_file(self.nodes) as nodes_file, new_file(self.queries) as queries_file:

            def write(root: int, nodes: Iterable[Node]) -> None:
                for node in nodes:
                    nodes_file.write(json.dumps(_node_row(node), ensure_ascii=False) + "\n")
                queries_file.write(",\n" if queries_file.tell() else "{\n")
                queries_file.write(_queries_row(root, [query for node in nodes for query in node.queries]))

            yield write
            queries_file.write("\n}\n")

    def write_pairs(self, pairs: Sequence[ScorerPair]) -> None:
        """Writes ``scorer_pairs``."""
        names = [field.name for field in dataclasses.fields(ScorerPair)]
        write_dataset(self.scorer_pairs, {name: [getattr(pair, name) for pair in pairs] for name in names})

    def read_pairs(self) -> list[ScorerPair]:
        """The pairs of ``scorer_pairs``; none where there is no such dataset."""
        return read_dataset(self.scorer_pairs, ScorerPair, STEP_1) if self.scorer_pairs.exists() else []


def _queries_row(root: int, queries: Iterable[Query]) -> str:
    pairs = [[query.context, query.text] for query in queries]
    return f'"{root}": {json.dumps(pairs, ensure_ascii=False)}'


def _node_row(node: Node) -> dict[str, object]:
    return {
        "id": node.id,
        "root": node.root,
        "pass": node.pass_number,
        "path": node.path,
        "depth": len(node.path),
        "context": node.context,
        "query": node.query,
        "outcome": node.outcome,
        "detail": node.detail,
        "tries": node.tries,
        "doubt": node.doubt,
    }
