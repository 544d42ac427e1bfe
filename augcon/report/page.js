"use strict";
// The report. Texts of the run are data: they come out of the compressed blocks and go into the page through
// `element` alone, which never reads them as markup.

const PAGE = 30; // rows of a list
const SAMPLE = 50;
const KEPT_CHUNKS = 60; // opened chunks kept in memory
const MOST_CELLS = 4e6; // of a comparison of two texts
const $ = (id) => document.getElementById(id);

let data, T, PAIRS, ROOTS, firstOfChunk;

// ---- Elements

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}
const text = (content, kind = "") => element("bdi", { class: kind }, String(content));
const button = (label, press, options = {}) => element("button", { type: "button", onclick: press, ...options }, ...[label].flat());
const fill = (sentence, values) => sentence.replace(/\{(\w+)\}/g, (_, name) => values[name]);
const number = (value) => (value === null || value === undefined ? "–" : value.toLocaleString(document.documentElement.lang));
const share = (value, digits = 0) => (value === null || !isFinite(value) ? "–" : `${(100 * value).toFixed(digits)}%`);
const short = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));
const reason = (name) => T.reasons[name] ?? name;
const titleOf = (article) => data.titles[article] || T.untitled;
const kindOf = (n) => T.kinds[data.kinds[PAIRS.kind[n]]];

function chips(...parts) {
  return element("p", { class: "chips" }, ...parts.filter(Boolean).map((part) => text(part, "chip")));
}

/** Names and what is said of them, without those of which nothing is said. */
function facts(rows) {
  const told = rows.filter(([, content]) => content);
  return element("dl", {}, ...told.flatMap(([name, content]) => [element("dt", {}, name), element("dd", { class: "text" }, content)]));
}

function table(head, rows, chosen = -1) {
  const line = (tag, cells) => element("tr", {}, ...cells.map((cell) => element(tag, {}, cell instanceof Node ? cell : text(cell))));
  const body = rows.map((cells, place) => {
    const made = line("td", cells);
    if (place === chosen) made.className = "chosen";
    return made;
  });
  return element("div", { class: "scroll" }, element("table", {}, element("thead", {}, line("th", head)), element("tbody", {}, ...body)));
}

/** Buttons to leaf through `count` rows; `show` is called with a page when it changes. */
function pager(place, count, page, show) {
  const pages = Math.max(1, Math.ceil(count / PAGE));
  place.replaceChildren(
    button("‹", () => show(page - 1), { "aria-label": T.previous, title: T.previous, ...(page > 0 ? {} : { disabled: "" }) }),
    text(fill(T.page, { page: number(page + 1), pages: number(pages) })),
    button("›", () => show(page + 1), { "aria-label": T.next, title: T.next, ...(page + 1 < pages ? {} : { disabled: "" }) }),
  );
}

// ---- Data

