"""The report in a browser: Debian's Chromium, driven by Playwright, with no network at all."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import run
from reports import HOSTILE, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed (apt-get install chromium)")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
SECTIONS = ("summary", "pairs", "trees", "charts", "alike", "run")


class Browser:
    """Pages of a fresh profile, what they say on the console and what they ask for."""

    def __init__(self, profile: Path, api: "playwright.Playwright") -> None:
        self.context = api.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=FLAGS, viewport=WIDE, accept_downloads=True
        )
        self.said: list[str] = []

    def open(self, results: Path, section: str = "summary") -> "Page":
        page = self.context.new_page()
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "blob:")) or self.said.append(request.url))
        page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        page.goto((results / "report.html").as_uri() + f"#{section}")
        page.wait_for_selector("html[data-ready]")
        return page


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """At the end, nothing may have been said or asked for."""
    with playwright.sync_playwright() as api:
        browser = Browser(tmp_path / "profile", api)
        yield browser
        browser.context.close()
    assert not browser.said


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"), roots=40)
    pace = [[second, 3 * second, 90 * second] for second in range(0, 300, 10)]
    asked = {"seconds": 300.0, "calls": 870, "retries": {"429": 2}, "cost": None, "pace": pace}
    figures = {"step 1": {"finished": "2026-11-27T18:00:00+00:00", "outcomes": {"done": 280}, "asked": [asked]}}
    (folder / "figures.json").write_text(json.dumps(figures))
    assert run("report.py", "--results", folder).returncode == 0
    return folder


def rows(page: "Page") -> list[int]:
    return [int(row.get_attribute("data-n")) for row in page.locator("#rows .row").all()]


def found(page: "Page") -> int:
    """How many pairs the list says that there are, once it has looked through all."""
    text = playwright.expect(page.locator("#found"))
    text.to_have_text(re.compile(r"^\d+ of 80 pairs$"))
    return int(page.inner_text("#found").split()[0])


def columns(results: Path) -> dict[str, list[float]]:
    from test_report import blocks_of

    return blocks_of((results / "report.html").read_text())["index"]["pairs"]


def test_every_link_shows_its_section_alone(browser: Browser, results: Path):
    page = browser.open(results)
    for section in SECTIONS:
        page.click(f"nav a[href='#{section}']")
        playwright.expect(page.locator("main > section:visible")).to_have_id(section)
        assert page.locator("nav a[aria-current]").get_attribute("href") == f"#{section}"
    assert page.locator("#run table").count() >= 3 and "870" in page.inner_text("#run")
    page.click("nav a[href='#charts']")
    assert page.locator("#charts svg").count() == 7 and "Throughput" in page.inner_text("#charts")
    page.click("nav a[href='#alike']")
    assert page.locator(".pairing").count() == 50 and page.locator(".pairing mark").count() > 50
    page.click("nav a[href='#summary']")
    loss = page.locator(".loss").filter(has_text="over the quota")
    loss.locator("summary").click()
    assert loss.locator("dl").count() == 5


def test_search_filters_and_order(browser: Browser, results: Path):
    page, of = browser.open(results, "pairs"), columns(results)
    assert found(page) == 80 and rows(page) == list(range(30))
    question = page.inner_text("#rows li:nth-child(7) .question")
    page.fill("[name=search]", question[4:30].upper())
    playwright.expect(page.locator("#rows .row")).to_have_count(1)
    assert rows(page) == [6] and page.inner_text("#pair h2") == question
    passage = page.locator(".passage mark, .passage").first.inner_text()
    page.fill("[name=search]", passage[:40])
    playwright.expect(page.locator("#rows .row")).not_to_have_count(30)
    assert 6 in rows(page)
    page.fill("[name=search]", "nothing holds this")
    playwright.expect(page.locator("#rows .missing")).to_be_visible()
    assert found(page) == 0
    page.click("[type=reset]")
    playwright.expect(page.locator("#rows .row")).to_have_count(30)
    for name, value, column in (("depth", "1", "depth"), ("kind", "7", "kind"), ("chinese", "0", "chinese")):
        page.select_option(f"[name={name}]", value)
        playwright.expect(page.locator("#found")).to_contain_text(str(sum(v == int(value) for v in of[column])))
        assert all(of[column][n] == int(value) for n in rows(page))
        page.select_option(f"[name={name}]", "")
    for column, low, high in (("score", 0.5, 1.5), ("length", 20, 40)):
        page.fill(f"[name={column}-low]", str(low))
        page.fill(f"[name={column}-high]", str(high))
        expected = sum(low <= value <= high for value in of[column])
        playwright.expect(page.locator("#found")).to_have_text(f"{expected} of 80 pairs")
        assert all(low <= of[column][n] <= high for n in rows(page))
        page.click("[type=reset]")
        playwright.expect(page.locator("#found")).to_have_text("80 of 80 pairs")
    for order, column, sign in (("score-down", "score", -1), ("length-up", "length", 1), ("depth-up", "depth", 1)):
        page.select_option("[name=sort]", order)
        values = sorted(of[column], key=lambda value: sign * value)[:30]
        playwright.expect(page.locator("#rows .row[aria-current]")).to_be_visible()
        page.wait_for_timeout(100)
        assert [of[column][n] for n in rows(page)] == values
    page.click("#pager button:last-child")
    playwright.expect(page.locator("#pager")).to_contain_text("2 of 3")


def test_a_pair_stands_beside_its_marked_passage_and_leads_to_its_tree(browser: Browser, results: Path):
    page = browser.open(results, "pairs")
    page.select_option("[name=depth]", "1")
    playwright.expect(page.locator(".passage mark.part")).to_be_visible()
    passage, part = page.inner_text(".passage"), page.inner_text(".passage mark")
    assert part in passage and 0.3 < len(part) / len(passage) < 0.7
    question = page.inner_text("#pair h2")
    page.click("#pair .quiet")
    playwright.expect(page.locator("#trees")).to_be_visible()
    node = page.locator("#tree .node[open]").last
    assert question in node.locator("> summary").inner_text()
    assert node.locator("> .inside mark.first").count() and node.locator("> .inside mark.second").count()
    assert page.locator("#tree .node").count() == 7
    page.fill("#article-search", "no such article")
    playwright.expect(page.locator("#articles details")).to_have_count(0)


def test_marks_are_kept_saved_and_loaded_again(browser: Browser, results: Path, tmp_path: Path):
    page = browser.open(results, "pairs")
    questions = [page.inner_text(f"#rows li:nth-child({n}) .question") for n in range(1, 5)]
    page.keyboard.press("b")
    playwright.expect(page.locator(".mark.bad")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("j")
    playwright.expect(page.locator("#pair h2")).to_have_text(questions[1])
    page.keyboard.press("g")
    playwright.expect(page.locator("#tally")).to_contain_text("1 good, 1 bad")
    page.keyboard.press("j")
    playwright.expect(page.locator("#pair h2")).to_have_text(questions[2])
    page.keyboard.press("e")
    page.fill("#new-question", "A better question, by j and k?")
    page.fill("#new-answer", "A better answer.\nWith <b>two</b> lines.")
    page.click("#take")
    playwright.expect(page.locator("#pair h2")).to_have_text("A better question, by j and k?")
    page.keyboard.press("k")
    playwright.expect(page.locator("#pair h2")).to_have_text(questions[1])
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "review.jsonl")
    saved = [json.loads(line) for line in (tmp_path / "review.jsonl").read_text().splitlines()]
    assert [(mark["question"], mark["mark"]) for mark in saved] == list(
        zip(questions[:3], ("bad", "good", "edited"), strict=True)
    )
    assert saved[2]["new_answer"] == "A better answer.\nWith <b>two</b> lines."
    assert all(mark["id"].startswith(f"{mark['question'].split()[-1][:-1]}:0:") for mark in saved)

    page.reload()  # the marks are still there
    playwright.expect(page.locator("#tally")).to_contain_text("1 good, 1 bad, 1 edited")
    page.select_option("[name=mark]", "edited")
    playwright.expect(page.locator("#rows .row")).to_have_count(1)
    page.evaluate("localStorage.clear()")
    page.reload()
    playwright.expect(page.locator("#tally")).to_contain_text("0 good, 0 bad, 0 edited")
    with (tmp_path / "review.jsonl").open("a") as file:
        file.write(json.dumps({"id": "0:0:", "question": "Of other data?", "mark": "bad"}) + "\n")
    page.set_input_files("#load", tmp_path / "review.jsonl")
    playwright.expect(page.locator("#tally")).to_contain_text("3 marks loaded, 1 ")
    playwright.expect(page.locator("#tally")).to_contain_text("1 good, 1 bad, 1 edited")
    (tmp_path / "broken.jsonl").write_text('{"question": "x", "mark": "good"}\n{\n')
    page.set_input_files("#load", tmp_path / "broken.jsonl")
    playwright.expect(page.locator("#tally")).to_contain_text("line 2")

    from augcon.run.review import read_review

    assert len(read_review(str(tmp_path / "review.jsonl"))) == 4


def test_a_sample_of_fifty_ends_with_the_error_rate_and_its_interval(browser: Browser, results: Path):
    page = browser.open(results, "pairs")
    page.click("#sample")
    seen = set()
    for at in range(1, 51):
        playwright.expect(page.locator("#found")).to_have_text(f"{at} of 50 in the sample")
        seen.add(page.inner_text("#pair h2"))
        page.keyboard.press("b" if at % 5 == 0 else "g")
        playwright.expect(page.locator("#tally")).to_contain_text(f"of {at}, ")
    assert len(seen) == 50
    assert "Bad or edited: 10 of 50, 20%; 95% interval 11.2% to 33.0%" in page.inner_text("#tally")  # as in tables
    assert "complete" in page.inner_text("#tally")
    page.click("#sample")
    assert found(page) == 80


def test_light_and_dark_and_no_sideways_scrolling(browser: Browser, results: Path):
    page = browser.open(results)

    def paper() -> int:
        return int(re.search(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])

    page.emulate_media(color_scheme="light")
    assert paper() > 200
    page.emulate_media(color_scheme="dark")
    assert paper() < 60
    page.click("#theme")
    assert paper() > 200
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert paper() > 200
    for size in (NARROW, WIDE):
        page.set_viewport_size(size)
        for section in SECTIONS:
            page.click(f"nav a[href='#{section}']")
            for details in page.locator("section:visible details").all()[:6]:
                details.evaluate("each => each.open = true")
            if section == "trees":
                page.locator("#articles .row").first.click()
                playwright.expect(page.locator("#tree .node").first).to_be_visible()
            if section == "pairs":
                page.locator("#rows .row").first.click()
                playwright.expect(page.locator("#pair")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (section, size)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_are_shown_as_they_are(hostile: str, browser: Browser, tmp_path: Path):
    write_run(tmp_path, roots=2, text=hostile)
    assert run("report.py", "--results", tmp_path).returncode == 0
    page = browser.open(tmp_path, "pairs")
    assert page.evaluate("document.querySelector('#pair h2').textContent").startswith(hostile)
    page.click("#pair .quiet")
    for section in SECTIONS:
        page.click(f"nav a[href='#{section}']")
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.wait_for_timeout(100)
    assert page.locator("img, main script, [onload], [onerror]").count() == 0


def test_without_pairs_or_trees_the_page_says_which_step_makes_them(browser: Browser, results: Path, tmp_path: Path):
    shutil.copyfile(results / "contexts.jsonl", tmp_path / "contexts.jsonl")
    assert run("report.py", "--results", tmp_path).returncode == 0
    page = browser.open(tmp_path, "pairs")
    assert "step3_gen_a.py" in page.inner_text("#pairs")
    page.click("nav a[href='#trees']")
    assert "step1_gen_q.py" in page.inner_text("#trees")
    page.click("nav a[href='#charts']")
    assert "step1_gen_q.py" in page.inner_text("#charts")
    page.click("nav a[href='#run']")
    assert "step2_scorer.py" in page.inner_text("#run")


@pytest.mark.slow
def test_a_hundred_thousand_pairs_open_in_seconds(browser: Browser, tmp_path: Path):
    write_run(tmp_path, roots=10_000, pairs=10, words=350)
    assert run("report.py", "--results", tmp_path, timeout=500).returncode == 0
    started = time.monotonic()
    page = browser.open(tmp_path, "pairs")
    assert time.monotonic() - started < 10  # 1 s on two idle cores
    assert page.inner_text("#found") == "100,000 of 100,000 pairs"
    page.select_option("[name=sort]", "score-down")
    playwright.expect(page.locator("#rows .row").first).to_contain_text(re.compile(r"score [345]\."))
