"""Documents, archives and addresses in, articles out; what is left out of them, and what is skipped."""

import http.server
import json
import os
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import datasets
import matplotlib
import pytest
from conftest import run, says_one_line
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from augcon.errors import UserError
from augcon.run import documents
from augcon.run.corpus import Corpus
from augcon.text.tidy import tidy

PROSE = [
    "The pump must be primed before it runs, because a dry seal burns within two minutes.",
    "Prime it by opening the upper valve until water runs out without bubbles.",
    "Twice a year the impeller is taken out and brushed in warm water with a little vinegar.",
    "If the motor hums without turning, switch it off and free the shaft by hand first.",
    "In frost the housing is drained, since ice would split the casting along the flange.",
    "A worn bearing is heard as a dull knock that grows faster with the speed of the motor.",
]
W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def read(*sources: object, **options: object) -> tuple[Corpus, list]:
    corpus = Corpus(map(str, sources), "article", "title", options.get("limit", 0), options.get("alike", 0.8))
    return corpus, list(corpus.articles())


def make_pdf(path: Path) -> None:
    """Two pages of contents and text, with a running header and page numbers, as a book has them."""
    contents = [
        "Contents",
        *(f"{number} Part {number} . . . . . . . . . . . . . . {number + 1}" for number in range(1, 6)),
    ]
    with matplotlib.rc_context({"pdf.fonttype": 42}), PdfPages(path, metadata={"Title": "Pump X200"}) as pages:
        for number, lines in enumerate([contents, PROSE[:3], PROSE[3:]], 1):
            figure = Figure(figsize=(8, 10))
            figure.text(0.1, 0.95, f"{number}  Pump manual", fontsize=8)
            for place, line in enumerate(lines):
                figure.text(0.1, 0.85 - 0.05 * place, line, fontsize=11)
            figure.text(0.5, 0.05, str(number), fontsize=8)
            pages.savefig(figure)


def make_docx(path: Path) -> None:
    def paragraph(text: str, style: str = "") -> str:
        how = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
        return f"<w:p>{how}<w:r><w:t>{text}</w:t></w:r></w:p>"

    contents = [paragraph("Contents", "TOCHeading")]
    contents += [paragraph(f"{number} Part {number}\t{7 * number}", "TOC1") for number in range(1, 5)]
    body = [paragraph("Pump X200", "Title"), *contents, paragraph("1 Part 1", "Heading1"), *map(paragraph, PROSE[:3])]
    style = '<w:style w:type="paragraph" w:styleId="{0}"><w:name w:val="{1}"/></w:style>'
    styles = [("Title", "Title"), ("TOCHeading", "TOC Heading"), ("TOC1", "toc 1"), ("Heading1", "heading 1")]
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml"
    relation = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(
            "[Content_Types].xml",
            '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
            f'<Override PartName="/word/document.xml" ContentType="{kind}.document.main+xml"/>'
            f'<Override PartName="/word/styles.xml" ContentType="{kind}.styles+xml"/></Types>',
        )
        relationships = (
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{}</Relationships>'
        )
        for place, name, target in (
            ("_rels/.rels", "officeDocument", "word/document.xml"),
            ("word/_rels/document.xml.rels", "styles", "styles.xml"),
        ):
            packed.writestr(
                place,
                relationships.format(f'<Relationship Id="r" Type="{relation}/{name}" Target="{target}"/>'),
            )
        packed.writestr(
            "word/styles.xml", f"<w:styles {W}>{''.join(style.format(*each) for each in styles)}</w:styles>"
        )
        packed.writestr("word/document.xml", f"<w:document {W}><w:body>{''.join(body)}</w:body></w:document>")


def page_of(title: str, *body: str) -> str:
    return (
        '<!DOCTYPE html><html><head><meta charset="utf-8"><meta name="generator" content="by hand">'
        f"<title>{title}</title><style>p {{ color: red }}</style></head><body>{''.join(body)}</body></html>"
    )


