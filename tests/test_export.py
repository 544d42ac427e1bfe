"""export.py: every format is read back by the readers that it is for, and holds what finetune.py would train on."""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import trl
from conftest import ROOT, run, says_one_line
from openai.types.chat import ChatCompletionMessageParam
from pydantic import TypeAdapter
from reports import HOSTILE, write_run
from test_finetune import CHATML_MARKED, make_model, make_tokenizer

from augcon.data import Pair
from augcon.demo.tiny_model import make_tiny_model
from augcon.run.formats import Conversation, read_mix, read_row
from augcon.text.units import clean
from finetune import pairs_digest

Rows = list[dict[str, Any]]
TRAINERS = Path(sys.prefix) / "trainers"  # where install.sh puts them
FORMATS = ("messages", "alpaca", "sharegpt", "pairs")


def lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_lines(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def export(results: Path, *flags: object) -> tuple[str, Rows, Rows]:
    """What it said, and the rows to learn and held out as the hub's library gives them."""
    done = run("export.py", "--results", results, *flags)
    assert done.returncode == 0 and not done.stderr, done.stderr
    folder = Path(flags[flags.index("--output") + 1]) if "--output" in flags else results / "export"
    data = datasets.load_dataset(str(folder), cache_dir=str(results / "cache"))
    return done.stdout, data["train"].to_list(), data["validation"].to_list() if "validation" in data else []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 100 root contexts, four of each article, with two pairs each."""
    return write_run(tmp_path_factory.mktemp("finished"), roots=100)


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    """That run in a folder of this test's own; its files are only read."""
    folder = tmp_path / "results"
    folder.mkdir()
    for path in finished.glob("*"):
        if path.name not in ("export", "cache"):
            (folder / path.name).symlink_to(path)
    return folder


def pairs_of(results: Path) -> Rows:
    """The pairs as they are read: cleaned."""
    rows = datasets.load_from_disk(results / "sft_data")
    return [{name: clean(text).strip() for name, text in row.items()} for row in rows]


def as_messages(pair: dict[str, str], system: str = "") -> Rows:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}]


def test_messages_are_the_pairs_and_nothing_else(results: Path):
    said, learnt, held_out = export(results)
    origins, pairs = lines(results / "sft_origins.jsonl"), pairs_of(results)
    held = [place for place, pair in enumerate(pairs) if {"messages": as_messages(pair)} in held_out]
    articles = {origins[place]["article"] for place in held}
    assert held == [place for place, origin in enumerate(origins) if origin["article"] in articles]
    assert learnt == [{"messages": as_messages(pair)} for place, pair in enumerate(pairs) if place not in held]
    assert len(held) == 8 and "input:   200 pairs, 8 of them held out (1 of 25 articles)" in said
    assert sorted(path.name for path in (results / "export").iterdir()) == [
        "README.md",
        "dataset_info.json",
        "held_out.jsonl",
        "train.jsonl",
    ]


@pytest.mark.slow
def test_it_holds_out_the_very_pairs_that_finetune_holds_out(results: Path, tmp_path: Path):
    marks = [{"question": pair["question"], "mark": "bad"} for pair in pairs_of(results)[:30]]
    flags = ["--review", write_lines(tmp_path / "review.jsonl", marks), "--held-out", 0.2, "--seed", 7]
    _, _, held_out = export(results, *flags)
    tiny = tmp_path / "tiny"
    make_tiny_model(tiny, [pair["answer"] for pair in pairs_of(results)])
    done = run("finetune.py", "--results", results, "--model", tiny, "--output", tmp_path / "o", "--epochs", 1, *flags)
    assert done.returncode == 0, done.stderr
    made_with = json.loads((tmp_path / "o" / "run.json").read_text())["finetune"]["made_with"]
    pairs = [Pair(*(message["content"] for message in row["messages"])) for row in held_out]
    assert made_with["content of the held-out pairs"] == pairs_digest(pairs) and len(pairs) > 30


