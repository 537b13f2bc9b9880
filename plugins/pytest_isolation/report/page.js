// Shows the run that stands in this page as JSON. What tests have said becomes text nodes, never markup.

const ROWS_AT_ONCE = 150; // ten thousand at once would take a second; more are made as one scrolls
const ZOOM_AT_MOST = 1024;
const ORDER = ["error", "failed", "xpassed", "rerun", "xfailed", "skipped", "passed"];
const ENDS = ["passed", "failed", "interrupted", "internal error", "usage error", "no tests"]; // pytest's exit statuses

const run = JSON.parse(byId("run").textContent);
const tests = run.tests;
const first = tests.reduce((least, test) => Math.min(least, test.start), Infinity);
const last = tests.reduce((most, test) => Math.max(most, test.start + test.wall), -Infinity);
const slowest = tests.reduce((most, test) => Math.max(most, test.wall), 0) || 1;
tests.forEach((test, index) => (test.index = index));
const collator = new Intl.Collator("en", { numeric: true });

// `value` is what a column sorts by; numbers begin with the largest
const COLUMNS = [
  { key: "outcome", label: "Outcome", value: (test) => rank(test.outcome) },
  { key: "test", label: "Test", value: (test) => test.nodeid },
  { key: "wall", label: "Wall", unit: "s", value: (test) => test.wall, show: (wall) => wall.toFixed(3) },
  { key: "cpu", label: "CPU", unit: "s", value: (test) => test.cpu, show: (cpu) => cpu.toFixed(3) },
  { key: "memory", label: "Memory", unit: "MiB", value: (test) => test.memory, show: (memory) => (memory / 2 ** 20).toFixed(1) },
  { key: "changes", label: "Changes", value: (test) => total(test, "changes"), show: (count) => (count ? `${count}` : "") },
  { key: "start", label: "Start", unit: "s", value: (test) => test.start - first, show: (start) => start.toFixed(3) },
  { key: "sandbox", label: "Sandbox", value: (test) => test.sandbox || null, show: (sandbox) => `${sandbox}` },
  { key: "worker", label: "Worker", value: (test) => test.worker, show: (worker) => `${worker}` },
];

const TRAITS = {
  changes: "changed files",
  processes: "left processes",
  refused: "refused network",
};

const state = {
  sort: "outcome",
  descending: false,
  words: [],
  outcomes: new Set(), // empty: all of them
  traits: new Set(),
  open: new Set(),
  shown: [], // the tests that match, in order
  made: 0, // how many of those have a row
  zoom: 1,
};
const bars = [];

// Elements and text

function byId(id) {
  return document.getElementById(id);
}

function make(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Control characters, and those that turn the direction of writing, made visible. */
function visible(text) {
  return text
    .replace(/\r\n?/g, "\n")
    .replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\p{Cs}]/gu, (character) => {
      const code = character.charCodeAt(0);
      return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
    });
}

/** For names: one line. */
function name(text) {
  return visible(text).replaceAll("\n", "\\n");
}

