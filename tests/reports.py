"""Results folders written directly, for tests of the report: of any size, with any text."""

import json
import random
from pathlib import Path

import datasets

HOSTILE = [
    "</script><img src=x onerror=alert(1)><script>alert(2)</script>",
    "\"'><svg onload=alert(3)>{{ 7*7 }}{% raw %}<!--",
    "\u202eright to left \u200f\u2067",
    "null\0byte",
    "emoji 🧑‍🚀𠮷 and a line\u2028separator",
]
WORDS = [
    start + middle + end
    for start in ("ka", "ri", "mo", "te", "lu", "sa", "vi", "no", "pe", "du", "ba", "fi")
    for middle in ("", "ra", "lo", "mi", "nu", "se", "to", "gi", "ve", "pa")
    for end in ("ran", "tel", "mis", "dor", "pun", "lak", "se", "ly")
]


def write_run(folder: Path, roots: int, text: str = "", pairs: int = 2, words: int = 60) -> Path:
    """A finished run: root contexts of random words, each with a tree of seven nodes or more and some pairs."""
    chance = random.Random(1)
    files = {name: (folder / f"{name}.jsonl").open("w") for name in ("contexts", "nodes", "scores", "sft_origins")}
    questions, answers, kept = [], [], {}
    for root in range(roots):
        whole = f"{text} " + " ".join(chance.choices(WORDS, k=words)) + "."
        line = {"root": root, "article": root // 4, "start": 0, "end": len(whole), "length": words, "quota": pairs + 1}
        write(files["contexts"], {**line, "text": whole, "title": text})
        paths, level = ["", "1", "2", "11", "12", "21", "22"], 3
        while len(paths) < 2 * pairs:
            paths += [path + half for path in paths if len(path) == level - 1 for half in "12"]
            level += 1
        paths = paths[: 2 * pairs + 4]
        parts = {"": whole}
        for path in paths:
            if path:
                above = parts[path[:-1]].split(" ")
                middle = len(above) // 2
                parts[path] = " ".join(above[:middle] if path[-1] == "1" else above[middle:])
        rows = []
        for place, path in enumerate(paths):
            question = f"{text}{chance.choice(('What', 'Why', 'How'))} {' '.join(chance.choices(WORDS, k=7))} {root}?"
            asked = place < 2 * pairs + 1
            node = {"id": f"{root}:0:{path}", "root": root, "pass": 0, "path": path, "depth": len(path)}
            told = {"detail": "", "tries": int(asked), "doubt": text if place == 1 else ""}
            outcome = "done" if asked else "too short"
            write(
                files["nodes"],
                {**node, "context": parts[path], "query": question if asked else None} | {"outcome": outcome} | told,
            )
            if asked:
                rows.append((f"{root}:0:{path}", path, question, chance.gauss(0, 1), parts[path]))
        rows.sort(key=lambda row: -row[3])
        fates = ["kept"] * pairs + ["alike", "alike elsewhere"] + ["over quota"] * len(rows)
        fate_of = {row[0]: fate for row, fate in zip(rows, fates, strict=False)}
        for id_, _, question, score, _ in rows:
            write(
                files["scores"], {"id": id_, "root": root, "question": question, "score": score, "fate": fate_of[id_]}
            )
        for id_, path, question, score, _ in rows[:pairs]:
            origin = {"id": id_, "question": question, "article": root // 4, "root": root, "pass": 0, "path": path}
            write(files["sft_origins"], {**origin, "depth": len(path), "score": score, "tries": 1, "language": "en"})
            questions.append(question)
            answers.append(f"{text} " + " ".join(chance.choices(WORDS, k=chance.randrange(5, words))))
        kept[str(root)] = [[context, question] for _, _, question, _, context in rows[:pairs]]
    for file in files.values():
        file.close()
    (folder / "filtered_queries.json").write_text(json.dumps(kept))
    (folder / "dropped_queries.jsonl").write_text("")
    datasets.Dataset.from_dict({"question": questions, "answer": answers}).save_to_disk(folder / "sft_data")
    return folder


def write(file, row) -> None:
    file.write(json.dumps(row) + "\n")
