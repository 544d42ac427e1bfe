"""Step 2 through the front door: the script as processes, its files, its last words."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, Engine, clean_environment, free_port, run, says_one_line, start

from augcon.demo.tiny_model import make_tiny_model
from augcon.method.diversity import DiverseQueries
from augcon.method.pairs import NEGATIVES

FLAGS = ("--scorer-epochs", 1, "--scorer-batch", 8, "--scorer-learning-rate", "3e-3", "--max-refills", 2)
MADE = ("scores.jsonl", "filtered_queries.json", "run.json")
DEEPSPEED = Path(sys.executable).with_name("deepspeed")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def facts_of(results: Path, stage: str) -> dict[str, Any]:
    return read(results / "run.json")[stage]["finished"]


def set_facts(results: Path, stage: str, **facts: object) -> None:
    """As if the stage had come to its end with these facts."""
    stages = read(results / "run.json") if (results / "run.json").exists() else {}
    stages[stage] = {"made_with": {}, **stages.get(stage, {}), "finished": facts, "outdated": False}
    write(results / "run.json", stages)


def made(results: Path) -> dict[str, bytes]:
    return {name: (results / name).read_bytes() for name in MADE}


def two_ranks(*flags: object, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    command = [DEEPSPEED, "--quiet", "--num_gpus", 2, "--master_port", free_port(), "step2_scorer.py", *flags]
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=clean_environment(), text=True, capture_output=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    make_tiny_model(folder, datasets.load_from_disk(ROOT / "DailyM")["train"]["article"])
    return folder


@pytest.fixture(scope="module")
def questions(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of step 1 on the bundled corpus."""
    results = tmp_path_factory.mktemp("step1") / "results"
    assert run("step1_gen_q.py", "--api-base", engine.api, "--results", results).returncode == 0
    return results