def test_a_review_leaves_out_what_is_bad_and_takes_edits(results: Path, tmp_path: Path):
    bad, edited = pairs_of(results)[:2]
    marks = [
        {"question": bad["question"], "mark": "bad"},
        {"question": edited["question"], "mark": "edited", "new_question": "Whose?", "new_answer": "Ours.\n\x01"},
    ]
    said, learnt, held_out = export(results, "--review", write_lines(tmp_path / "review.jsonl", marks))
    rows = [row["messages"] for row in learnt + held_out]
    assert len(rows) == 199 and as_messages(bad) not in rows and "1 bad pairs left out, 1 edited" in said
    assert as_messages({"question": "Whose?", "answer": "Ours.\n\x01"}) in rows
    assert "A person has reviewed them" in (results / "export" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_back_every_pair(form: str, kind: str, results: Path):
    _, learnt, held_out = export(results, "--format", form, "--file-type", kind, "--system", "Be brief.")
    rows, pairs = learnt + held_out, pairs_of(results)
    if form == "alpaca":
        assert all(row.keys() == {"instruction", "input", "output", "system"} and row["input"] == "" for row in rows)
        rows = [as_messages({"question": row["instruction"], "answer": row["output"]}, row["system"]) for row in rows]
    elif form == "sharegpt":
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        rows = [
            [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]] for row in rows
        ]
    else:
        rows = [as_messages(row, row["system"]) if form == "pairs" else row["messages"] for row in rows]
    in_order = sorted(rows, key=lambda row: row[1]["content"])
    assert in_order == sorted((as_messages(pair, "Be brief.") for pair in pairs), key=lambda row: row[1]["content"])
    assert {path.suffix for path in (results / "export").iterdir()} == {".md", ".json", f".{kind}"}


def test_pairs_tell_where_each_is_from_and_what_the_corpus_tells(results: Path):
    fields = [
        {"id": f"A-{n}", "year": n if n % 2 else "x", "size": float("nan") if n == 1 else n / 2, "big": 2**70}
        for n in range(25)
    ]
    fields[3] |= {"note": "alone", "corpus_id": 5}
    about = [
        {"article": n, "file": f"m/{n}.pdf", "title": f"T{n}", "fields": of, "more": 1} for n, of in enumerate(fields)
    ]
    write_lines(results / "articles.jsonl", [of for of in about if of["article"] != 7])
    _, learnt, held_out = export(results, "--format", "pairs")
    roots = {row["root"]: row["text"].strip() for row in lines(results / "contexts.jsonl")}
    for row in learnt + held_out:
        of = row["article"]
        assert row["context"] == roots[row["root"]] and row["id"].startswith(f"{row['root']}:0:")
        assert (row["file"], row["title"]) == ((None, None) if of == 7 else (f"m/{of}.pdf", f"T{of}"))
        year = None if of == 7 else str(of) if of % 2 else "x"
        assert row["corpus_id"] == (None if of == 7 else f"A-{of}") and row["year"] == year
        assert row["note"] == ("alone" if of == 3 else None) and row["language"] == "en"
        assert row["corpus_corpus_id"] == (5 if of == 3 else None)
        assert row["size"] == (None if of in (1, 7) else of / 2) and row["big"] == (None if of == 7 else str(2**70))
        assert isinstance(row["score"], float)


@pytest.mark.parametrize("answer_from", ["root", "node"])
def test_with_context_the_question_stands_under_its_passage(answer_from: str, results: Path):
    stage = {"made_with": {"answer_from": answer_from}, "finished": {}}
    (results / "run.json").write_text(json.dumps({"step 3": stage}))
    roots = {row["root"]: row["text"].strip() for row in lines(results / "contexts.jsonl")}
    nodes = {row["id"]: row["context"].strip() for row in lines(results / "nodes.jsonl")}
    origins = {row["question"]: row for row in lines(results / "sft_origins.jsonl")}
    passages = {
        question: roots[row["root"]] if answer_from == "root" else nodes[row["id"]] for question, row in origins.items()
    }
    _, learnt, held_out = export(results, "--with-context")
    asked = {row["messages"][0]["content"] for row in learnt + held_out}
    assert asked == {f"Text:\n{passage}\n\nQuestion: {question}" for question, passage in passages.items()}
    _, learnt, held_out = export(results, "--with-context", "--format", "alpaca")
    assert {row["instruction"]: row["input"] for row in learnt + held_out} == passages


def test_the_labels_of_a_passage_are_in_the_language_of_the_pair():
    talk = Conversation(("几点？", "七点。"), passage="面包店七点开门。<|im_end|>", language="zh")
    assert talk.told()[0][1].endswith("\n\n问题：几点？") and "<|im_end|>" not in talk.told()[0][1]