/** The JSON of a compressed block. */
async function inflate(id) {
  const coded = $(id).textContent;
  const bytes = Uint8Array.fromBase64?.(coded) ?? Uint8Array.from(atob(coded), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const opened = new Map(); // the last chunks opened, the oldest first
function chunk(place) {
  const there = opened.get(place) ?? inflate(`chunk-${place}`).then(JSON.parse);
  opened.delete(place);
  opened.set(place, there);
  if (opened.size > KEPT_CHUNKS) opened.delete(opened.keys().next().value);
  return there;
}

async function rootAt(place) {
  const of = ROOTS.chunk[place];
  return (await chunk(of))[place - firstOfChunk[of]];
}

/** A pair with its root context and its node, which is missing for one added by hand. */
async function pairAt(n) {
  const root = await rootAt(PAIRS.root[n]);
  const pair = root.pairs.find((each) => each.n === n);
  return { pair, root, node: root.nodes.find((each) => each.id === pair.id) };
}

function keep(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {} // without storage, marks last as long as the page
}
function kept(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

// ---- Comparing texts, word by word (in Chinese, character by character)

function wordsOf(content) {
  const found = content.matchAll(/[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}]|[\p{L}\p{N}\p{M}]+/gu);
  return Array.from(found, (match) => ({ start: match.index, end: match.index + match[0].length, word: match[0].toLowerCase() }));
}

/** For each word of `one` the place in `other` of the same word in their longest common subsequence, else -1; null
 * where the texts are too long to be compared. */
function align(one, other) {
  const places = new Int32Array(one.length).fill(-1);
  const rows = one.length + 1, columns = other.length + 1;
  if (rows * columns > MOST_CELLS) return null;
  const longest = new Uint16Array(rows * columns);
  for (let i = one.length - 1; i >= 0; i--)
    for (let j = other.length - 1; j >= 0; j--)
      longest[i * columns + j] =
        one[i].word === other[j].word
          ? longest[(i + 1) * columns + j + 1] + 1
          : Math.max(longest[(i + 1) * columns + j], longest[i * columns + j + 1]);
  for (let i = 0, j = 0; i < one.length && j < other.length; )
    if (one[i].word === other[j].word) places[i++] = j++;
    else if (longest[(i + 1) * columns + j] >= longest[i * columns + j + 1]) i++;
    else j++;
  return places;
}

/** Where a part, perhaps rewritten, lies in a text: the stretch in which most words are the part's; null if nowhere. */
function locate(whole, part) {
  const at = whole.indexOf(part.trim());
  if (at >= 0) return [at, at + part.trim().length];
  const words = wordsOf(whole), wanted = wordsOf(part);
  const places = align(words, wanted);
  if (!places || !wanted.length) return null;
  let best = 0, from = 0, found = null, sum = 0;
  for (let i = 0; i < places.length; i++) {
    if (sum <= 0) [sum, from] = [0, i];
    sum += places[i] >= 0 ? 1 : -1;
    if (sum > best) [best, found] = [sum, [from, i]];
  }
  if (!found || best < wanted.length / 3) return null;
  return [words[found[0]].start, words[found[1]].end];
}

/** A text in which each word has a class, or none; neighbours of one class are marked together. */
function marked(content, words, classes) {
  const made = element("div", { class: "text" });
  let at = 0;
  for (let i = 0; i < words.length; ) {
    let last = i;
    while (last + 1 < words.length && classes[last + 1] === classes[i]) last++;
    if (classes[i]) {
      made.append(content.slice(at, words[i].start), element("mark", { class: classes[i] }, content.slice(words[i].start, words[last].end)));
      at = words[last].end;
    }
    i = last + 1;
  }
  made.append(content.slice(at));
  return made;
}

// ---- Summary

function showSummary() {
  const of = data.counts, titles = ["articles", "roots", "nodes", "queries", "kept", "pairs"];
  const open = ["step 1", "step 2", "step 3"].filter((step) => !data.stages[step]?.finished || data.stages[step].outdated);
  $("state").textContent = open.length ? fill(T.state_open, { steps: open.map((step) => T.step_names[step]).join(", ") }) : T.state_done;
  const notes = {
    queries: of.doubtful ? fill(T.doubtful, { number: number(of.doubtful) }) : "",
    nodes: of.roots ? fill(T.per_root, { number: (of.nodes / of.roots).toFixed(1) }) : "",
    pairs: of.quota && of.pairs ? fill(T.of_quota, { share: share(of.pairs / of.quota), quota: number(of.quota) }) : "",
  };
  $("figures").append(
    ...titles.map((name) =>
      element("div", { class: "card" }, element("b", {}, number(of[name] ?? 0)), text(T[name]), element("small", {}, notes[name] ?? "")),
    ),
  );
  const most = Math.max(1, ...titles.map((name) => of[name] ?? 0));
  for (const name of titles) {
    const bar = element("div", { class: "level" }, element("span", { class: "name" }, T[name]), element("b", {}, number(of[name] ?? 0)));
    const filled = element("i");
    filled.style.width = `${(100 * (of[name] ?? 0)) / most}%`;
    bar.append(element("span", { class: "track" }, filled));
    $("funnel").append(bar, ...lossesAfter(name));
  }
}

function lossesAfter(name) {
  const stays = { nodes: T.lost, branches: T.branch, queries: T.lost, kept: T.lost }; // said of the losses after a step
  const after = name === "nodes" ? ["nodes", "branches"] : [name];
  const made = after.flatMap((step) => data.losses.filter((loss) => loss.after === step).map((loss) => lossOf(loss, stays[step])));
  return made.length ? [element("div", { class: "losses" }, ...made)] : [];
}

function lossOf({ reason: name, detail, count, examples }, stays) {
  const told = [reason(name), detail && reason(detail), stays].filter(Boolean).join(" · ");
  const names = { context: T.passage, question: T.question, reply: T.last_reply, reason: T.outcome };
  const shown = examples.map((example) => facts(Object.entries(example).map(([key, content]) => [names[key] ?? key, content])));
  const rest = shown.length ? shown : [element("p", { class: "hint" }, T.no_example)];
  return element("details", { class: "loss" }, element("summary", {}, element("b", {}, number(count)), " ", text(told)), ...rest);
}

// ---- Pairs: the list

const list = { found: [], page: 0, chosen: -1, shown: null, run: 0, turn: 0, sample: null };

function numbersIn(name, low, high) {
  const from = low === "" ? -Infinity : Number(low), to = high === "" ? Infinity : Number(high);
  return low === "" && high === "" ? () => true : (n) => PAIRS[name][n] !== null && PAIRS[name][n] >= from && PAIRS[name][n] <= to;
}

/** Applies the filters at once, then the search, chunk by chunk, until another filter is set. */
async function filter(stay = false) {
  const run = ++list.run, form = new FormData($("filters"));
  const is = (name, column) => (form.get(name) === "" ? () => true : (n) => String(PAIRS[column][n] ?? "") === form.get(name).replace("by hand", ""));
  const tests = [
    is("depth", "depth"),
    is("kind", "kind"),
    is("chinese", "chinese"),
    numbersIn("score", form.get("score-low"), form.get("score-high")),
    numbersIn("length", form.get("length-low"), form.get("length-high")),
    (n) => !form.get("mark") || (marks.byNumber.get(n)?.mark ?? "none") === form.get("mark"),
  ];
  let found = [];
  for (let n = 0; n < PAIRS.root.length; n++) if (tests.every((test) => test(n))) found.push(n);
  const wanted = form.get("search").trim().toLowerCase();
  if (wanted) found = await search(found, wanted, run);
  if (run !== list.run) return;
  const [column, way] = form.get("sort").split("-");
  if (column) {
    const sign = way === "down" ? -1 : 1, worst = sign * Infinity;
    const value = (n) => PAIRS[column][n] ?? worst;
    found.sort((one, other) => sign * (value(one) - value(other)) || one - other);
  }
  list.found = found;
  const at = found.indexOf(list.chosen);
  await showList(stay && at >= 0 ? Math.floor(at / PAGE) : 0);
  if (run !== list.run) return;
  if (!stay || at < 0) await choose(found[0] ?? -1, false);
}

async function search(among, wanted, run) {
  const found = [], places = Map.groupBy(among, (n) => ROOTS.chunk[PAIRS.root[n]]), chunks = [...places.keys()];
  const has = (content) => content?.toLowerCase().includes(wanted);
  const escaped = JSON.stringify(wanted).slice(1, -1); // a block that lacks it needs no parsing
  const ahead = chunks.slice(0, 3).map((of) => inflate(`chunk-${of}`));
  let told = performance.now();
  for (const [at, of] of chunks.entries()) {
    const json = await ahead.shift();
    if (run !== list.run) return [];
    if (at + 3 < chunks.length) ahead.push(inflate(`chunk-${chunks[at + 3]}`));
    if (!json.toLowerCase().includes(escaped)) continue;
    const roots = JSON.parse(json);
    for (const n of places.get(of)) {
      const root = roots[PAIRS.root[n] - firstOfChunk[of]], pair = root.pairs[n - root.pairs[0].n];
      const passage = () => root.nodes.find((node) => node.id === pair.id)?.context ?? pair.context;
      if (has(pair.question) || has(pair.answer) || has(passage())) found.push(n);
    }
    if (performance.now() - told > 200) {
      $("found").textContent = fill(T.searching, { number: number(found.length) });
      told = performance.now();
    }
  }
  return found;
}

async function showList(page) {
  list.page = page;
  const of = list.sample ?? list.found, shown = of.slice(page * PAGE, (page + 1) * PAGE);
  $("found").textContent = list.sample
    ? fill(T.sample_at, { at: number(of.indexOf(list.chosen) + 1), all: number(of.length) })
    : fill(T.found, { number: number(of.length), all: number(PAIRS.root.length) });
  pager($("pager"), of.length, page, showList);
  const rows = await Promise.all(shown.map(async (n) => [n, (await pairAt(n)).pair]));
  if (list.page !== page) return;
  $("rows").replaceChildren(...rows.map(([n, pair]) => element("li", {}, rowOf(n, pair))));
  if (!of.length) $("rows").append(element("li", { class: "missing" }, T.no_match));
}

function rowOf(n, pair) {
  const mark = marks.byNumber.get(n);
  const said = [
    element("i", { class: `dot ${mark?.mark ?? ""}` }),
    text(mark?.new_question ?? pair.question, "question"),
    element("small", {}, `${depthOf(n)} · ${T.score} ${short(PAIRS.score[n])} · ${T.axis_length} ${number(PAIRS.length[n])}`),
  ];
  return button(said, () => choose(n, true), { class: "row", "data-n": n, "aria-current": n === list.chosen ? "true" : null });
}

const depthOf = (n) => (PAIRS.depth[n] === null ? T.added_by_hand : `${T.depth} ${PAIRS.depth[n]}`);

/** Chooses the pair `by` places further in the list or the sample. */
async function step(by) {
  const of = list.sample ?? list.found, to = of.indexOf(list.chosen) + by;
  if (to >= 0 && to < of.length) await choose(of[to], true);
}

async function choose(n, open) {
  list.chosen = n;
  const at = (list.sample ?? list.found).indexOf(n);
  if (at >= 0 && Math.floor(at / PAGE) !== list.page) await showList(Math.floor(at / PAGE));
  for (const row of document.querySelectorAll(".row")) {
    const current = Number(row.dataset.n) === n;
    current ? row.setAttribute("aria-current", "true") : row.removeAttribute("aria-current");
    if (current && open) row.scrollIntoView({ block: "nearest" });
  }
  if (list.sample) $("found").textContent = fill(T.sample_at, { at: number(at + 1), all: number(list.sample.length) });
  $("pair-view").classList.toggle("open", open);
  await showPair();
}

// ---- Pairs: one beside its passage

async function showPair(editing = false) {
  const n = list.chosen;
  if (n < 0) return $("pair").replaceChildren();
  const turn = ++list.turn, of = await pairAt(n);
  if (turn !== list.turn) return; // another one has been asked for since
  list.shown = of.pair;
  const mark = marks.byNumber.get(n);
  const question = mark?.new_question ?? of.pair.question, answer = mark?.new_answer ?? of.pair.answer;
  const article = ROOTS.article[PAIRS.root[n]];
  $("pair").replaceChildren(
    button(T.back, () => $("pair-view").classList.remove("open"), { class: "back" }),
    ...(editing ? [editor(of, question, answer)] : [element("h2", { class: "text" }, question), element("div", { class: "text answer" }, answer)]),
    markButtons(of, mark, editing),
    chips(of.pair.id, depthOf(n), `${T.score} ${short(PAIRS.score[n])}`, kindOf(n), data.titles[article]),
    element("h3", {}, T.passage),
    ...passage(of),
    of.node ? button(T.in_tree, () => showInTree(PAIRS.root[n], of.pair.id), { class: "quiet" }) : "",
  );
  $("new-answer")?.focus();
}

function markButtons(of, mark, editing) {
  const one = (name, label, key, press) =>
    button(label, press, { class: `mark ${name}`, "aria-pressed": String(mark?.mark === name), title: `${label} (${key})`, ...(editing ? { disabled: "" } : {}) });
  return element(
    "div",
    { class: "marks" },
    one("good", T.good, "g", () => setMark("good")),
    one("bad", T.bad, "b", () => setMark("bad")),
    one("edited", T.edit, "e", () => showPair(true)),
    button("‹", () => step(-1), { "aria-label": T.previous, title: "k" }),
    button("›", () => step(1), { "aria-label": T.next, title: "j" }),
  );
}

function editor(of, question, answer) {
  const asked = element("textarea", { rows: 2, "aria-label": T.question, id: "new-question" });
  const said = element("textarea", { rows: 8, "aria-label": T.answer, id: "new-answer" });
  [asked.value, said.value] = [question, answer];
  const take = () => {
    const changed = { new_question: asked.value.trim(), new_answer: said.value.trim() };
    if (changed.new_question && changed.new_answer) setMark("edited", changed);
  };
  return element("div", { class: "editor" }, asked, said, button(T.take, take, { class: "strong", id: "take" }), button(T.cancel, () => showPair()));
}

function passage({ pair, root, node }) {
  const part = node?.context ?? pair.context;
  if (!root.text) return part ? [element("div", { class: "text passage" }, part)] : [element("p", { class: "hint" }, T.passage_unknown)];
  if (!part) return [element("div", { class: "text passage" }, root.text), element("p", { class: "hint" }, T.passage_unknown)];
  if (node?.id.endsWith(":")) return [element("p", { class: "hint" }, T.passage_whole), element("div", { class: "text passage" }, root.text)];
  const at = locate(root.text, part);
  if (!at)
    return [element("p", { class: "hint" }, T.passage_unplaced), element("div", { class: "text passage" }, part), element("div", { class: "text passage" }, root.text)];
  const shown = marked(root.text, [{ start: at[0], end: at[1] }], ["part"]);
  shown.classList.add("passage");
  requestAnimationFrame(() => {
    const first = shown.querySelector("mark");
    if (first) shown.scrollTop = first.offsetTop - shown.offsetTop - 40;
  });
  return [element("p", { class: "hint" }, T.passage_hint), shown];
}

// ---- Review

const marks = { byNumber: new Map() };

/** Marks the pair that is shown; a key that comes before the next one is shown does nothing. */
async function setMark(mark, changed = {}) {
  const n = list.chosen, pair = list.shown;
  if (pair?.n !== n) return;
  const again = marks.byNumber.get(n)?.mark === mark && mark !== "edited";
  if (again) marks.byNumber.delete(n);
  else marks.byNumber.set(n, { id: pair.id || null, question: pair.question, mark, ...changed });
  storeMarks();
  const last = list.sample?.at(-1) ?? n; // in a sample, each mark leads to the next pair
  await (n === last || again ? showPair() : step(1));
  await showList(list.page);
}

const lines = () => [...marks.byNumber.entries()].sort(([one], [other]) => one - other).map(([, mark]) => `${JSON.stringify(mark)}\n`);

function storeMarks() {
  keep(`augcon-review-${data.run}`, lines().join(""));
  showTally();
}

function showTally(note = "") {
  const of = (list.sample ?? [...marks.byNumber.keys()]).map((n) => marks.byNumber.get(n)?.mark).filter(Boolean);
  const count = (mark) => of.filter((each) => each === mark).length;
  const said = [note, fill(T.tally, { good: number(count("good")), bad: number(count("bad")), edited: number(count("edited")) })];
  if (list.sample && of.length) {
    const errors = of.length - count("good"), [low, high] = wilson(errors, of.length);
    const rate = { errors, marked: of.length, rate: share(errors / of.length), low: share(low, 1), high: share(high, 1) };
    said.push(fill(T.sample_rate, rate), of.length === list.sample.length ? T.sample_done : "");
  }
  $("tally").textContent = said.filter(Boolean).join(" · ");
}

/** The 95% interval of a share, after Wilson. */
function wilson(hits, of, z = 1.959964) {
  const rate = hits / of, square = (z * z) / of;
  const middle = (rate + square / 2) / (1 + square), half = (z / (1 + square)) * Math.sqrt((rate * (1 - rate)) / of + square / (4 * of));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

/** Takes marks in from lines of a review; those of pairs that are not here are counted. */
async function readMarks(content) {
  const placeOf = new Map(Array.from(ROOTS.number, (root, place) => [root, place]));
  const read = content.split("\n").flatMap((line, place) => {
    if (!line.trim()) return [];
    try {
      const { id = null, question, mark, new_question, new_answer } = JSON.parse(line);
      if (typeof question !== "string" || !["good", "bad", "edited"].includes(mark)) throw new Error();
      if (mark === "edited" && !(new_question && new_answer)) throw new Error();
      return [mark === "edited" ? { id, question, mark, new_question, new_answer } : { id, question, mark }];
    } catch {
      throw new Error(fill(T.load_failed, { line: place + 1 }));
    }
  });
  let unknown = 0;
  for (const mark of read) {
    const place = placeOf.get(mark.id ? Number(mark.id.split(":")[0]) : -1);
    const pair = place === undefined ? null : (await rootAt(place)).pairs.find((each) => (each.id || null) === mark.id && each.question === mark.question);
    if (pair) marks.byNumber.set(pair.n, mark);
    else unknown++;
  }
  return { number: number(read.length - unknown), unknown: number(unknown), some: unknown > 0 };
}

async function loadReview(file) {
  let note;
  try {
    const found = await readMarks(await file.text());
    note = fill(found.some ? T.loaded_unknown : T.loaded, found);
  } catch (error) {
    note = error.message;
  }
  storeMarks();
  showTally(note);
  await filter(true);
  await showPair();
}

function saveReview() {
  const address = URL.createObjectURL(new Blob(lines(), { type: "application/jsonl" }));
  element("a", { href: address, download: "review.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

/** The same pairs for the same run, whoever draws them. */
function drawSample() {
  let state = parseInt(data.run.slice(0, 8), 16) || 1;
  const random = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  const all = PAIRS.root.length, drawn = new Set();
  while (drawn.size < Math.min(SAMPLE, all)) drawn.add(Math.floor(random() * all));
  return [...drawn];
}

async function toggleSample() {
  list.sample = list.sample ? null : drawSample();
  $("sample").textContent = list.sample ? T.sample_end : T.sample;
  $("pair-view").classList.toggle("sampling", Boolean(list.sample));
  list.chosen = (list.sample ?? list.found)[0] ?? -1;
  await showList(0);
  await choose(list.chosen, Boolean(list.sample));
  showTally();
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("pairs").hidden) return;
  if (event.target.closest("input, textarea, select")) return;
  const press = { j: () => step(1), k: () => step(-1), g: () => setMark("good"), b: () => setMark("bad"), e: () => showPair(true) }[event.key];
  if (press && !$("take")) {
    event.preventDefault();
    press();
  }
}

// ---- Trees

const browser = { found: [], open: -1 };

function rootsOf() {
  const found = data.titles.map(() => []);
  ROOTS.article.forEach((article, place) => found[article].push(place));
  return found;
}

function showArticles(page) {
  const wanted = $("article-search").value.trim().toLowerCase();
  browser.found = data.titles.map((_, place) => place).filter((place) => !wanted || data.titles[place].toLowerCase().includes(wanted));
  $("articles-found").textContent = fill(T.articles_found, { number: number(browser.found.length) });
  pager($("articles-pager"), browser.found.length, page, showArticles);
  $("articles").replaceChildren(
    ...browser.found.slice(page * PAGE, (page + 1) * PAGE).map((article) => {
      const roots = browser.roots[article], count = (name) => roots.reduce((sum, place) => sum + (ROOTS[name][place] ?? 0), 0);
      const counted = element("small", {}, `${number(count("nodes"))} ${T.nodes} · ${number(count("pairs"))} ${T.pairs}`);
      const title = element("summary", {}, text(titleOf(article), "question"), counted);
      const rows = roots.map((place) => {
        const said = [text(`${T.root} ${ROOTS.number[place]}`), element("small", {}, sizeOf(place))];
        return button(said, () => showRoot(place), { class: "row", "data-root": place });
      });
      return element("details", { class: "article" }, title, ...rows);
    }),
  );
}

const sizeOf = (place) =>
  fill(T.root_row, { length: number(ROOTS.length[place]), pairs: number(ROOTS.pairs[place]), quota: number(ROOTS.quota[place]) });

async function showRoot(place, openId = null) {
  for (const row of document.querySelectorAll("[data-root]"))
    Number(row.dataset.root) === place ? row.setAttribute("aria-current", "true") : row.removeAttribute("aria-current");
  browser.open = place;
  const root = await rootAt(place);
  if (browser.open !== place) return;
  const passes = new Map();
  for (const node of root.nodes) {
    const pass = node.id.split(":")[1];
    passes.set(pass, [...(passes.get(pass) ?? []), node]);
  }
  $("tree").replaceChildren(
    element("h2", {}, text(titleOf(ROOTS.article[place])), " ", text(`${T.root} ${root.root}`, "muted")),
    chips(sizeOf(place)),
    root.shown ? "" : element("p", { class: "hint" }, T.trees_left_out),
    ...[...passes].flatMap(([pass, nodes]) => [element("h3", {}, fill(T.tree, { number: Number(pass) + 1 })), ...treeOf(root, nodes)]),
  );
  const chosen = openId && [...document.querySelectorAll("#tree .node")].find((node) => node.dataset.id === openId);
  if (chosen) {
    for (let node = chosen; node; node = node.parentElement.closest(".node")) node.open = true;
    chosen.scrollIntoView({ block: "start" });
  } else $("tree").scrollIntoView({ block: "nearest" });
}

/** The nodes of one tree, each in the one above it. */
function treeOf(root, nodes) {
  const byPath = new Map(nodes.map((node) => [node.id.split(":")[2], node])), made = new Map(), tops = [];
  for (const [path, node] of byPath) {
    const halves = [byPath.get(`${path}1`), byPath.get(`${path}2`)].filter(Boolean);
    const entry = nodeOf(root, node, path, root.shown ? halves : []);
    made.set(path, entry);
    const above = path && made.get(path.slice(0, -1));
    above ? above.append(entry) : tops.push(entry);
  }
  return tops;
}

function nodeOf(root, node, path, halves) {
  const fate = node.dropped ? "dropped" : node.fate;
  const said = fate === "dropped" ? fill(T.dropped, { reason: reason(node.dropped) }) : fate ? reason(fate) : "";
  const entry = element(
    "details",
    { class: "node", "data-id": node.id },
    element(
      "summary",
      {},
      element("code", {}, path || "•"),
      text(node.query ?? T.no_question, node.query ? "question" : "muted"),
      element(
        "small",
        {},
        node.outcome === "done" && node.query ? "" : text(reason(node.outcome), "chip warn"),
        node.doubt ? text(T.doubt, "chip warn") : "",
        fate ? text(said, `chip ${fate === "kept" ? "fine" : ""}`) : "",
        node.score === undefined ? "" : text(short(node.score), "chip"),
      ),
    ),
  );
  entry.addEventListener("toggle", () => {
    if (entry.open && !entry.querySelector(":scope > .inside")) entry.firstChild.after(insideOf(root, node, halves));
  });
  return entry;
}

function insideOf(root, node, halves) {
  const said = (...parts) => parts.filter(Boolean).join(" · ");
  const told = facts([
    [T.outcome, said(node.outcome !== "done" || !node.query ? reason(node.outcome) : "", node.detail && reason(node.detail))],
    [T.tries, node.tries && String(node.tries)],
    [T.doubt, node.doubt],
    [T.score, node.score === undefined ? "" : short(node.score)],
    [T.fate, said(node.fate && reason(node.fate), node.dropped && fill(T.dropped, { reason: reason(node.dropped) }))],
    [T.answer, root.pairs.find((pair) => pair.id === node.id)?.answer],
    [T.last_reply, node.reply],
  ]);
  return element("div", { class: "inside" }, ...halvesIn(node.context, halves), told);
}

/** A context, with what its halves kept of it and what they lost. */
function halvesIn(context, halves) {
  const plain = (hint) => [element("div", { class: "text" }, context), element("p", { class: "hint" }, hint)];
  if (!halves.length) return plain(T.no_halves);
  const words = wordsOf(context), first = wordsOf(halves[0].context);
  const places = align(words, [...first, ...(halves[1] ? wordsOf(halves[1].context) : [])]);
  if (!places) return plain("");
  const classes = Array.from(places, (place) => (place < 0 ? "lost" : place < first.length ? "first" : "second"));
  const legend = [["first", T.in_first], ["second", T.in_second], ["lost", T.lost_text]];
  const shares = legend.map(([name, label]) => element("mark", { class: name }, `${label} ${share(classes.filter((each) => each === name).length / words.length)}`));
  return [marked(context, words, classes), element("p", { class: "legend" }, ...shares)];
}

async function showInTree(place, id) {
  location.hash = "#trees";
  await new Promise((ready) => setTimeout(ready));
  const article = ROOTS.article[place];
  $("article-search").value = "";
  showArticles(Math.floor(article / PAGE));
  $("articles").children[article % PAGE].open = true;
  await showRoot(place, id);
}

// ---- Near-duplicates

function showAlike() {
  if (!data.alike.length) return $("alike-list").append(element("p", { class: "missing" }, T.missing_alike));
  const side = (one, other, label) => {
    const words = wordsOf(one.question), places = align(words, wordsOf(other.question));
    const shown = marked(one.question, words, Array.from(places ?? [], (place) => (place < 0 ? "" : "part")));
    return element("div", {}, element("small", {}, `${label} · ${one.id} · ${T.score} ${short(one.score)}`), shown);
  };
  $("alike-list").append(
    ...data.alike.map(({ left_out, kept, likeness }) =>
      element(
        "div",
        { class: "pairing" },
        side(left_out, kept, left_out.fate === "alike" ? T.alike_here : T.alike_elsewhere),
        side(kept, left_out, `${T.alike_kept} · ${fill(T.likeness, { share: share(likeness) })}`),
      ),
    ),
  );
}

// ---- The run: what the page itself does not hold of it

function showRun() {
  showCoverage();
  for (const [name, { sets, chosen }] of Object.entries(data.search)) {
    const questions = (set) => element("ul", {}, ...set.questions.map((question) => element("li", {}, text(question))));
    const place = sets.findIndex((set) => String(set.examples) === String(chosen));
    const shown = table([T.mean, T.set], sets.map((set) => [short(set.mean), questions(set)]), place);
    $("search").append(element("h3", {}, name), shown);
  }
  for (const [name, of] of Object.entries(data.figures)) {
    const { asked = [], ...others } = of;
    $("figures-of-steps").append(element("h3", {}, T.step_names[name] ?? name), ...[others, ...asked].map((all) => table(["", ""], figureRows(all))));
  }
}

/** Figures in words, those within others in one line. */
function figureRows(all) {
  const named = (key) => T.figures[key] ?? T.reasons[key] ?? key.replaceAll("_", " ");
  const said = (value) => {
    if (typeof value === "number") return number(value);
    if (Array.isArray(value)) return value.map(said).join(" · ");
    return typeof value === "object" ? Object.entries(value).map(([key, each]) => `${named(key)} ${said(each)}`).join(" · ") : value;
  };
  const told = Object.entries(all).filter(([key, value]) => value !== null && key !== "pace" && said(value) !== "");
  return told.map(([key, value]) => [named(key), said(value)]);
}

function showCoverage() {
  const { length, finer, covered } = data.articles;
  const order = length.map((_, place) => place).sort((one, other) => finer[one] / length[one] - finer[other] / length[other]);
  const cell = (value) => element("span", { class: "meter" }, element("i"), share(value));
  const show = (page) => {
    const shown = order.slice(page * PAGE, (page + 1) * PAGE);
    const lines = shown.map((place) => [titleOf(place), number(length[place]), cell(finer[place] / length[place]), cell(covered[place] / length[place])]);
    $("coverage").replaceChildren(table([T.article, T.article_length, T.covered_finer, T.covered_any], lines));
    $("coverage").querySelectorAll(".meter i").forEach((bar) => (bar.style.width = bar.nextSibling.textContent));
    if (order.length > PAGE) pager($("coverage-pager"), order.length, page, show);
  };
  if (data.counts.pairs && length.some(Boolean)) show(0);
  else $("coverage").append(element("p", { class: "missing" }, T.missing_pairs));
}

// ---- Beginning

function showSection() {
  const sections = [...document.querySelectorAll("main > section")];
  const name = location.hash.slice(1), shown = sections.find((section) => section.id === name) ?? sections[0];
  for (const section of sections) section.hidden = section !== shown;
  for (const link of document.querySelectorAll("nav a"))
    link.hash === `#${shown.id}` ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  document.querySelector("nav [aria-current]").scrollIntoView({ block: "nearest", inline: "center" });
  scrollTo(0, 0);
}

function toggleTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches, now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  keep("augcon-theme", document.documentElement.dataset.theme);
}

function fillFilters() {
  const add = (name, value, label) => $("filters").elements[name].append(element("option", { value }, label));
  const depths = [...new Set(PAIRS.depth)].sort((one, other) => (one ?? Infinity) - (other ?? Infinity));
  for (const depth of depths) add("depth", depth ?? "by hand", depth ?? T.added_by_hand);
  const kinds = new Set(PAIRS.kind);
  data.kinds.forEach((kind, place) => kinds.has(place) && add("kind", place, T.kinds[kind]));
}

async function begin() {
  if (kept("augcon-theme")) document.documentElement.dataset.theme = kept("augcon-theme");
  showSection();
  addEventListener("hashchange", showSection);
  $("theme").addEventListener("click", toggleTheme);
  data = JSON.parse(await inflate("index"));
  [T, PAIRS, ROOTS] = [data.texts, data.pairs, data.roots];
  firstOfChunk = [];
  ROOTS.chunk.forEach((of, place) => (firstOfChunk[of] ??= place));
  $("folder").textContent = data.folder;
  document.title = `${data.folder} · ${T.title}`;
  showSummary();
  showAlike();
  showRun();
  browser.roots = rootsOf();
  const trees = data.counts.nodes > 0;
  $("no-trees").hidden = trees;
  $("tree-view").hidden = !trees;
  $("trees-hint").textContent = trees ? [T.trees_hint, data.counts.every > 1 ? fill(T.trees_sampled, { nodes: number(data.counts.nodes), every: data.counts.every }) : ""].join(" ") : "";
  $("tree").append(element("p", { class: "hint" }, T.choose_root));
  $("article-search").addEventListener("input", () => showArticles(0));
  showArticles(0);
  const pairs = PAIRS.root.length > 0;
  $("no-pairs").hidden = pairs;
  $("pair-view").hidden = !pairs;
  document.querySelector("#pairs .review").hidden = !pairs;
  if (pairs) await beginPairs();
  document.documentElement.dataset.ready = "true";
}

async function beginPairs() {
  fillFilters();
  let waiting;
  const soon = (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, event.target.name === "search" ? 250 : 0);
  };
  $("filters").addEventListener("input", soon);
  $("filters").addEventListener("reset", soon);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("sample").addEventListener("click", toggleSample);
  $("save").addEventListener("click", saveReview);
  $("load").addEventListener("change", (event) => event.target.files[0] && loadReview(event.target.files[0]));
  document.addEventListener("keydown", pressed);
  await filter();
  try {
    await readMarks(kept(`augcon-review-${data.run}`) ?? "");
  } catch {} // another page has written there
  if (marks.byNumber.size) await filter(true).then(() => showPair());
  showTally();
}

begin().catch((error) => {
  $("problem").hidden = false;
  console.error(error);
});