@pytest.fixture(scope="module")
def few(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with few pairs and queries: enough to train and to be killed."""
    results = tmp_path_factory.mktemp("few") / "results"
    shutil.copytree(questions, results)
    pairs = datasets.load_from_disk(questions / "scorer_pairs")
    shutil.rmtree(results / "scorer_pairs")
    chosen = pairs.select(range(0, len(pairs), 12))
    chosen.save_to_disk(results / "scorer_pairs")
    set_facts(results, "step 1", refills=0, pairs=len(chosen))
    write(results / "queries.json", {root: listed[:15] for root, listed in read(results / "queries.json").items()})
    return results


@pytest.fixture(scope="module")
def bundled(questions: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results and output of step 2 on the bundled corpus, as two processes."""
    results = tmp_path_factory.mktemp("step2") / "results"
    shutil.copytree(questions, results)
    done = two_ranks("--results", results, "--scorer-model", base, *FLAGS)
    assert done.returncode == 0, done.stderr
    return results, done.stdout


@pytest.mark.slow
def test_the_scorer_learns_to_tell_pairs_of_articles_that_it_has_not_seen(bundled: tuple[Path, str]):
    results, output = bundled
    facts = facts_of(results, "scorer")
    before, after = facts["accuracy_before"], facts["accuracy_after"]
    assert before["all"][1] < 0.7 and after["all"][1] > 0.8
    assert all(after[kind][1] > 0.7 for kind in NEGATIVES)
    assert after["all"][0] == sum(after[kind][0] for kind in NEGATIVES) >= 100
    assert "of 18 articles" in facts["held_out"] and f"{after['all'][1]:.3f}" in output
    assert not (results / "scorer_checkpoints").exists()


@pytest.mark.slow
def test_every_query_has_a_score_and_a_fate_and_the_best_that_differ_are_kept(bundled: tuple[Path, str]):
    results, output = bundled
    queries, filtered = read(results / "queries.json"), read(results / "filtered_queries.json")
    scores = lines(results / "scores.jsonl")
    assert list(filtered) == list(queries)
    assert [(row["root"], row["question"]) for row in scores] == [
        (int(root), query) for root, listed in queries.items() for _, query in listed
    ]
    asked = {row["id"]: [row["context"], row["query"]] for row in lines(results / "nodes.jsonl") if row["query"]}
    assert {row["id"]: row["question"] for row in scores} == {of: query for of, (_, query) in asked.items()}
    for context in lines(results / "contexts.jsonl"):
        mine = [row for row in scores if row["root"] == context["root"]]
        kept = sorted((row for row in mine if row["fate"] == "kept"), key=lambda row: -row["score"])
        assert filtered[str(context["root"])] == [asked[row["id"]] for row in kept]
        assert DiverseQueries(0.7).offer_all(row["question"] for row in kept) == len(kept) <= context["quota"]
        if len(kept) == context["quota"]:
            assert all(row["score"] <= kept[-1]["score"] for row in mine if row["fate"] == "over quota")
    fates = Counter(row["fate"] for row in scores)
    assert f"{fates.pop('kept'):,} of {len(scores):,} queries" in output
    assert all(f"{fate} {number:,}" in output for fate, number in fates.items())


@pytest.mark.slow
def test_only_the_first_process_speaks_and_in_the_words_of_augcon(bundled: tuple[Path, str]):
    told = [line.partition(":")[0] for line in bundled[1].splitlines() if line and line[0] not in " ["]
    assert told[:6] == ["settings", "input", "loading", "scorer", "loading", "trained"]
    assert told[-4:] == ["scored", "kept", "roots", "made"]
    assert len(told) == 11, "and the line above the table"


@pytest.mark.slow
def test_bad_questions_are_ranked_last_by_the_saved_scorer_which_gives_the_same_scores(
    bundled: tuple[Path, str], base: Path, tmp_path: Path
):
    results = tmp_path / "r"
    shutil.copytree(bundled[0], results)
    before = {row["id"]: row["score"] for row in lines(results / "scores.jsonl")}
    shutil.rmtree(results / "scores_parts")
    queries = read(results / "queries.json")
    planted = ["主要讲了什么内容？", "什么是这个？", "请谈一谈看法。"]  # it has seen none like these
    planted += ["主要讲了什么？", "有什么要注意的？", "为什么会这样？"]  # as weaker prompts ask
    for listed in queries.values():
        listed[:0] = [[listed[0][0], question] for question in planted]
    write(results / "queries.json", queries)
    again = run("step2_scorer.py", "--results", results, "--scorer-model", base, *FLAGS, "--score-only")
    assert again.returncode == 0 and "trained:" not in again.stdout, again.stderr
    rows = lines(results / "scores.jsonl")
    for row in rows:
        if row["question"] not in planted:
            assert row["score"] == pytest.approx(before[row["id"]], abs=1e-3)
    mean = {
        bad: sum(row["score"] for row in rows if (row["question"] in planted) == bad)
        / sum((row["question"] in planted) == bad for row in rows)
        for bad in (True, False)
    }
    assert mean[True] < mean[False] - 1
    kept = [row for row in rows if row["fate"] == "kept"]
    assert sum(row["question"] in planted for row in kept) <= 0.01 * len(kept)


@pytest.mark.slow
def test_short_roots_go_back_to_step_1_until_that_was_done_often_enough(
    bundled: tuple[Path, str], base: Path, tmp_path: Path
):
    results = tmp_path / "r"
    shutil.copytree(bundled[0], results)
    contexts = lines(results / "contexts.jsonl")
    for number in (3, 7):
        contexts[number]["quota"] = 1000
    (results / "contexts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in contexts))
    flags = ("--results", results, "--scorer-model", base, *FLAGS)
    first = run("step2_scorer.py", *flags)
    rounds, filtered = read(results / "refills.json"), read(results / "filtered_queries.json")
    short = [row["root"] for row in contexts if len(filtered[str(row["root"])]) < row["quota"]]
    assert {row["root"] for row in lines(results / "short_roots.jsonl")} >= set(short)
    assert len(rounds) == 1 and {3, 7} <= set(rounds[0]) <= set(short)
    assert "as trained before" in first.stdout and f"{len(rounds[0])} go back to step 1" in first.stdout, first.stderr
    assert "scored:" not in first.stdout, "every score is there already"
    assert {"refills": 0, "ordered": 1}.items() <= facts_of(results, "step 2").items()
    before = made(results)
    assert run("step2_scorer.py", *flags).returncode == 0
    assert made(results) == before and read(results / "refills.json") == rounds

    # Step 1 has grown two rounds meanwhile, and one query is new.
    queries = read(results / "queries.json")
    queries["3"].append([queries["3"][0][0], "为什么要等到明年才能拿完，风险又起了什么作用？"])
    write(results / "queries.json", queries)
    write(results / "refills.json", [*rounds, [7]])
    set_facts(results, "step 1", refills=2)
    last = run("step2_scorer.py", *flags)
    assert "scored:  1 queries" in last.stdout, last.stderr
    assert f"{len(short)} stay short of it, by " in last.stdout and "after 2 refills" in last.stdout
    assert read(results / "refills.json") == [*rounds, [7]]
    assert {"refills": 2, "ordered": 2}.items() <= facts_of(results, "step 2").items()


def by_hand(results: Path, roots: list[tuple[int, int, list[list[str]]]]) -> None:
    """Step 1's files without pairs: of each root context its length, its quota, and the queries of its trees."""
    results.mkdir()
    contexts = [
        {"root": n, "article": n, "start": 0, "end": 1, "length": length, "quota": quota, "text": "一"}
        for n, (length, quota, _) in enumerate(roots)
    ]
    nodes = [
        {"id": f"{n}:{tree}:{'1' * place}", "context": "一", "query": query}
        for n, (_, _, trees) in enumerate(roots)
        for tree, queries in enumerate(trees)
        for place, query in enumerate(queries)
    ]
    for name, rows in (("contexts.jsonl", contexts), ("nodes.jsonl", nodes)):
        (results / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = {n: [["一", query] for tree in trees for query in tree] for n, (_, _, trees) in enumerate(roots)}
    write(results / "queries.json", listed)
    set_facts(results, "step 1", refills=0, pairs=0)


@pytest.mark.slow
def test_a_refill_is_ordered_only_where_enough_is_missing_and_only_for_roots_that_may_give_more(tmp_path: Path):
    whole = [f"w{n} x{n} y{n} z{n}" for n in range(96)]
    grows, spent, tiny = ["猫为什么怕水？"], ["谁在雨里唱歌？"], ["山上有什么树？"]
    results = tmp_path / "r"
    by_hand(results, [(500, 96, [whole]), (50, 2, [grows]), (50, 2, [spent, spent]), (10, 2, [tiny]), (50, 1, [[]])])
    few = run("step2_scorer.py", "--results", results)
    assert few.returncode == 0 and not (results / "refills.json").exists(), few.stderr
    assert "1 of 5 have their quota; 4 stay short of it, by 4 pairs (3.9% of the quota), too few" in few.stdout
    assert "for 1 of them, add --refill-threshold 0 --redo" in few.stdout
    assert says_one_line(run("step2_scorer.py", "--results", results, "--refill-threshold", 0), "refill_threshold was")
    sent = run("step2_scorer.py", "--results", results, "--refill-threshold", 0, "--redo")
    assert sent.returncode == 0 and "1 go back to step 1" in sent.stdout, sent.stderr
    assert read(results / "refills.json") == [[1]]

    by_hand(tmp_path / "s", [(50, 2, [spent, spent]), (10, 2, [tiny])])
    hopeless = run("step2_scorer.py", "--results", tmp_path / "s", "--refill-threshold", 0)
    assert "2 stay short of it, by 2 pairs (50.0% of the quota), as their last trees brought nothing new" in (
        hopeless.stdout
    )
    assert not (tmp_path / "s" / "refills.json").exists()


@pytest.mark.slow
def test_a_scorer_is_kept_when_step_1_makes_the_same_pairs_again_and_one_of_other_settings_is_not_replaced_unasked(
    bundled: tuple[Path, str], base: Path, tmp_path: Path
):
    results = tmp_path / "r"
    shutil.copytree(bundled[0], results)
    stages = read(results / "run.json")
    for stage in ("step 1", "scorer", "step 2"):  # as --redo of step 1 leaves them
        stages[stage]["outdated"] = stage != "step 1"
    write(results / "run.json", stages)
    flags = ("--results", results, "--scorer-model", base, *FLAGS)
    again = run("step2_scorer.py", *flags)
    assert again.returncode == 0 and "as trained before" in again.stdout and "trained:" not in again.stdout
    assert not any(stage["outdated"] for stage in read(results / "run.json").values())
    weights = (results / "scorer" / "adapter_model.safetensors").read_bytes()

    other = run("step2_scorer.py", *flags, "--scorer-max-tokens", 100)
    assert says_one_line(
        other, "scorer_max_tokens was 2048 and is now 100", "--redo to replace scorer, filtered_queries"
    )
    assert (results / "scorer" / "adapter_model.safetensors").read_bytes() == weights
    redone = run("step2_scorer.py", *flags, "--scorer-max-tokens", 100, "--redo")
    assert redone.returncode == 0 and "trained:" in redone.stdout, redone.stderr
    assert (results / "scorer" / "adapter_model.safetensors").read_bytes() != weights


def killed(flags: tuple, when: Path, pattern: str, rows: int = 1) -> None:
    """Starts step 2 and kills it as soon as files that match are there, with so many lines in all."""
    process = start("step2_scorer.py", *flags)
    try:
        while process.poll() is None:
            found = list(when.glob(pattern))
            if found and sum(len(path.read_text().splitlines()) or 1 for path in found) >= rows:
                break
            time.sleep(0.01)
        assert process.poll() is None, "it came to its end before it could be killed"
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_in_training_and_in_scoring_it_goes_on_to_the_same_outcome(few: Path, base: Path, tmp_path: Path):
    flags = ("--scorer-model", base, "--scorer-epochs", 2, "--scorer-learning-rate", "3e-3")
    for name in ("whole", "killed"):
        shutil.copytree(few, tmp_path / name)
    whole = run("step2_scorer.py", "--results", tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr

    results = tmp_path / "killed"
    flags = ("--results", results, *flags)
    killed(flags, results, "scorer_checkpoints/checkpoint-*/whole")
    torn = results / "scorer_checkpoints" / "checkpoint-9999"  # as a kill amid saving leaves it
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    killed(flags, results, "scores_parts/*/part-*.jsonl", 10)
    assert facts_of(results, "scorer")["base"] == str(base) and not (results / "scorer_checkpoints").exists()
    scored = sum(len(row) for path in results.glob("scores_parts/*/part-*") for row in rows_of(path))
    last = run("step2_scorer.py", *flags)
    assert last.returncode == 0 and "as trained before" in last.stdout, last.stderr
    assert "from checkpoint-" in facts_of(results, "scorer")["speed"]
    total = len(lines(results / "scores.jsonl"))
    left = int(last.stdout.partition("scored:  ")[2].partition(" ")[0].replace(",", ""))
    assert 0 < left <= total - scored
    one, other = lines(tmp_path / "whole" / "scores.jsonl"), lines(results / "scores.jsonl")
    assert [row["score"] for row in other] == pytest.approx([row["score"] for row in one], abs=1e-3)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that a kill may have torn."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


@pytest.mark.slow
def test_without_pairs_the_order_is_that_of_the_trees(few: Path, tmp_path: Path):
    results = tmp_path / "r"
    shutil.copytree(few, results)
    shutil.rmtree(results / "scorer_pairs")
    set_facts(results, "step 1", refills=0, pairs=0)
    done = run("step2_scorer.py", "--results", results)
    assert done.returncode == 0 and "no pairs to learn from" in done.stdout, done.stderr
    queries, filtered = read(results / "queries.json"), read(results / "filtered_queries.json")
    assert all(row["score"] == 0 for row in lines(results / "scores.jsonl"))
    for root, kept in filtered.items():
        places = [queries[root].index(text) for text in kept]
        assert places == sorted(places) and (places[0] == 0 or root != "0")


@pytest.mark.slow
def test_what_a_user_can_mend_is_one_line_from_all_processes_together(few: Path, base: Path, tmp_path: Path):
    results = tmp_path / "r"
    shutil.copytree(few, results)
    missing = two_ranks("--results", results, "--scorer-model", tmp_path / "nowhere")
    told = [line for line in missing.stderr.splitlines() if line.startswith("error: ")]
    assert missing.returncode != 0 and len(told) == 1 and str(tmp_path / "nowhere") in told[0]
    assert "Traceback" not in missing.stderr + missing.stdout
    # What came to nothing binds nobody: the same folder, the right model.
    untrained = run("step2_scorer.py", "--results", results, "--scorer-model", base, "--score-only")
    assert says_one_line(untrained, "there is no scorer", "--score-only")


def test_what_is_wrong_with_the_input_is_one_line(tmp_path: Path):
    results = tmp_path / "r"
    results.mkdir()
    assert says_one_line(run("step2_scorer.py", "--results", results), "contexts.jsonl", "run step1_gen_q.py first")
    context = {"root": 0, "article": 0, "start": 0, "end": 3, "length": 3, "quota": 1, "text": "一二三"}
    (results / "contexts.jsonl").write_text(json.dumps(context) + "\n")
    (results / "queries.json").write_text('{"0": [["一二三", ')
    assert says_one_line(run("step2_scorer.py", "--results", results), "queries.json", "cannot read")
    write(results / "queries.json", {"0": [["一二三", "什么？"]]})
    assert says_one_line(run("step2_scorer.py", "--results", results), "step 1 has not finished")
    set_facts(results, "step 1", refills=0, pairs=3)
    assert says_one_line(run("step2_scorer.py", "--results", results), "scorer_pairs", "run step1_gen_q.py again")
    set_facts(results, "step 1", refills=0)
    datasets.Dataset.from_dict({"context": ["a"], "pos_query": ["b"]}).save_to_disk(results / "scorer_pairs")
    assert says_one_line(run("step2_scorer.py", "--results", results), "scorer_pairs", "neg_query")