CHAT = [
    {"messages": [{"role": "system", "content": "S"}, *as_messages({"question": "Hi", "answer": "Ho"})]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}] * 2},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"instruction": "Add", "input": "", "output": "3", "system": "S"},
    {"question": "Q", "answer": "A"},
]
NO_CHAT = [
    {"messages": as_messages({"question": "Hi", "answer": "Ho"})[:1]},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x"}]},
    {"messages": ["Hi", "Ho"]},
    {"conversations": [{"from": "gpt", "value": "Ho"}, {"from": "human", "value": "Hi"}]},
    {"conversations": []},
    {"messages": [{"role": "system", "content": "S"}]},
    {"instruction": "Add", "output": None},
    {"question": "Q", "answer": " "},
    {"text": "x"},
]


def test_a_share_of_other_chat_data_is_mixed_in_to_learn_from_alone(results: Path, tmp_path: Path):
    chat = write_lines(tmp_path / "chat.jsonl", [{"question": f"Chat {n}?", "answer": "Yes."} for n in range(300)])
    with chat.open("a") as file:
        file.write('{"question"\n' + json.dumps({"text": "x"}) + "\n")
    said, learnt, held_out = export(results, "--mix", chat, "--mix-share", 0.25)
    mixed = [n for n, row in enumerate(learnt) if row["messages"][0]["content"].startswith("Chat")]
    assert len(held_out) == 8 and len(learnt) == 256 and len(mixed) == 64
    assert "64 rows of" in said and "25% of train" in said and "2 skipped (broken line 1, no conversation 1)" in said
    assert 20 < sum(n < 128 for n in mixed) < 44  # in among the pairs
    few = export(results, "--mix", chat, "--mix-share", 0.9)[0]
    assert "300 rows of" in few and "61% of train; 1,728 were wanted for 90%" in few
    assert "`chat.jsonl`" in (results / "export" / "README.md").read_text()
    assert str(tmp_path) not in (results / "export" / "README.md").read_text()


def test_chat_data_comes_in_every_usual_kind_of_row():
    read = [read_row(row) for row in CHAT]
    assert [len(of.turns) for of in read] == [2, 4, 2, 2, 2] and [of.system for of in read] == ["S", "", "", "S", ""]
    assert read[2].turns == ("Add\n\n1 2", "3")
    assert all(isinstance(read_row(row), str) for row in NO_CHAT)


def test_chat_data_comes_from_files_and_saved_datasets(tmp_path: Path):
    rows = [{"question": None, "answer": None, "messages": as_messages({"question": "Hi", "answer": "Ho"})}] * 3
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for source in ("saved", "a.parquet"):
        found, skipped = read_mix(str(tmp_path / source), 2, 1, "messages")
        assert [of.turns for of in found] == [("Hi", "Ho")] * 2 and not skipped
    turns = write_lines(tmp_path / "long.jsonl", [CHAT[1]])
    assert read_mix(str(turns), 2, 1, "alpaca") == ([], {"more turns than alpaca can hold": 1})
    surrogate = write_lines(tmp_path / "odd.jsonl", [{"question": "a\ud800b", "answer": "c"}])
    assert read_mix(str(surrogate), 1, 1, "alpaca")[0][0].turns == ("ab", "c")


@pytest.mark.parametrize("form", FORMATS)
def test_hostile_text_comes_back_as_it_was(form: str, tmp_path: Path):
    results = write_run(tmp_path, roots=3, text=" ".join(HOSTILE))
    for kind in ("jsonl", "parquet"):
        _, rows, held_out = export(results, "--format", form, "--file-type", kind, "--held-out", 0)
        texts = json.dumps(rows, ensure_ascii=False)
        assert all(
            json.dumps(text, ensure_ascii=False) in texts for pair in pairs_of(results) for text in pair.values()
        )
        assert len(rows) == 6 and not held_out and not list((results / "export").glob("held_out*"))


def test_another_export_under_the_same_name_is_not_taken_for_the_first(results: Path):
    export(results)
    rows = [{**pair, "answer": f"{pair['answer'][:-1]}!"} for pair in pairs_of(results)]
    (results / "sft_data").unlink()
    datasets.Dataset.from_list(rows).save_to_disk(results / "sft_data")
    _, learnt, held_out = export(results)
    assert all(row["messages"][-1]["content"].endswith("!") for row in learnt + held_out)


@pytest.mark.parametrize("flags", [[], ["--format", "pairs", "--file-type", "parquet"]], ids=["messages", "parquet"])
def test_a_second_run_makes_the_same_files(flags: list[str], results: Path, tmp_path: Path):
    chat = write_lines(tmp_path / "chat.jsonl", CHAT * 20)
    made = []
    for _ in range(2):
        export(results, *flags, "--mix", chat, "--with-context")
        made.append({path.name: path.read_bytes() for path in (results / "export").iterdir()})
    assert made[0] == made[1] and len(made[0]) == 4