function withoutColours(text) {
  return visible(text.replace(/\x1b\[[0-9;:]*m/g, ""));
}

/** A <pre> of text with ANSI colours. */
function coloured(text) {
  const pre = make("pre");
  pre.tabIndex = 0; // scrolls, and so must be reachable
  let style = {};
  for (const part of text.split(/(\x1b\[[0-9;:]*m)/)) {
    if (/^\x1b\[[0-9;:]*m$/.test(part)) style = graphics(style, part.slice(2, -1).split(/[;:]/).map(Number));
    else if (part) pre.append(painted(visible(part), style));
  }
  return pre;
}

/** The style after a "select graphic rendition" sequence. "Conceal" is not obeyed. */
function graphics(before, codes) {
  let style = { ...before };
  for (let at = 0; at < codes.length; at++) {
    const code = codes[at];
    if (code === 0) style = {};
    else if (code === 1) style.bold = true;
    else if (code === 2) style.faint = true;
    else if (code === 3) style.italic = true;
    else if (code === 4) style.underline = true;
    else if (code === 7) style.inverse = true;
    else if (code === 9) style.struck = true;
    else if (code === 22) style.bold = style.faint = false;
    else if (code === 23) style.italic = false;
    else if (code === 24) style.underline = false;
    else if (code === 27) style.inverse = false;
    else if (code === 29) style.struck = false;
    else if (code >= 30 && code <= 37) style.colour = palette(code - 30);
    else if (code >= 90 && code <= 97) style.colour = palette(code - 82);
    else if (code >= 40 && code <= 47) style.background = palette(code - 40);
    else if (code >= 100 && code <= 107) style.background = palette(code - 92);
    else if (code === 39) style.colour = undefined;
    else if (code === 49) style.background = undefined;
    else if (code === 38 || code === 48) {
      const which = code === 38 ? "colour" : "background";
      if (codes[at + 1] === 5) {
        style[which] = palette(codes[at + 2]);
        at += 2;
      } else if (codes[at + 1] === 2) {
        style[which] = `rgb(${codes.slice(at + 2, at + 5).join(" ")})`;
        at += 4;
      }
    }
  }
  return style;
}

/** One of a terminal's 256 colours: sixteen of this page's own, a cube, and greys. */
function palette(number) {
  if (number < 16) return `var(--ansi-${number})`;
  if (number >= 232) return `rgb(${Array(3).fill(8 + 10 * (number - 232)).join(" ")})`;
  const cube = [36, 6, 1].map((part) => Math.floor((number - 16) / part) % 6);
  return `rgb(${cube.map((level) => (level ? 55 + 40 * level : 0)).join(" ")})`;
}

function painted(text, style) {
  const span = make("span", ["bold", "faint", "italic", "underline", "struck"].filter((mark) => style[mark]).join(" "), text);
  let { colour, background } = style;
  if (style.inverse) [colour, background] = [background ?? "var(--surface)", colour ?? "var(--text)"];
  // The page's own colours are legible on its light and its dark; any other is made so.
  const mixed = !background && colour?.startsWith("rgb") ? `color-mix(in oklab, ${colour} 60%, var(--text))` : colour;
  if (mixed) span.style.color = mixed;
  if (background) span.style.backgroundColor = background;
  return span;
}

/** What pytest says of a failure: coloured as in a terminal where it came without colours. */
function failure(text) {
  if (text.includes("\x1b[")) return coloured(text);
  const pre = make("pre");
  pre.tabIndex = 0;
  for (const line of visible(text).split("\n")) {
    pre.append(make("span", /^E( |$)/.test(line) ? "explained" : /^>/.test(line) ? "bold" : "", line), "\n");
  }
  return pre;
}

/** The one line that says most about why a test did not pass. */
function reason(test) {
  const lines = withoutColours(test.message).split("\n");
  const ours = lines[0].startsWith("the test") ? lines[0] : undefined; // crash.py; stacks follow
  const line = ours ?? lines.find((text) => /^E +\S/.test(text))?.slice(1) ?? lines.findLast((text) => text.trim());
  return (line ?? (isBad(test) ? visible(test.verdict) : "")).trim().slice(0, 300);
}

function seconds(value) {
  if (value === null) return "–";
  if (value < 1) return `${Number((value * 1000).toPrecision(3))} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  const whole = Math.round(value);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return parts[0] ? `${parts[0]} h ${parts[1]} min` : `${parts[1]} min ${parts[2]} s`;
}

function bytes(value) {
  if (value === null) return "–";
  const step = value < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(value) / 10));
  return `${Number((value / 1024 ** step).toPrecision(3))} ${["B", "KiB", "MiB", "GiB", "TiB"][step]}`;
}

function counted(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : noun.endsWith("x") ? "es" : "s"}`;
}

// What a test is

function rank(outcome) {
  const found = ORDER.indexOf(outcome);
  return found < 0 ? ORDER.length : found;
}

function kind(outcome) {
  return ORDER.includes(outcome) ? `is-${outcome}` : "is-other";
}

function isBad(test) {
  return test.outcome === "failed" || test.outcome === "error";
}

function total(test, list) {
  return test[list].length + (test.left_out[list] ?? 0);
}

// Summary

function summarise() {
  const { outcomes, cpu, memory, sandboxes } = run.summary;
  const project = name(run.rootdir.split("/").findLast((part) => part) ?? run.rootdir);
  document.title = `${project}: isolation report`;
  byId("title").textContent = project;
  byId("verdict").textContent = ENDS[run.exitstatus] ?? `exit status ${run.exitstatus}`;
  byId("verdict").classList.add(run.exitstatus === 0 ? "is-passed" : run.exitstatus === 5 ? "is-skipped" : "is-failed");
  const when = new Date(run.created * 1000);
  const day = when.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  const about = [day, run.backend, `pytest ${run.pytest}`, `Python ${run.python}`, run.platform, run.rootdir];
  byId("about").append(...about.filter((text) => text).map((text) => make("span", "", name(text))));
  byId("command").textContent = ["pytest", ...run.args.map(quoted)].join(" ");

  const figure = (value, label, className) => make("div", className, make("dd", "", value), make("dt", "", label));
  const sorted = Object.entries(outcomes).sort((a, b) => rank(a[0]) - rank(b[0]));
  byId("figures").append(
    ...sorted.map(([outcome, count]) => figure(count.toLocaleString("en"), plural(outcome, count), `figure ${kind(outcome)}`)),
    figure(seconds(run.wall), "wall", "figure first"),
    figure(seconds(cpu), "CPU, all tests", "figure"),
    figure(bytes(memory), "peak memory", "figure"),
    figure(sandboxes.toLocaleString("en"), sandboxes === 1 ? "sandbox" : "sandboxes", "figure"),
    figure(`${run.jobs}`, "at a time", "figure"),
  );
  for (const [outcome, count] of sorted) {
    const part = make("span", kind(outcome));
    part.style.flexGrow = count;
    byId("proportions").append(part);
  }
}

/** As pytest has it: "2 errors", "2 failed". */
function plural(outcome, count) {
  return outcome === "error" && count !== 1 ? "errors" : name(outcome);
}

/** As a shell would want it. */
function quoted(argument) {
  const shown = name(argument);
  return /^[\w@%+=:,./-]+$/.test(shown) ? shown : `'${shown.replaceAll("'", `'\\''`)}'`;
}

// Timeline

function drawTimeline() {
  const lanes = tests.reduce((most, test) => Math.max(most, test.worker + 1), run.jobs);
  byId("timeline-about").textContent = `${counted(lanes, "worker")}, ${counted(run.summary.sandboxes, "sandbox")}`;
  const tracks = Array.from({ length: lanes }, () => make("div", "lane"));
  byId("lane-names").append(...tracks.map((_track, number) => make("div", "lane-name", `worker ${number}`)));
  document.documentElement.style.setProperty("--lane", lanes > 8 ? "12px" : "20px");
  const span = last - first || 1;
  for (const test of tests) {
    const bar = make("i", `bar ${kind(test.outcome)}`);
    bar.dataset.index = test.index;
    bar.style.left = `${(100 * (test.start - first)) / span}%`;
    bar.style.width = `${(100 * test.wall) / span}%`;
    bars.push(bar);
    tracks[test.worker].append(bar);
  }
  const axis = make("div", "axis");
  byId("lanes").append(...tracks, axis);
  new ResizeObserver(() => drawAxis(axis, span)).observe(byId("lanes"));
}

function drawAxis(axis, span) {
  const wanted = (span * 90) / axis.clientWidth; // a tick every 90 pixels or so
  const power = 10 ** Math.floor(Math.log10(wanted));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= wanted) ?? 10);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const ticks = [];
  for (let number = 0; number * step <= span && number < 20_000; number++) {
    const tick = make("span", "tick", `${(number * step).toFixed(digits)} s`);
    tick.style.left = `${(100 * number * step) / span}%`;
    ticks.push(tick);
  }
  axis.replaceChildren(...ticks);
}

/** `at` is where in the window, as a share of its width, nothing should move. */
function zoom(factor, at = 0.5) {
  const scroller = byId("scroller");
  const fixed = (scroller.scrollLeft + at * scroller.clientWidth) / state.zoom;
  state.zoom = Math.min(ZOOM_AT_MOST, Math.max(1, factor));
  byId("lanes").style.width = `${100 * state.zoom}%`;
  scroller.scrollLeft = fixed * state.zoom - at * scroller.clientWidth;
}

function showTooltip(event) {
  const tooltip = byId("tooltip");
  const bar = event.target.closest(".bar");
  tooltip.hidden = !bar;
  if (!bar) return;
  const test = tests[bar.dataset.index];
  const facts = [name(test.outcome), seconds(test.wall)];
  if (test.memory !== null) facts.push(bytes(test.memory));
  facts.push(test.sandbox ? `sandbox ${test.sandbox}` : "no sandbox");
  tooltip.replaceChildren(make("b", "", name(test.nodeid)), make("span", "", facts.join(", ")));
  tooltip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - tooltip.offsetWidth - 4))}px`;
  tooltip.style.top = `${event.clientY + 16}px`;
}

// Which tests are shown, and in which order

function hasWords(test) {
  if (!state.words.length) return true;
  test.text ??= withoutColours(`${test.nodeid}\n${test.outcome}\n${test.verdict}\n${test.message}`).toLowerCase();
  return state.words.every((word) => test.text.includes(word));
}

function hasOutcome(test) {
  return !state.outcomes.size || state.outcomes.has(test.outcome);
}

function hasTraits(test) {
  return [...state.traits].every((trait) => test[trait].length);
}

function compare(a, b) {
  const { value } = COLUMNS.find((column) => column.key === state.sort);
  const [left, right] = [value(a), value(b)];
  if (left === null || right === null) return (left === null) - (right === null) || a.start - b.start; // unknown: always last
  const order = typeof left === "string" ? collator.compare(left, right) : left - right;
  return (state.descending ? -order : order) || a.start - b.start;
}

/** Everything that depends on the search, the filters and the order. */
function update() {
  const found = tests.filter(hasWords);
  state.shown = found.filter((test) => hasOutcome(test) && hasTraits(test)).sort(compare);
  for (const chip of byId("outcomes").children) {
    const count = found.filter((test) => test.outcome === chip.value && hasTraits(test)).length;
    mark(chip, state.outcomes.has(chip.value), count);
  }
  for (const chip of byId("traits").children) {
    mark(chip, state.traits.has(chip.value), found.filter((test) => test[chip.value].length && hasOutcome(test)).length);
  }
  for (const heading of byId("columns").children) {
    const order = state.descending ? "descending" : "ascending";
    heading.setAttribute("aria-sort", heading.dataset.key === state.sort ? order : "none");
  }
  const shown = new Set(state.shown);
  bars.forEach((bar, index) => bar.classList.toggle("is-out", !shown.has(tests[index])));
  const all = tests.length.toLocaleString("en");
  byId("status").textContent =
    shown.size === tests.length ? counted(tests.length, "test") : `${shown.size.toLocaleString("en")} of ${all} tests`;
  byId("nothing").hidden = shown.size > 0;
  state.made = 0;
  byId("rows").replaceChildren();
  addRows(ROWS_AT_ONCE);
}

function mark(chip, pressed, count) {
  chip.setAttribute("aria-pressed", pressed);
  chip.lastChild.textContent = count.toLocaleString("en");
}

function makeChips() {
  const chip = (value, label, set, className) => {
    const made = make("button", `chip ${className}`, make("span", "", label), make("span", "count"));
    made.type = "button";
    made.value = value;
    made.addEventListener("click", () => {
      if (!set.delete(value)) set.add(value);
      update();
    });
    return made;
  };
  const outcomes = Object.keys(run.summary.outcomes).sort((a, b) => rank(a) - rank(b));
  byId("outcomes").append(...outcomes.map((outcome) => chip(outcome, name(outcome), state.outcomes, kind(outcome))));
  const traits = Object.keys(TRAITS).filter((trait) => tests.some((test) => test[trait].length));
  byId("traits").append(...traits.map((trait) => chip(trait, TRAITS[trait], state.traits, "is-plain")));
}

function makeColumns() {
  for (const { key, label, unit, show } of COLUMNS) {
    const button = make("button", "", label, unit ? make("small", "", ` ${unit}`) : null);
    button.type = "button";
    button.addEventListener("click", () => {
      state.descending = state.sort === key ? !state.descending : Boolean(show);
      state.sort = key;
      update();
    });
    const heading = make("th", `${key}${show ? " number" : ""}`, button);
    heading.scope = "col";
    heading.dataset.key = key;
    byId("columns").append(heading);
  }
}

function showAll() {
  state.words = [];
  state.outcomes.clear();
  state.traits.clear();
  byId("search").value = "";
  update();
}

// Rows

function addRows(count) {
  const more = state.shown.slice(state.made, state.made + count);
  state.made += more.length;
  byId("rows").append(...more.flatMap((test) => (state.open.has(test) ? [row(test), details(test)] : [row(test)])));
}

function row(test) {
  const made = make("tr", `test ${kind(test.outcome)}`, make("td", "outcome", name(test.outcome)), title(test));
  made.id = `test-${test.index}`;
  for (const { key, value, show } of COLUMNS.slice(2)) {
    const content = value(test);
    const cell = make("td", `number ${key}`, content === null ? "–" : show(content));
    if (key === "wall") cell.style.setProperty("--share", `${(100 * test.wall) / slowest}%`);
    made.append(cell);
  }
  return made;
}

function title(test) {
  const [, file, inner] = /^(.*?)((?:::.*)?)$/s.exec(name(test.nodeid));
  const [folder, base] = [file.slice(0, file.lastIndexOf("/") + 1), file.slice(file.lastIndexOf("/") + 1)];
  const button = make("button", "name", make("span", "dim", folder), inner ? make("span", "file", base) : base, inner);
  button.type = "button";
  button.setAttribute("aria-expanded", state.open.has(test));
  const marks = ["processes", "refused"].filter((trait) => test[trait].length).map((trait) => make("span", "mark", TRAITS[trait]));
  const why = reason(test);
  return make("td", "test", button, ...marks, why ? make("div", "reason", why) : null);
}

function details(test) {
  const facts = [
    ["process", visible(test.verdict) || "–"],
    ["sandbox", test.sandbox ? `${test.sandbox}, ${name(test.backend)}, worker ${test.worker}` : "none: ran in pytest's own process"],
    ["time", `${seconds(test.wall)} wall, ${seconds(test.cpu)} CPU, started after ${seconds(test.start - first)}`],
    ["memory", bytes(test.memory)],
  ];
  const cell = make(
    "td",
    "",
    make("code", "nodeid", name(test.nodeid)),
    make("dl", "facts", ...facts.map(([term, text]) => make("div", "", make("dt", "", term), make("dd", "", text)))),
    test.message ? failure(test.message) : null,
    ...test.sections.flatMap((section) => [make("h3", "", name(section.name)), coloured(section.text)]),
    list(test, "changes", "Files it changed", (change) => [
      make("span", `sign is-${change.kind}`, { added: "+", changed: "~", deleted: "−" }[change.kind] ?? "?"),
      make("span", "sr-only", change.kind),
      make("code", "", name(change.path)),
      make("span", "dim", [change.type === "file" ? "" : change.type, change.size === null ? "" : bytes(change.size)].join(" ")),
    ]),
    list(test, "processes", "Processes it left running", (line) => [make("code", "", name(line))]),
    list(test, "refused", "Refused on the network", (line) => [make("code", "", name(line))]),
  );
  cell.colSpan = COLUMNS.length;
  return make("tr", `details ${kind(test.outcome)}`, cell);
}

function list(test, key, heading, parts) {
  if (!test[key].length) return null;
  const items = test[key].map((item) => make("li", "", ...parts(item)));
  if (test.left_out[key]) items.push(make("li", "dim", `and ${test.left_out[key].toLocaleString("en")} more`));
  return make("div", "left", make("h3", "", `${heading} (${total(test, key).toLocaleString("en")})`), make("ul", "", ...items));
}

function toggle(test, open = !state.open.has(test)) {
  if (open === state.open.has(test)) return;
  const made = byId(`test-${test.index}`);
  made.querySelector(".name").setAttribute("aria-expanded", open);
  if (open) {
    state.open.add(test);
    made.after(details(test));
    bars[test.index].classList.add("is-open");
  } else {
    state.open.delete(test);
    made.nextSibling.remove();
    bars[test.index].classList.remove("is-open");
  }
  history.replaceState(null, "", open ? `#${made.id}` : location.pathname + location.search);
}

/** Opens one test wherever it is, and goes there. */
function reveal(test) {
  if (!state.shown.includes(test)) showAll();
  addRows(state.shown.indexOf(test) + 1 - state.made + ROWS_AT_ONCE);
  toggle(test, true);
  const made = byId(`test-${test.index}`);
  made.scrollIntoView({ block: "center" });
  made.querySelector(".name").focus({ preventScroll: true });
}

function revealLinked() {
  const test = tests[/^#test-(\d+)$/.exec(location.hash)?.[1]];
  if (test) reveal(test);
}

// What the user does

function listen() {
  byId("search").addEventListener("input", (event) => {
    state.words = event.target.value.toLowerCase().split(/\s+/).filter((word) => word);
    update();
  });
  byId("reset").addEventListener("click", showAll);
  byId("rows").addEventListener("click", (event) => {
    const made = event.target.closest("tr.test");
    if (made && !String(getSelection())) toggle(tests[made.id.slice("test-".length)]);
  });
  byId("lanes").addEventListener("click", (event) => {
    const bar = event.target.closest(".bar");
    if (bar) reveal(tests[bar.dataset.index]);
  });
  byId("lanes").addEventListener("pointermove", showTooltip);
  byId("lanes").addEventListener("pointerleave", () => (byId("tooltip").hidden = true));
  byId("zoom-in").addEventListener("click", () => zoom(state.zoom * 2));
  byId("zoom-out").addEventListener("click", () => zoom(state.zoom / 2));
  byId("zoom-fit").addEventListener("click", () => zoom(1));
  byId("scroller").addEventListener("wheel", zoomByWheel, { passive: false });
  addEventListener("keydown", pressed);
  addEventListener("hashchange", revealLinked);
  addEventListener("beforeprint", () => addRows(Infinity));
  // Rows are made before they come into view.
  new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && addRows(ROWS_AT_ONCE), {
    rootMargin: "1500px",
  }).observe(byId("end"));
}

function zoomByWheel(event) {
  if (!event.ctrlKey) return;
  event.preventDefault();
  const box = byId("scroller").getBoundingClientRect();
  zoom(state.zoom * 2 ** (-event.deltaY / 200), (event.clientX - box.left) / box.width);
}

/** "/" to the search, Escape out of it, arrows from row to row. */
function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const search = byId("search");
  if (event.key === "/" && document.activeElement !== search) {
    search.focus();
    event.preventDefault();
  } else if (event.key === "Escape" && document.activeElement === search) {
    showAll();
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const names = [...byId("rows").querySelectorAll(".name")];
    const here = document.activeElement === search ? -1 : names.indexOf(document.activeElement);
    if (here < 0 && document.activeElement !== search) return;
    names[here + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
    event.preventDefault();
  }
}

summarise();
makeChips();
makeColumns();
update();
if (tests.length) drawTimeline();
else byId("timeline-title").closest("section").hidden = true;
listen();
revealLinked();