def make_html(path: Path) -> None:
    menu = "".join(f'<li><a href="{n}.html">Chapter {n}</a></li>' for n in range(6))
    text = "".join(f"<p>{line}</p>" for line in PROSE[:3])
    link = '<p>See <a href="other.html">the other manual</a> for <img src="x.png" alt="a picture">more.</p>'
    path.write_text(
        page_of(
            "Pump X200 &amp; parts",
            f'<nav><ul>{menu}</ul></nav><h1>Pump X200<a class="headerlink" href="#p">¶</a></h1>{text}{link}',
            f"<ul>{menu}</ul><script>alert('no text')</script>",
        )
    )


def make_epub(path: Path) -> None:
    menu = "".join(f'<li><a href="one.xhtml#{n}">Part {n}</a></li>' for n in range(5))
    pages = {
        "nav.xhtml": page_of("Contents", f'<nav epub:type="toc"><ol>{menu}</ol></nav>'),
        "one.xhtml": page_of("One", "<h1>Pump X200</h1>", *(f"<p>{line}</p>" for line in PROSE[:3])),
        "two.xhtml": page_of("Two", *(f"<p>{line}</p>" for line in PROSE[3:])),
    }
    items = "".join(
        f'<item id="{name[:3]}" href="{name}" media-type="application/xhtml+xml"'
        f"{' properties=' + chr(34) + 'nav' + chr(34) if name == 'nav.xhtml' else ''}/>"
        for name in pages
    )
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("mimetype", "application/epub+zip")
        packed.writestr(
            "META-INF/container.xml",
            '<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        )
        packed.writestr(
            "book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id">'
            '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>Pump X200</dc:title>'
            '<dc:identifier id="id">x</dc:identifier><dc:language>en</dc:language></metadata>'
            f'<manifest>{items}</manifest><spine><itemref idref="nav"/><itemref idref="one"/><itemref idref="two"/>'
            "</spine></package>",
        )
        for name, page in pages.items():
            packed.writestr(name, page)


MAKE = {"pump.pdf": make_pdf, "pump.docx": make_docx, "pump.html": make_html, "pump.epub": make_epub}
NO_TEXT = ["Part 2", "Chapter 4", "Contents", "alert", "generator", "color", "¶", "](", "picture", "3  Pump manual"]


@pytest.mark.parametrize("name", MAKE)
def test_a_document_gives_its_text_and_title_without_contents_menus_headers_and_page_numbers(tmp_path: Path, name: str):
    MAKE[name](tmp_path / name)
    corpus, (article,) = read(tmp_path / name)
    assert not corpus.skipped
    assert article.file == name and article.title.startswith("Pump X200")
    assert all(line in " ".join(article.text.split()) for line in PROSE[:3])
    assert [scrap for scrap in NO_TEXT if scrap in article.text] == []
    assert not any(line.strip().isdecimal() for line in article.text.split("\n"))


def test_what_is_left_out_of_each_kind_is_counted(tmp_path: Path):
    counts = {}
    for name, make in MAKE.items():
        make(tmp_path / name)
        counts[name] = read(tmp_path / name)[0].left_out
    assert counts["pump.pdf"]["table of contents"] >= 5
    assert counts["pump.docx"]["table of contents"] == 5
    assert counts["pump.html"]["navigation"] == 6
    assert not counts["pump.epub"], "its contents are in a file of their own, which is not read"


def test_marks_that_the_converter_of_pdfs_takes_for_ligatures_are_put_back():
    plain = "sed ’s#usr/lib#lib#g’ see x.html#start and fi README* Wait: Mail done!"
    misread = "sed 'sfiusr/libfilibfig' see x.htmlfistart and fi READMEtt Waitti Mail donefi"
    assert (
        documents.with_marks(misread, plain) == "sed 's#usr/lib#lib#g' see x.html#start and fi README* Wait: Mail done!"
    )
    assert documents.with_marks("fine setting", "fine setting #") == "fine setting"


def test_backslashes_of_markdown_are_no_text_but_those_of_code_are(tmp_path: Path):
    kept = r"1\. Start \`x\` \$5\! and `a\.b` and ```\ns/\./x/``` then \* end"
    tidied = documents._ESCAPE.sub(lambda found: found[1] or found[2], kept.replace("\\\\", "\\"))
    assert tidied == "1. Start `x` $5! and `a\\.b` and ```\\ns/\\./x/``` then * end"


def test_documents_that_cannot_be_had_are_skipped_with_the_reason(tmp_path: Path):
    (tmp_path / "empty.pdf").touch()
    (tmp_path / "broken.docx").write_bytes(b"PK\x03\x04 not really")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 not really")
    make_docx(tmp_path / "good.docx")
    corpus, articles = read(tmp_path)
    assert [article.file for article in articles] == [f"{tmp_path.name}/good.docx"]
    assert {Path(skipped.file).name: skipped.reason for skipped in corpus.skipped} == {
        "empty.pdf": "cannot be converted",
        "broken.docx": "cannot be converted",
        "broken.zip": "cannot be read",
    }


def crash(data: bytes, suffix: str) -> tuple[str, str]:
    if b"crash" in data:
        os._exit(3)
    if b"hang" in data:
        time.sleep(60)
    return data.decode(), ""


def test_a_document_that_crashes_or_hangs_the_converter_takes_no_other_with_it(tmp_path: Path, monkeypatch):
    """The converter is a fake here, which does on purpose what a real one may do with a hostile file."""
    monkeypatch.setattr(documents, "convert", crash)
    monkeypatch.setattr(documents, "_MOST_SECONDS", 8)
    for name, text in {"a": "crash", "b": "first text", "c": "hang", "d": "second text"}.items():
        (tmp_path / f"{name}.pdf").write_text(text)
    corpus, articles = read(tmp_path)
    assert [article.text for article in articles] == ["first text", "second text"]
    assert [(skipped.reason, skipped.detail) for skipped in corpus.skipped] == [
        ("cannot be converted", "crashes the converter"),
        ("cannot be converted", "not converted in 8 s"),
    ]


def test_archives_are_read_as_folders_are_one_inside_the_other_too(tmp_path: Path):
    make_docx(tmp_path / "pump.docx")
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as inner:
        inner.writestr("deep/note.txt", "A note in two archives.")
        inner.writestr("__MACOSX/deep/._note.txt", "no text")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as outer:
        outer.write(tmp_path / "inner.zip", "inner.zip")
        outer.write(tmp_path / "pump.docx", "manuals/pump.docx")
        outer.writestr("cases.csv", "id,article\n7,The case of the missing valve.\n")
        outer.writestr("rows.parquet", b"not parquet")
    corpus, articles = read(tmp_path / "outer.zip")
    assert [(article.file, article.fields) for article in articles] == [
        ("outer.zip/cases.csv", {"id": 7}),
        ("outer.zip/inner.zip/deep/note.txt", {}),
        ("outer.zip/manuals/pump.docx", {}),
    ]
    assert [(skipped.file, skipped.reason) for skipped in corpus.skipped] == [
        ("outer.zip/rows.parquet", "no articles in it")
    ]


def test_an_archive_that_unpacks_to_far_too_much_is_skipped(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("augcon.run.corpus.LARGEST", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("huge.txt", "0" * (3 << 20))
        packed.writestr("small.txt", "Some text.")
    corpus, articles = read(tmp_path / "bomb.zip")
    assert [article.text for article in articles] == ["Some text."]
    assert "unpacks to 3 MiB" in str(corpus.skipped[0])


def test_a_folder_whose_name_begins_like_an_address_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("httpd").mkdir()
    Path("httpd/a.txt").write_text(PROSE[0])
    assert [article.file for article in read("httpd")[1]] == ["httpd/a.txt"]


def test_several_sources_are_read_one_after_the_other_and_a_limit_ends_that(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"article": "{line}", "title": "T"}}\n' for line in PROSE[:3]))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text(PROSE[4])
    sources = tmp_path / "a.jsonl", tmp_path / "b"
    _, articles = read(*sources)
    assert [(article.number, article.file, article.row, article.title) for article in articles] == [
        (0, "a.jsonl", 0, "T"),
        (1, "a.jsonl", 1, "T"),
        (2, "a.jsonl", 2, "T"),
        (3, "b/c.txt", None, ""),
    ]
    assert [article.number for article in read(*sources, limit=2)[1]] == [0, 1]


def test_an_object_store_is_read_through_its_address():
    """A store in memory stands for one on the network: fsspec has the same methods for both."""
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/pumps/sub/note.md", b"# Pumps\n\nThe valve [closes](http://x.y) at 3 bar.")
    store.pipe("/pumps/rows.csv", b"article,id\nSeals burn when they run dry.,A1\n")
    _, articles = read("memory://pumps")
    assert [(article.file, article.text, article.fields) for article in articles] == [
        ("pumps/rows.csv", "Seals burn when they run dry.", {"id": "A1"}),
        ("pumps/sub/note.md", "# Pumps\n\nThe valve closes at 3 bar.", {}),
    ]
    assert [article.text for article in read("memory://pumps/rows.csv")[1]] == ["Seals burn when they run dry."]


def test_a_document_on_the_web_is_read_and_a_page_is_no_folder(tmp_path: Path):
    make_html(tmp_path / "pump.html")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        (article,) = read(f"{address}/pump.html")[1]
        assert article.file == "pump.html" and PROSE[0] in article.text
        with pytest.raises(UserError, match="files of this kind"):
            read(f"{address}/")
        server.shutdown()


@pytest.mark.parametrize("source", ["nosuch://bucket/x", "memory://not-there", "s3://bucket/key"])
def test_an_address_that_cannot_be_opened_is_told_in_one_line(source: str):
    with pytest.raises(UserError) as error:
        read(source)
    assert source in str(error.value) and "\n" not in str(error.value)


# The same text twice


def test_the_same_article_is_taken_once_and_a_near_duplicate_is_named(tmp_path: Path):
    long = " ".join(f"{line} {number}" for number, line in enumerate(PROSE * 3))
    texts = {
        "a": long,
        "b": f"  {long}\n",
        "c": long.replace(" 4 ", " 40 ").upper(),
        "d": " ".join(reversed(long.split())),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    corpus, articles = read(tmp_path)
    folder = tmp_path.name
    assert [article.file for article in articles] == [f"{folder}/a.txt", f"{folder}/d.txt"]
    assert [(skipped.file, skipped.reason, skipped.detail) for skipped in corpus.skipped] == [
        (f"{folder}/b.txt", "the same as an earlier one", f"{folder}/a.txt"),
        (f"{folder}/c.txt", "nearly the same as an earlier one", f"{folder}/a.txt"),
    ]
    corpus, articles = read(tmp_path, alike=0)
    assert len(articles) == 3, "only what is the very same is left out"


WORDS = st.lists(st.sampled_from([f"word{n}" for n in range(300)]), min_size=60, max_size=200, unique=True)


@given(WORDS, st.integers(0, 40))
def test_near_duplicates_are_those_that_share_most_of_their_runs(tmp_path_factory, words: list[str], changed: int):
    folder = tmp_path_factory.mktemp("near")
    other = ["changed", *words[1:]] if changed == 0 else [*words[:-changed], *(f"new{n}" for n in range(changed))]

    def runs(of: list[str]) -> set[tuple[str, ...]]:
        return {tuple(of[at : at + 5]) for at in range(len(of) - 4)}

    share = len(runs(words) & runs(other)) / len(runs(words) | runs(other))
    (folder / "a.txt").write_text(" ".join(words))
    (folder / "b.txt").write_text(" ".join(other))
    found = len(read(folder)[1]) == 1
    assert found or share < 0.95
    assert not found or share > 0.62


# Front matter, contents, menus


@pytest.mark.parametrize(
    ("front", "title"),
    [
        ('---\ntitle: "A note"\ntags: [a, b]\nlist:\n  - one\n- two\n---\n', "A note"),
        ("---\ndate: 2024-05-01\n...\n", ""),
        ("+++\ntitle = 'A note'\n+++\n", "A note"),
    ],
)
def test_front_matter_is_left_out_and_gives_the_title(front: str, title: str):
    tidied = tidy(f"{front}The text.\n---\nMore: of it.", markdown=False)
    assert (tidied.text, tidied.title) == ("The text.\n---\nMore: of it.", title)
    assert tidied.left_out == {"front matter": front.count("\n")}


@pytest.mark.parametrize(
    "text",
    [
        "---\nNo front matter, but a rule.\n---\nText.",
        "Text....\nMore text.....\nAnd more……\nThe end.",
        "Contents\nThis chapter tells what a pump needs.\nIt has two parts.",
        "In 1990\nthere were 12\nand in 1991\nthere were 15",
        "- [One](a)\n- [Two](b)\n\nText.",
        "他说……\n后来……\n再后来……3\n没有了。",
    ],
)
def test_text_that_only_looks_like_that_stays(text: str):
    assert tidy(text, markdown=False).text == text


def test_contents_and_menus_are_left_out_and_what_surrounds_them_stays():
    contents = "目 录\n第一章 开机……………… 1\n第二章 保养 12\n第三章 故障\t30\n\n第一章\n水泵先要灌水。"
    assert tidy(contents, markdown=False).text == "\n第一章\n水泵先要灌水。"
    menu = "\n".join(f"* [Page {n}](/p/{n})" for n in range(5))
    tidied = tidy(f"Before.\n{menu}\nAfter [the link](x 'y').\n![pic](a.png)", markdown=True)
    assert tidied.text.startswith("Before.\nAfter") and "Page" not in tidied.text


@given(
    st.lists(
        st.sampled_from(["---", "- :x", "a: b", "....... 3", "Contents", "x 12", "[a](b)", "text", "", "| . . . . . |"])
    )
)
def test_tidying_never_adds_or_reorders_lines(lines: list[str]):
    left = iter(lines)
    text = tidy("\n".join(lines), markdown=False).text
    assert not text or all(line in left for line in text.split("\n"))


@pytest.mark.parametrize(
    "piece", ["- :x\n", "[a](", "![", "....... ", "# " + " " * 50, "| ", "---\n", "title: \n", "[](", "1 ", "… "]
)
def test_tidying_takes_time_linear_in_the_text(piece: str):
    def seconds(size: int) -> float:
        text = f"---\n{piece * (size // len(piece))}"
        best = []
        for _ in range(3):
            began = time.perf_counter()
            tidy(text, markdown=True)
            best.append(time.perf_counter() - began)
        return min(best)

    assert seconds(400_000) < 40 * max(seconds(40_000), 0.001)


# Through the front door


def test_title_fields_and_files_go_from_the_corpus_to_the_results(tmp_path: Path, engine):
    rows = [
        {"article": PROSE[0] + " " + PROSE[1], "title": "Pump X200", "id": "A-1", "price": 3.5, "notes": "x" * 5000},
        {"article": PROSE[0] + " " + PROSE[1], "title": "again", "id": "A-2"},
        {"article": PROSE[2] + " " + PROSE[3], "title": None, "id": "A-3", "tags": ["a"]},
    ]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "frost.md").write_text(f"---\ntitle: Frost\n---\n{PROSE[4]} {PROSE[5]}")
    (tmp_path / "notes" / "photo.jpg").write_bytes(b"\xff\xd8")
    results = tmp_path / "results"
    step = run(
        "step1_gen_q.py",
        *("--api-base", engine.api, "--corpus", f"{tmp_path / 'cases.jsonl'}, {tmp_path / 'notes'}"),
        *("--results", results, "--negatives", 0),
    )
    assert step.returncode == 0, step.stderr
    assert "corpus:  3 articles, 2 skipped" in step.stdout
    assert "skipped: cases.jsonl, row 1: the same as an earlier one (cases.jsonl, row 0)" in step.stdout
    assert "skipped: notes/photo.jpg: files of this kind are not read" in step.stdout
    assert "front matter 3" in step.stdout
    articles = [json.loads(line) for line in (results / "articles.jsonl").read_text().splitlines()]
    assert articles == [
        {"article": 0, "file": "cases.jsonl", "row": 0, "title": "Pump X200", "fields": {"id": "A-1", "price": 3.5}},
        {"article": 2, "file": "cases.jsonl", "row": 2, "title": "", "fields": {"id": "A-3"}},
        {"article": 3, "file": "notes/frost.md", "row": None, "title": "Frost", "fields": {}},
    ]
    skipped = [json.loads(line)["file"] for line in (results / "skipped.jsonl").read_text().splitlines()]
    assert skipped == ["cases.jsonl", "notes/photo.jpg"]
    titles = [json.loads(line)["title"] for line in (results / "contexts.jsonl").read_text().splitlines()]
    assert titles == ["Pump X200", "", "Frost"]


def test_a_title_field_that_is_named_has_to_be_there(tmp_path: Path, engine):
    (tmp_path / "cases.csv").write_text(f"headline,article\nA case,{PROSE[2]}\n")
    flags = ("--api-base", engine.api, "--corpus", tmp_path / "cases.csv", "--results", tmp_path / "r")
    step = run("step1_gen_q.py", *flags, "--title-field", "headlin")
    assert says_one_line(step, "'headlin'", "'headline'", "--title-field")
    assert run("step1_gen_q.py", *flags, "--title-field", "headline", "--negatives", 0).returncode == 0
    assert json.loads((tmp_path / "r" / "contexts.jsonl").read_text())["title"] == "A case"


def test_a_folder_of_articles_is_no_test_split(tmp_path: Path, engine):
    (tmp_path / "a.txt").write_text(PROSE[0])
    asked = run("inference.py", "--api-base", engine.api, "--corpus", tmp_path, "--results", tmp_path / "r")
    assert says_one_line(asked, "whole articles", "--questions")
    asked = run("inference.py", "--api-base", engine.api, "--questions", tmp_path, "--results", tmp_path / "r")
    assert says_one_line(asked, "whole articles")


def test_repeated_corpus_flags_are_refused_or_all_are_read(tmp_path: Path, engine):
    (tmp_path / "a.txt").write_text(PROSE[0])
    (tmp_path / "b.txt").write_text(PROSE[1])
    step = run(
        "step1_gen_q.py",
        *("--api-base", engine.api, "--results", tmp_path / "r", "--negatives", 0),
        *("--corpus", tmp_path / "a.txt", "--corpus", tmp_path / "b.txt"),
    )
    assert "2 articles" in step.stdout or says_one_line(step, "--corpus")


def test_values_that_are_no_json_go_through_as_text(tmp_path: Path):
    import datetime

    made = datetime.datetime(2024, 5, 1, 12, 30)
    rows = {
        "article": [PROSE[0]],
        "made": [made],
        "seen": [made.date()],
        "ok": [True],
        "many": [[1, 2]],
        "none": [None],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    _, (article,) = read(tmp_path / "saved")
    assert article.fields == {"made": "2024-05-01T12:30:00", "seen": "2024-05-01", "ok": True}
    assert json.dumps(article.fields)