def test_pairs_of_ones_own_can_be_exported_without_their_passages(finished: Path, tmp_path: Path):
    mine = write_lines(tmp_path / "mine.jsonl", [{"question": f"Q{n}?", "answer": f"A{n}."} for n in range(40)])
    said, learnt, held_out = export(tmp_path / "none", "--data", mine, "--format", "pairs")
    assert len(learnt) == 38 and len(held_out) == 2 and "single pairs" in said
    assert {row["context"] for row in learnt} == {row["id"] for row in learnt} == {None}
    card = (tmp_path / "none" / "export" / "README.md").read_text()
    assert "brought to AugCon as `mine.jsonl`" in card and "How it was made" not in card and str(tmp_path) not in card
    refused = run("export.py", "--results", finished, "--data", mine, "--with-context", "--output", tmp_path / "o")
    assert says_one_line(refused, "--with-context", "40 of 40 pairs", "--results") and not (tmp_path / "o").exists()
    write_lines(tmp_path / "some.jsonl", pairs_of(finished)[:30])
    _, learnt, held_out = export(
        finished, "--data", tmp_path / "some.jsonl", "--with-context", "--output", tmp_path / "o"
    )
    assert len(learnt + held_out) == 30


def test_what_cannot_be_exported_is_said_in_a_line(results: Path, tmp_path: Path):
    assert says_one_line(run("export.py", "--results", tmp_path / "none"), "sft_data", "step3_gen_a.py")
    assert says_one_line(run("export.py", "--results", results, "--mix", tmp_path / "no.jsonl"), "--mix", "no.jsonl")
    assert says_one_line(run("export.py", "--results", results, "--mix-share", 1), "--mix-share", "'1'")
    assert says_one_line(run("export.py", "--results", results, "--push-to-hub", "a/b/c"), "--push-to-hub", "'a/b/c'")
    foreign = tmp_path / "mine"
    foreign.mkdir()
    for name in ("README.md", "notes.txt"):
        (foreign / name).write_text("mine")
        assert says_one_line(run("export.py", "--results", results, "--output", foreign), "something other", name)
    assert says_one_line(run("export.py", "--results", results, "--output", foreign / "notes.txt"), "something other")
    assert (foreign / "notes.txt").read_text() == (foreign / "README.md").read_text() == "mine"
    (results / "run.json").write_text(json.dumps({"step 3": {"made_with": {}}}))
    assert says_one_line(run("export.py", "--results", results), "step 3", "not finished")


def test_the_card_tells_the_hub_and_people_what_it_is(results: Path):
    stages = {
        "corpus as cut": {"made_with": {"corpus": "/home/someone/pumps.jsonl"}},
        "step 1": {"made_with": {"max_length": 300, "seed": 42, "model served": "org/model"}, "finished": {}},
        "step 3": {"made_with": {"answer_from": "root", "model served": "/models/mine"}, "finished": {}},
    }
    (results / "run.json").write_text(json.dumps(stages))
    figures = {
        "step 1": {"roots": 100, "queries": 1234},
        "step 2": {"fates": {"kept": 200, "alike": 1034}},
        "step 3": {"dropped": {"refusal": 5}},
    }
    (results / "figures.json").write_text(json.dumps(figures))
    export(results)
    card = huggingface_hub.DatasetCard.load(results / "export" / "README.md")
    data = card.data.to_dict()
    assert data["language"] == ["en"] and data["license"] == "other" and data["size_categories"] == ["n<1K"]
    (config,) = data["configs"]
    assert config["data_files"] == [
        {"split": "train", "path": "train.jsonl"},
        {"split": "validation", "path": "held_out.jsonl"},
    ]
    told = ("pumps.jsonl", "org/model, mine", "max_length=300", "| root contexts | 100 |", "| queries | 1234 |")
    told += (
        "alike 1,034",
        "refusal 5",
        "1 of 25 articles",
        "@article{quan2024augcon",
        "## Licence",
        "swift sft",
        "TRL",
    )
    assert all(part in card.text for part in told) and "/home" not in card.text and "/models" not in card.text


