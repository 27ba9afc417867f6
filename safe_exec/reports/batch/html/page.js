"use strict";
// The batch page. All text from notebooks goes into the document as text nodes and attribute values, never as markup.

(() => {
  const RANK = { failed: 0, error: 1, passed: 2, skipped: 3 };
  const OUTCOMES = { failed: "Failed", error: "Errors", passed: "Passed", skipped: "Skipped" };
  const COLUMNS = [
    { key: "status", label: "Result", value: (row) => RANK[row.outcome] },
    { key: "path", label: "Notebook", value: (row) => row.path },
    { key: "what", label: "Cause", value: (row) => row.cause || null },
    { key: "seconds", label: "Time", value: (row) => row.seconds, number: true },
    { key: "memory", label: "Memory peak", value: (row) => row.memory, number: true },
  ];
  const byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent);

  // --- elements ---

  const fill = (node, attributes, children) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === true) node.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
    }
    for (const child of children.flat()) {
      if (child !== null && child !== undefined && child !== "") node.append(child instanceof Node ? child : String(child));
    }
    return node;
  };
  const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
  const svg = (name, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
  const button = (attributes, ...children) => el("button", { type: "button", ...attributes }, ...children);
  const counted = (count, thing) => `${count} ${thing}${count === 1 ? "" : "s"}`;

  // --- the head ---

  const batch = read("batch");
  const rows = batch.rows.map((row, number) => ({ ...row, number }));
  const count = (test) => rows.filter(test).length;
  // Machines matter only if there are several, or if one was lost.
  const machines = [...new Set(rows.map((row) => row.machine).filter(Boolean))].sort();
  const hasMachines = machines.length > 1 || rows.some((row) => row.losses);
  if (hasMachines) COLUMNS.push({ key: "machine", label: "Machine", value: (row) => row.machine });

  const drawHead = () => {
    const bad = count((row) => RANK[row.outcome] < 2);
    const flaky = count((row) => row.flaky);
    const said = bad ? `${bad} of ${counted(rows.length, "notebook")} failed` : rows.length ? `${counted(rows.length, "notebook")}, none failed` : "No notebooks";
    byId("headline").append(said);
    byId("headline").classList.add(bad ? "bad" : "good");
    byId("version").append(batch.version);
    const facts = [batch.tally, `started ${batch.started}`, `exit code ${batch.exit_code}`, ...batch.remarks];
    for (const fact of facts) byId("about").append(el("span", null, fact));
    if (batch.command) byId("command").append(el("code", null, batch.command), copyButton(batch.command, "Copy the command of the batch"));
    for (const outcome of Object.keys(OUTCOMES)) {
      const share = count((row) => row.outcome === outcome);
      if (!share) continue;
      const part = el("span", { class: outcome });
      part.style.flexGrow = share;
      byId("bar").append(part);
    }
    chip("", "All", rows.length);
    for (const [outcome, label] of Object.entries(OUTCOMES)) chip(outcome, label, count((row) => row.outcome === outcome));
    chip("flaky", "Flaky", flaky);
    const causes = [...new Set(rows.map((row) => row.cause).filter(Boolean))].sort();
    for (const cause of causes) byId("cause").append(el("option", { value: cause }, cause));
  };

  const chip = (outcome, label, number) => {
    if (!number && outcome) return;
    const made = button({ class: `chip ${outcome}`, "aria-pressed": String(!outcome), "data-outcome": outcome }, label, " ", el("span", { class: "number" }, number));
    made.addEventListener("click", () => {
      state.outcome = outcome;
      refresh();
    });
    byId("outcomes").append(made);
  };

  function copyButton(words, label) {
    const made = button({ class: "copy", "aria-label": label }, "Copy");
    made.addEventListener("click", async () => {
      made.textContent = (await copied(words)) ? "Copied" : "Not copied";
      made.setAttribute("aria-label", made.textContent);
      setTimeout(() => {
        made.textContent = "Copy";
        made.setAttribute("aria-label", label);
      }, 2000);
    });
    return made;
  }

  async function copied(words) {
    if (navigator.clipboard) {
      try {
        await navigator.clipboard.writeText(words);
        return true;
      } catch (refusal) {
        // Not allowed here; the old way may be.
      }
    }
    const area = el("textarea", { class: "hidden" });
    area.value = words;
    document.body.append(area);
    const before = document.activeElement;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (before) before.focus();
    return done;
  }

  // --- the machines ---

  const drawMachines = () => {
    const timed = rows.filter((row) => row.machine && row.start !== null && row.end !== null);
    if (!hasMachines || !timed.length) return;
    const first = timed.reduce((least, row) => Math.min(least, row.start), Infinity);
    const last = timed.reduce((most, row) => Math.max(most, row.end), -Infinity);
    const share = (seconds) => `${(100 * seconds) / Math.max(last - first, 0.001)}%`;
    for (const machine of machines) {
      const own = timed.filter((row) => row.machine === machine).sort((a, b) => a.start - b.start);
      const lanes = [];
      for (const row of own) {
        // The first lane that is free: as many lanes as notebooks ran at a time.
        const free = lanes.find((lane) => lane.end <= row.start);
        const lane = free || lanes[lanes.push({ node: el("div", { class: "lane" }) }) - 1];
        lane.end = row.end;
        const bar = el("span", { class: `run ${row.outcome}`, title: `${row.path}: ${row.status}, ${row.time}` });
        bar.style.left = share(row.start - first);
        bar.style.width = share(row.end - row.start);
        bar.addEventListener("click", () => toggle(row, true));
        lane.node.append(bar);
      }
      const busy = own.reduce((sum, row) => sum + row.end - row.start, 0);
      const load = Math.round((100 * busy) / Math.max(lanes.length * (last - first), 0.001));
      const facts = `${counted(own.length, "notebook")}, ${lanes.length} at a time, ${load} % busy`;
      byId("machines").append(
        el("div", { class: "host" }, el("span", { class: "name" }, machine), el("span", { class: "facts" }, facts)),
        el("div", { class: "lanes", role: "img", "aria-label": `${machine}: ${facts}` }, lanes.map((lane) => lane.node)),
      );
    }
    byId("machines").hidden = false;
  };

  // --- the table ---

  const state = { outcome: "", words: "", cause: "", sort: "status", down: false };

  const drawTable = () => {
    for (const column of COLUMNS) {
      const sorter = button({ class: "sort" }, column.label, el("span", { class: "arrow", "aria-hidden": "true" }));
      sorter.addEventListener("click", () => {
        state.down = state.sort === column.key ? !state.down : Boolean(column.number);
        state.sort = column.key;
        refresh();
      });
      column.head = el("th", { scope: "col", role: "columnheader", class: column.key }, sorter);
      byId("heads").append(column.head);
    }
    for (const row of rows) {
      row.opener = button({ class: "open", "aria-expanded": "false" }, ...pathParts(row.path));
      row.line = el(
        "tr",
        { role: "row", class: `line ${row.outcome}` },
        el("td", { role: "cell", class: "status" }, el("span", { class: `badge ${row.outcome}` }, row.status)),
        el("td", { role: "cell", class: "path" }, row.opener),
        el("td", { role: "cell", class: "what" }, row.what),
        el("td", { role: "cell", class: "seconds" }, row.time || none()),
        el("td", { role: "cell", class: "memory" }, row.peak ? [gauge(row), el("span", { class: "amount" }, row.peak)] : none()),
        hasMachines ? el("td", { role: "cell", class: "machine" }, row.machine || none(), row.losses ? el("span", { class: "losses" }, row.losses) : null) : null,
      );
      row.opener.addEventListener("click", (event) => {
        event.stopPropagation();
        toggle(row);
      });
      row.line.addEventListener("click", () => {
        if (!String(getSelection())) toggle(row);
      });
    }
  };

  const none = () => el("span", { class: "nothing", "aria-label": "not measured" }, "–");

  const pathParts = (path) => {
    const cut = path.lastIndexOf("/") + 1;
    return [cut ? el("span", { class: "folder" }, path.slice(0, cut)) : null, el("span", { class: "file" }, path.slice(cut))];
  };

  const gauge = (row) => {
    if (row.share === null) return null;
    const level = el("span");
    level.style.width = `${Math.max(row.share * 100, 2)}%`;
    return el("span", { class: `gauge${row.share >= 0.95 ? " full" : ""}`, title: `of ${row.limit}`, "aria-hidden": "true" }, level);
  };

  const matches = (row) => {
    if (state.outcome === "flaky" ? !row.flaky : state.outcome && row.outcome !== state.outcome) return false;
    if (state.cause && row.cause !== state.cause) return false;
    const text = `${row.path} ${row.status} ${row.what} ${row.cause} ${row.machine}`.toLowerCase();
    return state.words.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  };

  const compare = (one, other) => {
    const column = COLUMNS.find((each) => each.key === state.sort);
    const [a, b] = [column.value(one), column.value(other)];
    // What was not measured comes last whichever way it goes.
    if ((a === null) !== (b === null)) return a === null ? 1 : -1;
    const order = a === null ? 0 : typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return (state.down ? -order : order) || one.path.localeCompare(other.path, "en", { numeric: true });
  };

  const refresh = () => {
    for (const made of byId("outcomes").children) made.setAttribute("aria-pressed", String(made.dataset.outcome === state.outcome));
    for (const column of COLUMNS) {
      column.head.setAttribute("aria-sort", column.key !== state.sort ? "none" : state.down ? "descending" : "ascending");
    }
    const shown = rows.filter(matches).sort(compare);
    const lines = document.createDocumentFragment();
    for (const row of shown) {
      lines.append(row.line);
      if (row.below && isOpen(row)) lines.append(row.below);
    }
    byId("rows").replaceChildren(lines);
    byId("none").hidden = shown.length > 0 || !rows.length;
    byId("shown").textContent = shown.length === rows.length ? counted(rows.length, "notebook") : `${shown.length} of ${counted(rows.length, "notebook")}`;
    for (const row of shown) if (row.chart && isOpen(row)) row.chart();
  };

  const isOpen = (row) => row.opener.getAttribute("aria-expanded") === "true";

  const toggle = (row, open = !isOpen(row)) => {
    row.opener.setAttribute("aria-expanded", String(open));
    row.line.classList.toggle("opened", open);
    if (!open) {
      row.below.remove();
      history.replaceState(null, "", location.pathname + location.search);
      return;
    }
    if (!row.below) {
      const id = `detail-${row.number}`;
      row.opener.setAttribute("aria-controls", id);
      row.below = el("tr", { role: "row", class: "below", id }, el("td", { role: "cell", colspan: COLUMNS.length }, drawDetail(row, read(`notebook-${row.number}`))));
    }
    row.line.after(row.below);
    if (row.chart) row.chart();
    for (const marked of row.below.querySelectorAll(".codeline.marked")) {
      const block = marked.closest("pre");
      block.scrollTop = marked.offsetTop - block.offsetTop - block.clientHeight / 2;
    }
    history.replaceState(null, "", `#notebook=${encodeURIComponent(row.path)}`);
  };

  // --- one notebook ---

  const drawDetail = (row, detail) => {
    const box = el("section", { class: "detail", "aria-label": row.path });
    const add = (...parts) => box.append(...parts.filter(Boolean));
    add(el("h2", { class: row.outcome }, detail.headline));
    if (detail.why || (detail.confidence && detail.confidence !== "certain")) add(whyLine(detail));
    if (detail.flaky) add(el("p", { class: "flaky" }, detail.flaky));
    const left = el("div", { class: "column wide" });
    const right = el("div", { class: "column" });
    if (detail.crash) left.append(part(`Code cell ${detail.crash.n}`, detail.crash.moment, codeBlock(detail.crash.source, detail.crash.costs)));
    if (detail.memory_use) left.append(...drawMemoryUse(detail.memory_use));
    if (detail.native || detail.native_gap) left.append(drawNative(detail));
    if (detail.culprits) left.append(drawCulprits(detail.culprits));
    for (const other of detail.others || []) left.append(drawOther(other));
    if (detail.advice) right.append(part("Next", "", el("p", { class: "advice" }, detail.advice)));
    if (detail.command) right.append(part("Reproduce", "", el("div", { class: "command" }, el("code", null, detail.command), copyButton(detail.command, "Copy the command to reproduce"))));
    if (detail.evidence && detail.evidence.length) right.append(part("Evidence", "", drawEvidence(detail.evidence)));
    if (detail.skipped && detail.skipped.length) right.append(part("Skipped", "", el("ul", { class: "skipped" }, ...detail.skipped.map((words) => el("li", null, words)))));
    for (const words of detail.warnings || []) right.append(el("p", { class: "warning" }, words));
    if (left.children.length || right.children.length) add(el("div", { class: left.children.length ? "columns" : "columns single" }, left.children.length ? left : null, right.children.length ? right : null));
    if (detail.timeline && detail.timeline.seconds.length) add(drawChart(row, detail));
    add(...drawMore(detail));
    if (detail.files.length) {
      add(el("p", { class: "files" }, "Files: ", ...detail.files.filter((file) => file.href.startsWith("./")).flatMap((file, n) => [n ? " · " : "", el("a", { href: file.href }, file.name)])));
    }
    return box;
  };

  // A further failure of a run that went on behind the first one.
  const drawOther = (other) => {
    const box = el("section", { class: "other", "aria-label": other.headline }, el("h2", { class: "failed" }, other.headline));
    if (other.why || (other.confidence && other.confidence !== "certain")) box.append(whyLine(other));
    if (other.crash) box.append(part(`Code cell ${other.crash.n}`, other.crash.moment, codeBlock(other.crash.source, other.crash.costs)));
    if (other.culprits) box.append(drawCulprits(other.culprits));
    return box;
  };

  const whyLine = (detail) => {
    const sure = detail.confidence === "certain" ? null : el("span", { class: "sure" }, detail.confidence);
    return el("p", { class: "why" }, detail.why, " ", sure);
  };

  const part = (title, note, ...children) => el("div", { class: "part" }, el("h3", null, title, note ? el("span", { class: "note" }, note) : null), ...children);

  const lineCosts = ([time, bytes] = []) => [
    time ? el("span", { class: "cost", title: "time in this line and in what it called" }, time) : null,
    bytes ? el("span", { class: "cost memory", title: "memory that this line allocated and that was there at the end" }, bytes) : null,
  ];

  const codeBlock = (source, costs = {}) => {
    if (!source) return el("p", { class: "note" }, "Its source is not known any more.");
    const lines = source.lines.map((words, n) => {
      const number = source.first === null ? "" : source.first + n;
      const marked = source.marked !== null && number === source.marked;
      return el("span", { class: marked ? "codeline marked" : "codeline" }, el("span", { class: "lineno", "aria-hidden": "true" }, number), el("span", { class: "words" }, marked ? el("span", { class: "hidden" }, `line ${number}: `) : null, words || " "), ...lineCosts(costs[number]), "\n");
    });
    const said = source.alone ? "Only this line is known: the notebook is not the one that was run any more, or too large." : source.cut ? `${counted(source.cut, "more line")} not shown.` : "";
    return el("div", { class: "code" }, el("pre", { tabindex: "0", "aria-label": "source" }, el("code", null, ...lines)), said ? el("p", { class: "note" }, said) : null);
  };

  const drawNative = (detail) => {
    const frames = detail.native_stack.map((frame) => el("li", null, el("code", null, frame)));
    return part("Native stack", detail.native_gap || "innermost first", frames.length ? el("ol", { class: "stack" }, ...frames) : null);
  };

  const drawCulprits = (culprits) => {
    const facts = [culprits.outcome, culprits.figures].filter(Boolean).join(" · ");
    const cards = culprits.cells.filter((cell) => cell.role !== "crash").map((cell) =>
      el(
        "li",
        { class: `culprit ${cell.role}` },
        el("p", null, el("strong", null, `Code cell ${cell.n}`), " ", el("span", { class: `role ${cell.role}` }, cell.role), cell.first ? el("span", { class: "role first" }, "look first") : null, " ", el("span", { class: "note" }, cell.note)),
        codeBlock(cell.source, cell.costs),
      ),
    );
    const more = culprits.cut ? el("p", { class: "note" }, `${counted(culprits.cut, "more cell")} not shown.`) : null;
    return part(culprits.names ? `Caused by ${culprits.names}` : "Culprits: none found", facts, cards.length ? el("ol", { class: "culprits" }, ...cards) : null, more);
  };

  const drawMemoryUse = (use) => {
    const bar = (each, kind) => {
      const level = el("span", { class: kind });
      level.style.width = `${Math.max(each.share * 100, 0.5)}%`;
      return el("li", null, el("p", null, el("code", null, each.name), " ", el("span", { class: "note" }, each.text)), el("span", { class: "level", "aria-hidden": "true" }, level));
    };
    const holders = use.holders.map((each) => bar(each, each.named ? "named" : "unnamed"));
    const others = use.others.map((words) => el("p", { class: "note" }, words));
    const lines = use.lines.map((each) => bar(each, "named"));
    return [
      holders.length ? part("Held by", "share of the peak", el("ol", { class: "bars" }, ...holders), ...others) : null,
      lines.length ? part("Allocated", "share of the peak", el("ol", { class: "bars" }, ...lines)) : null,
    ].filter(Boolean);
  };

  const drawEvidence = (evidence) =>
    el(
      "table",
      { class: "evidence" },
      el("thead", null, el("tr", null, ...["fact", "value", "read from"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", null, ...evidence.map((fact) => el("tr", null, el("th", { scope: "row" }, fact.fact), el("td", { class: "value" }, fact.value), el("td", null, fact.source, " ", el("span", { class: `origin ${fact.origin}`, title: fact.origin === "inside" ? "the kernel process said so itself" : "seen from outside the kernel" }, fact.origin))))),
    );

  const more = (title, ...children) => el("details", { class: "more" }, el("summary", null, title), ...children);

  const pairs = (list) => el("dl", { class: "pairs" }, ...list.map(([name, value, note]) => el("div", null, el("dt", null, name), el("dd", null, value, note ? el("span", { class: "note" }, ` ${note}`) : null))));

  const drawMore = (detail) => {
    const found = [];
    if (detail.stack && detail.stack.length) found.push(more("Stack, innermost first", el("ol", { class: "stack" }, ...detail.stack.map((frame) => el("li", null, el("code", null, frame))))));
    if (detail.stderr && detail.stderr.text) {
      const cut = detail.stderr.cut ? el("p", { class: "note" }, `The ${detail.stderr.cut} characters before are in the verdict.`) : null;
      found.push(more("End of standard error", cut, el("pre", { class: "stderr", tabindex: "0", "aria-label": "end of standard error" }, detail.stderr.text)));
    }
    if (detail.cells && detail.cells.length) found.push(more(`Code cells (${detail.cells.length + detail.cells_cut})`, drawCells(detail)));
    if (detail.limits) {
      const weak = detail.weak.map((words) => el("p", { class: "warning" }, words));
      found.push(more("Limits and what they were held by", pairs(detail.limits), ...weak));
      found.push(more("Usage and environment", pairs([...detail.usage, ...detail.environment])));
    }
    return found;
  };

  const drawCells = (detail) => {
    const names = ["cell", "status", "time", "processor", "memory peak", "memory kept", "output"];
    const lines = detail.cells.map((cell) => el("tr", { class: cell.status.replace(" ", "-") }, el("th", { scope: "row" }, cell.n), ...[cell.status, cell.time, cell.cpu, cell.peak, cell.kept, cell.output].map((value) => el("td", null, value || none()))));
    const cut = detail.cells_cut ? el("p", { class: "note" }, `${counted(detail.cells_cut, "more cell")} not shown.`) : null;
    return el("div", { class: "scroll" }, el("table", { class: "cells" }, el("thead", null, el("tr", null, ...names.map((name) => el("th", { scope: "col" }, name)))), el("tbody", null, ...lines)), cut);
  };

  // --- memory over time ---

  const SIZES = ["B", "KiB", "MiB", "GiB", "TiB"];
  const size = (bytes) => {
    const unit = Math.min(bytes > 0 ? Math.floor(Math.log2(Math.max(bytes, 1)) / 10) : 0, SIZES.length - 1);
    const amount = bytes / 2 ** (10 * unit);
    return `${amount >= 100 || Number.isInteger(amount) ? Math.round(amount) : amount.toFixed(1)} ${SIZES[unit]}`;
  };
  const clock = (seconds) => {
    if (seconds < 60) return `${Number(seconds.toFixed(2))} s`;
    const whole = Math.round(seconds);
    return `${Math.floor(whole / 60)}m ${String(whole % 60).padStart(2, "0")}s`;
  };
  const timeStep = (most, ticks) => {
    const raw = most / Math.max(ticks, 1);
    const power = 10 ** Math.floor(Math.log10(raw));
    return power * ([1, 2, 5, 10].find((factor) => factor * power >= raw) || 10);
  };

  // The start of the kernel is no part of the chart: no cell runs then.
  const begin = (detail) => Math.min(detail.timeline.seconds[0], ...detail.cells.filter((cell) => cell.start !== null).map((cell) => cell.start));

  const drawChart = (row, detail) => {
    const holder = el("div", { class: "chart" });
    const readout = el("span", { class: "readout", role: "status" });
    const known = detail.timeline.memory.filter((value) => value !== null);
    const limit = detail.memory_limit;
    const far = limit !== null && (!known.length || Math.max(...known) < limit / 4);
    const note = limit === null ? "no limit" : far ? `the limit, ${size(limit)}, is far above` : `limit ${size(limit)}`;
    let width = 0;
    row.chart = (wanted) => {
      const room = wanted || Math.round(holder.getBoundingClientRect().width) || 900;
      if (room === width) return;
      width = room;
      holder.replaceChildren(chart(detail, width, readout, far));
    };
    new ResizeObserver(() => row.chart()).observe(holder);
    const legend = [["crashed", "crash cell", detail.crash], ["culprit", "culprit", detail.culprits && detail.culprits.all.length > 1], ["", detail.crash ? "other cell" : "cell", true]];
    const layers = stacked(detail).map((layer, n) => el("span", { class: `legend stacked s${n}` }, layer.name));
    const under = el("div", { class: "under" }, ...layers, ...legend.filter((each) => each[2]).map(([kind, words]) => el("span", { class: `legend ${kind}` }, words)), readout);
    const first = begin(detail);
    const notes = [note, first > 0.5 ? `first cell after ${clock(first)}` : ""].filter(Boolean).join(" · ");
    return part("Memory over time", notes, holder, under);
  };

  const chart = (detail, width, readout, far) => {
    const { seconds, memory } = detail.timeline;
    const limit = far ? null : detail.memory_limit;
    const box = { left: 64, right: 12, top: 16, height: 150, strip: 22, gap: 6, foot: 24 };
    const plot = width - box.left - box.right;
    const bottom = box.top + box.height;
    const ends = detail.cells.filter((cell) => cell.start !== null).map((cell) => (cell.end === null ? detail.wall || 0 : cell.end));
    const lastTime = Math.max(seconds[seconds.length - 1], ...ends) || 1;
    const firstTime = Math.min(begin(detail), lastTime * 0.99);
    const span = lastTime - firstTime;
    const top = Math.max(limit || 0, ...memory.map((value) => value || 0), 1) * 1.08;
    const x = (value) => box.left + ((value - firstTime) / span) * plot;
    const y = (value) => bottom - (value / top) * box.height;
    const fixed = (value) => value.toFixed(1);
    const height = bottom + box.gap + box.strip + box.foot;
    const peak = Math.max(...memory.map((value) => value || 0));
    const label = `Memory over ${clock(span)}: peak ${size(peak)}${detail.memory_limit === null ? "" : ` of ${size(detail.memory_limit)}`}, ${counted(detail.cells.length, "code cell")}. Arrow keys read single points.`;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": label, class: "plot" });
    const failures = [detail, ...(detail.others || [])];
    const crashes = new Set(failures.filter((each) => each.crash).map((each) => each.crash.n));
    const culprits = new Set(failures.flatMap((each) => (each.culprits ? each.culprits.all : [])));

    for (let tick = 0, step = 2 ** Math.ceil(Math.log2(top / 4)); tick < top; tick += step) {
      root.append(svg("line", { class: "grid", x1: box.left, x2: width - box.right, y1: fixed(y(tick)), y2: fixed(y(tick)) }));
      root.append(svg("text", { class: "tick", x: box.left - 8, y: fixed(y(tick) + 4), "text-anchor": "end" }, tick ? size(tick) : "0"));
    }
    for (let step = timeStep(span, plot / 110), n = Math.ceil(firstTime / step); n * step <= lastTime; n += 1) {
      if (x(n * step) > width - 24) break;
      root.append(svg("text", { class: "tick", x: fixed(x(n * step)), y: height - 6, "text-anchor": "middle" }, clock(n * step)));
    }
    for (const cell of detail.cells) {
      if (cell.start === null) continue;
      const [from, to] = [x(cell.start), x(cell.end === null ? lastTime : cell.end)];
      const wide = Math.max(to - from, 2);
      const kind = crashes.has(cell.n) ? "crashed" : culprits.has(cell.n) ? "culprit" : cell.status.replace(" ", "-");
      if (crashes.has(cell.n)) root.append(svg("rect", { class: "moment", x: fixed(from), y: box.top, width: fixed(wide), height: box.height }));
      const told = `Code cell ${cell.n}: ${[cell.status, cell.time, cell.peak ? `peak ${cell.peak}` : ""].filter(Boolean).join(", ")}`;
      root.append(svg("rect", { class: `cell ${kind}`, x: fixed(from), y: bottom + box.gap, width: fixed(Math.max(wide - 1, 1.5)), height: box.strip, rx: 3 }, svg("title", null, told)));
      if (wide > 9 * String(cell.n).length + 6) root.append(svg("text", { class: `name ${kind}`, x: fixed(from + (wide - 1) / 2), y: bottom + box.gap + 15, "text-anchor": "middle" }, cell.n));
    }
    root.append(svg("text", { class: "tick", x: box.left - 8, y: bottom + box.gap + 15, "text-anchor": "end" }, "cell"));
    const layers = stacked(detail);
    for (const run of runs(seconds, memory)) {
      const line = run.map(([at, value]) => `${fixed(x(at))},${fixed(y(value))}`).join(" L");
      root.append(svg("path", { class: "area", d: `M${fixed(x(run[0][0]))},${bottom} L${line} L${fixed(x(run[run.length - 1][0]))},${bottom} Z` }));
      layers.forEach((layer, n) => root.append(svg("path", { class: `stacked s${n}`, d: band(run, layers, n, x, y) }, svg("title", null, layer.name))));
      root.append(svg("path", { class: "memory", d: `M${line}` }));
    }
    root.append(svg("line", { class: "axis", x1: box.left, x2: width - box.right, y1: bottom, y2: bottom }));
    if (limit !== null) {
      root.append(svg("line", { class: "limit", x1: box.left, x2: width - box.right, y1: fixed(y(limit)), y2: fixed(y(limit)) }));
      root.append(svg("text", { class: "limit", x: width - box.right, y: fixed(y(limit) - 4), "text-anchor": "end" }, `limit ${size(limit)}`));
    }
    follow(root, detail, { x, y, bottom, top: box.top, left: box.left, plot, firstTime, span }, readout, width);
    return root;
  };

  // The variables that held the memory. A census at the end of a cell tells how much one grew in it; in
  // between it is drawn as if it had grown evenly.
  const stacked = (detail) => {
    const times = new Map(detail.cells.map((cell) => [cell.n, cell]));
    const grown = ([n, bytes], at) => {
      const cell = times.get(n);
      if (!cell || cell.start === null || at <= cell.start) return 0;
      const end = cell.end === null ? detail.wall || cell.start : cell.end;
      return at >= end ? bytes : (bytes * (at - cell.start)) / (end - cell.start);
    };
    const growth = (detail.memory_use && detail.memory_use.growth) || [];
    return growth.map((holder) => ({ name: holder.name, at: (time) => holder.cells.reduce((sum, each) => sum + grown(each, time), 0) }));
  };

  const band = (run, layers, n, x, y) => {
    // What the kernel says never exceeds what was measured.
    const sum = (time, most, count) => Math.min(most, layers.slice(0, count).reduce((total, layer) => total + layer.at(time), 0));
    const edge = (count) => run.map(([time, memory]) => `${x(time).toFixed(1)},${y(sum(time, memory, count)).toFixed(1)}`);
    return `M${[...edge(n + 1), ...edge(n).reverse()].join(" L")} Z`;
  };

  const runs = (seconds, memory) => {
    const found = [[]];
    seconds.forEach((at, n) => (memory[n] === null ? found.push([]) : found[found.length - 1].push([at, memory[n]])));
    return found.filter((run) => run.length);
  };

  const follow = (root, detail, scale, readout, width) => {
    const { seconds, memory } = detail.timeline;
    const cursor = svg("line", { class: "cursor", y1: scale.top, y2: scale.bottom, visibility: "hidden" });
    const dot = svg("circle", { class: "cursor", r: 3.5, visibility: "hidden" });
    root.append(cursor, dot);
    let at = -1;
    const show = (index) => {
      at = Math.max(0, Math.min(index, seconds.length - 1));
      const place = scale.x(seconds[at]);
      fill(cursor, { x1: place, x2: place, visibility: "visible" }, []);
      fill(dot, memory[at] === null ? { visibility: "hidden" } : { cx: place, cy: scale.y(memory[at]), visibility: "visible" }, []);
      const cell = detail.cells.find((each) => each.start !== null && each.start <= seconds[at] && seconds[at] <= (each.end === null ? Infinity : each.end));
      readout.textContent = [clock(seconds[at]), memory[at] === null ? "memory not measured" : size(memory[at]), cell ? `code cell ${cell.n}` : ""].filter(Boolean).join(" · ");
    };
    const hide = () => {
      for (const mark of [cursor, dot]) mark.setAttribute("visibility", "hidden");
      readout.textContent = "";
    };
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect();
      const wanted = (((event.clientX - box.left) * width) / box.width - scale.left) / scale.plot * scale.span + scale.firstTime;
      let best = 0;
      seconds.forEach((value, n) => { if (Math.abs(value - wanted) < Math.abs(seconds[best] - wanted)) best = n; });
      show(best);
    });
    root.addEventListener("pointerleave", hide);
    root.addEventListener("blur", hide);
    root.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      show(at < 0 && step === -1 ? seconds.length - 1 : at + step);
    });
  };

  // --- all together ---

  const openFromAddress = () => {
    const named = /^#notebook=(.*)$/.exec(location.hash);
    if (!named) return false;
    let path;
    try {
      path = decodeURIComponent(named[1]);
    } catch (malformed) {
      return false;
    }
    const row = rows.find((each) => each.path === path);
    if (!row) return false;
    if (!isOpen(row)) toggle(row, true);
    row.line.scrollIntoView();
    row.opener.focus({ preventScroll: true });
    return true;
  };

  const PAPER_WIDTH = 680;
  const printing = { opened: [] };
  addEventListener("beforeprint", () => {
    for (const row of rows.filter(matches)) {
      if (RANK[row.outcome] > 1 || isOpen(row)) continue;
      printing.opened.push(row);
      const address = location.href;
      toggle(row, true);
      history.replaceState(null, "", address);
    }
    for (const row of rows) if (row.chart) row.chart(PAPER_WIDTH);
    for (const folded of document.querySelectorAll("details.more:not([open])")) {
      folded.open = true;
      folded.dataset.printed = "";
    }
  });
  addEventListener("afterprint", () => {
    const address = location.href;
    for (const row of printing.opened.splice(0)) toggle(row, false);
    history.replaceState(null, "", address);
    for (const row of rows) if (row.chart && isOpen(row)) row.chart();
    for (const folded of document.querySelectorAll("details.more[data-printed]")) {
      folded.open = false;
      delete folded.dataset.printed;
    }
  });

  byId("unscripted").remove();
  drawHead();
  drawMachines();
  drawTable();
  byId("words").addEventListener("input", () => {
    state.words = byId("words").value.trim();
    refresh();
  });
  byId("cause").addEventListener("change", () => {
    state.cause = byId("cause").value;
    refresh();
  });
  byId("clear").addEventListener("click", () => {
    Object.assign(state, { outcome: "", words: "", cause: "" });
    byId("words").value = byId("cause").value = "";
    refresh();
    byId("words").focus();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      byId("words").focus();
    }
  });
  addEventListener("hashchange", openFromAddress);
  refresh();
  if (!openFromAddress() && rows.length === 1) toggle(rows[0], true);
})();