def test_trl_learns_the_answers_alone(results: Path, tmp_path: Path):
    """With TRL's own preparation, as the card tells."""
    tokenizer = make_tokenizer(CHATML_MARKED)
    export(results)
    data = datasets.load_dataset(str(results / "export"), cache_dir=str(tmp_path / "cache"))
    how = {"use_cpu": True, "bf16": False, "report_to": "none", "assistant_only_loss": True}
    trainer = trl.SFTTrainer(
        make_model("Llama"),
        args=trl.SFTConfig(output_dir=str(tmp_path / "trl"), **how),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == 192 and len(trainer.eval_dataset) == 8
    for row, pair in zip(trainer.train_dataset, data["train"], strict=True):
        learnt = [label for label in row["labels"] if label != -100]
        assert len(learnt) < len(row["labels"])
        assert tokenizer.decode(learnt) == pair["messages"][-1]["content"] + "<|im_end|>"


def test_the_messages_are_what_the_openai_api_takes_for_fine_tuning(results: Path):
    """By its library's types of a message, and its published rules: these keys, an answer last, ten rows or more."""
    export(results, "--system", "Be brief.")
    shape = TypeAdapter(ChatCompletionMessageParam)
    rows = lines(results / "export" / "train.jsonl")
    assert len(rows) >= 10
    for row in rows:
        assert row.keys() == {"messages"} and all(message.keys() == {"role", "content"} for message in row["messages"])
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert all(shape.validate_python(message) == message for message in row["messages"])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("trainer", ["llamafactory", "swift", "unsloth", "axolotl"])
def test_other_trainers_read_it(trainer: str, form: str, results: Path, tmp_path: Path):
    if not (TRAINERS / trainer).exists() and importlib.util.find_spec(trainer) is None:
        pytest.skip(f"{trainer} is not installed")
    if form in ("pairs", "alpaca") and trainer in ("axolotl", "unsloth"):
        pytest.skip(f"{trainer} does not read {form} as chat")
    export(results, "--format", form, "--system", "Be brief.")
    make_tokenizer(CHATML_MARKED).save_pretrained(tmp_path / "tokenizer")
    answer = tmp_path / "answer.json"
    command = [sys.executable, ROOT / "tests" / "trainers.py", trainer, results / "export", tmp_path / "tokenizer"]
    environment = {**os.environ, "PYTHONPATH": str(TRAINERS)}
    done = subprocess.run([*command, answer], text=True, capture_output=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    learnt, held_out = json.loads(answer.read_text())
    assert len(held_out) == 8
    wanted = sorted(json.dumps(as_messages(pair, "Be brief.")) for pair in pairs_of(results))
    assert sorted(json.dumps(turns) for turns in learnt + held_out) == wanted


class Hub(http.server.BaseHTTPRequestHandler):
    """Not the real hub: it takes a dataset of small files, or refuses all."""

    status, asked, committed = 200, [], {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        type(self).asked.append((self.path, body))
        answer: dict[str, Any] = {"url": "http://127.0.0.1/datasets/me/pairs", "id": "me/pairs"}
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            answer = {"files": files}
        elif "/commit/" in self.path:
            type(self).committed = {
                entry["value"]["path"]: entry["value"] for entry in map(json.loads, body.splitlines())
                if entry["key"] == "file"
            }  # fmt: skip
            answer = {
                "commitUrl": "http://127.0.0.1/datasets/me/pairs/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            }
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer([] if "/tree/" in self.path else {"id": "me/pairs", "sha": "1" * 40, "siblings": []})

    def _answer(self, answer: object) -> None:
        content = json.dumps(answer).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    monkeypatch.setattr(Hub, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield Hub
        server.shutdown()


def test_without_a_token_nothing_is_done(hub: type[Hub], results: Path):
    assert says_one_line(run("export.py", "--results", results, "--push-to-hub", "me/pairs"), "token", "HF_TOKEN")
    assert not hub.asked and not (results / "export").exists()


def test_the_folder_is_uploaded_as_a_private_dataset(hub: type[Hub], results: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    done = run("export.py", "--results", results, "--push-to-hub", "me/pairs")
    assert done.returncode == 0, done.stderr
    path, body = hub.asked[0]
    assert path == "/api/repos/create" and json.loads(body)["visibility"] == "private" and '"dataset"' in body
    assert set(hub.committed) == {path.name for path in (results / "export").iterdir()}
    assert "pushed:" in done.stdout and "datasets/me/pairs" in done.stdout and "hf_x" not in done.stdout
    assert 'load_dataset("me/pairs")' in (results / "export" / "README.md").read_text()


def test_what_the_hub_refuses_is_one_line(hub: type[Hub], results: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(hub, "status", 403)
    done = run("export.py", "--results", results, "--push-to-hub", "me/pairs")
    assert says_one_line(done, "'me/pairs'", "403") and (results / "export" / "train.jsonl").exists()
