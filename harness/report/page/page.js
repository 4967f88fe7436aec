"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const make = (tag, text, cls) => {
	const one = document.createElement(tag);
	if (text !== undefined) one.textContent = text;
	if (cls) one.className = cls;
	return one;
};
const CHUNK = 200;

by("verdict").textContent = data.verdict;
by("verdict").className = data.bad ? "bad" : "good";
by("machine").textContent = data.machine;
if (data.matrix) for (const id of ["new", "checked"]) by(id).hidden = true;
by("new-count").textContent = data.findings.length.toLocaleString("en");

/* --- tables --- */
function table(node, head, rows) {
	if (!rows.length) return;
	if (head.length) {
		const line = node.appendChild(make("tr"));
		for (const text of head) line.appendChild(make("th", text));
	}
	for (const row of rows) {
		const line = node.appendChild(make("tr"));
		row.forEach((text, n) => line.appendChild(make("td", text, n ? "n" : "")));
	}
}
table(by("totals"), [], data.totals);
table(by("sweeps"), ["Sweeps", "cases", "of", "pairs", "of", "triples", "of"], data.sweeps);
for (const one of data.tables) {
	const box = by("tables").appendChild(make("section"));
	box.appendChild(make("h2", one.title));
	table(box.appendChild(make("table")), one.head, one.rows);
}

/* --- findings by version --- */
if (data.matrix) {
	by("matrix").hidden = false;
	by("legend").textContent = data.matrix.legend;
	const node = by("by-version");
	node.className = "matrix";
	const head = node.appendChild(make("tr"));
	for (const text of ["finding", "what", ...data.matrix.columns]) head.appendChild(make("th", text));
	for (const row of data.matrix.rows) {
		const line = node.appendChild(make("tr"));
		line.append(make("th", row.name, "r"), make("td", row.title));
		row.cells.forEach((one, n) => {
			const cell = line.appendChild(make("td")).appendChild(make("button", one.text, `${one.kind}${one.stale ? " stale" : ""}`));
			cell.type = "button";
			cell.onclick = () => {
				by("cell").hidden = false;
				by("cell").textContent = `${row.name} on ${data.matrix.columns[n]}: ${one.about}. ${row.about}`;
			};
		});
	}
	for (const [title, lines] of data.matrix.notes) {
		if (!lines.length) continue;
		by("notes").appendChild(make("h3", title));
		const box = by("notes").appendChild(make("ul"));
		for (const text of lines) box.appendChild(make("li", text));
	}
}

/* --- findings --- */
const list = by("list"), detail = by("detail");
let shown = data.findings, drawn = 0;

function choices(id, values) {  // the most frequent first
	const counts = new Map();
	for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
	for (const [value, count] of [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)))
		by(id).appendChild(make("option", `${value} (${count.toLocaleString("en")})`)).value = value;
}
choices("sort", data.findings.map(one => one.sort));
choices("family", data.findings.map(one => one.family));

function more() {
	for (const one of shown.slice(drawn, drawn + CHUNK)) {
		const button = make("button", one.headline);
		button.type = "button";
		button.appendChild(make("small", `${one.name} · ${one.check} ${one.field}`));
		button.onclick = () => show(one, button);
		list.appendChild(make("li")).appendChild(button);
	}
	drawn = Math.min(shown.length, drawn + CHUNK);
}
list.addEventListener("scroll", () => {
	if (list.scrollTop + list.clientHeight > list.scrollHeight - 400 && drawn < shown.length) more();
});

function filter() {
	const words = by("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
	const sort = by("sort").value, family = by("family").value;
	shown = data.findings.filter(one => (!sort || one.sort === sort) && (!family || one.family === family) &&
		words.every(word => one.search.includes(word)));
	drawn = 0;
	list.replaceChildren();
	more();
	by("new-count").textContent = shown.length === data.findings.length ? shown.length.toLocaleString("en")
		: `${shown.length.toLocaleString("en")} of ${data.findings.length.toLocaleString("en")}`;
	if (shown.length) show(shown[0], list.querySelector("button"));
	else detail.replaceChildren(make("p", "Nothing matches.", "dim"));
}
for (const [id, event] of [["filter", "input"], ["sort", "change"], ["family", "change"]]) by(id).addEventListener(event, filter);

document.addEventListener("keydown", event => {
	const typing = ["INPUT", "SELECT"].includes(document.activeElement.tagName);
	if (event.key === "/" && !typing) { event.preventDefault(); by("filter").focus(); return; }
	if (event.key === "Escape") { hide(); if (typing) document.activeElement.blur(); return; }
	const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
	if (!step || typing || !(list.contains(document.activeElement) || document.activeElement === document.body)) return;
	const buttons = [...list.querySelectorAll("button")];
	const now = buttons.findIndex(one => one.getAttribute("aria-current") === "true");
	const next = buttons[Math.min(buttons.length - 1, Math.max(0, now + step))];
	if (next) { event.preventDefault(); next.focus(); next.click(); if (next === buttons[buttons.length - 1]) more(); }
});

function show(one, button) {
	hide();
	for (const old of list.querySelectorAll("[aria-current]")) old.removeAttribute("aria-current");
	button.setAttribute("aria-current", "true");
	const parts = [make("h3", one.headline), make("p", one.place, "dim")];
	const values = make("table");
	for (const [text, cls] of [["", ""], ["expected", ""], ["observed", ""]]) values.appendChild(make("th", text, cls));
	for (const [name, expected, observed, erratum] of one.values) {
		const line = values.appendChild(make("tr"));
		line.appendChild(make("td", name));
		line.appendChild(make("td", expected));
		line.appendChild(make("td", observed, erratum ? "known" : "bad"));
		if (erratum) line.appendChild(make("td", `known: ${erratum}`, "known"));
	}
	parts.push(values);
	const rule = make("div", undefined, "rule");
	rule.append(make("strong", one.rule[0]), ` ${one.rule[1] ? `(${one.rule[1]})` : ""} ${one.rule[2]}`);
	parts.push(rule);
	if (data.timeline?.op.length) {
		const button = make("button", "show it in the timeline", "go");
		button.type = "button";
		button.onclick = () => inTimeline(one);
		parts.push(button);
	}
	if (one.grid) parts.push(...grid(one.grid));
	else if (one.like) parts.push(make("p", `The walk is drawn with the first findings of this kind: ${one.like}.`, "dim"));
	if (one.program.length) {
		parts.push(make("h4", "What L1 and L2 did: ops, VMRUN, probes, #VMEXIT"));
		const line = make("ol", undefined, "timeline program");
		for (const [here, text] of one.program) line.appendChild(make("li", text, here ? "here" : ""));
		parts.push(line);
	}
	if (one.events.length) {
		parts.push(make("h4", "What KVM did, or what its tables hold"));
		const line = make("ol", undefined, "timeline");
		for (const text of one.events) line.appendChild(make("li", text.slice(2), text.startsWith("> ") ? "here" : ""));
		parts.push(line);
	}
	detail.replaceChildren(...parts);
}

/* --- the two-dimensional walk: a row for each entry of L2's tables, its own nested walk before it --- */
function grid(walk) {
	const node = make("table", undefined, "grid"), head = node.appendChild(make("tr"));
	head.appendChild(make("th", "L2's tables"));
	for (const level of walk.columns) head.appendChild(make("th", `nested ${level}`));
	if (walk.rows.some(row => row.guest)) head.appendChild(make("th", "the guest's entry"));
	for (const row of walk.rows) {
		const line = node.appendChild(make("tr"));
		const label = line.appendChild(make("th", row.label));
		label.title = row.what;
		for (const level of walk.columns) {
			const found = row.nested.find(cell => cell.level === level);
			const at = line.appendChild(make("td"));
			if (found) at.appendChild(cell(found, false));
		}
		if (row.guest) line.appendChild(make("td")).appendChild(cell(row.guest, true));
	}
	const wide = make("div", undefined, "wide");
	wide.appendChild(node);
	const ends = make("table");
	const line = ends.appendChild(make("tr"));
	line.append(make("th", "the walk ends in"), make("td", walk.model));
	const other = ends.appendChild(make("tr"));
	other.append(make("th", "on the machine"), make("td", walk.machine, walk.differs ? "outcome differs bad" : ""));
	return [make("h4", "The walk: the model's entries, and below them the machine's where they differ"), wide, ends,
		...(walk.why ? [make("p", walk.why, "bad")] : [])];
}

function cell(one, guest) {
	const node = make("button", undefined, "cell" + (guest ? " guest" : "") + (one.differs ? " differs" : "") +
		(one.first ? " first" : "") + (one.last ? " last" : ""));
	node.type = "button";
	node.append(make("span", `sPA ${one.at}`, "at"), make("span", one.model), make("span", names(one.model, one.level).join(" "), "at"));
	if (one.machine !== null && one.machine !== one.model) node.append(make("span", one.machine, "bad"),
		make("span", names(one.machine, one.level).join(" "), "bad at"));
	const label = `${guest ? "guest" : "nested"} ${one.level} at sPA ${one.at}: ${names(one.model, one.level).join(" ")}`;
	node.setAttribute("aria-label", label + (one.last ? "; the walk stops here" : ""));
	for (const event of ["mouseenter", "focus", "click"]) node.addEventListener(event, () => bits(one, node));
	for (const event of ["mouseleave", "blur"]) node.addEventListener(event, hide);
	return node;
}

/* --- an entry, bit by bit --- */
const BITS = [[0, "P", "present"], [1, "R/W", "writes permitted"], [2, "U/S", "user accesses permitted"], [3, "PWT", "write-through"],
	[4, "PCD", "cache disabled"], [5, "A", "accessed"], [6, "D", "dirty"], [7, "PS", "maps a page"], [8, "G", "global"],
	[63, "NX", "no execution"]];
const has = (entry, bit) => BigInt("0x" + entry) >> BigInt(bit) & 1n;
const names = (entry, level) => BITS.filter(([bit]) => has(entry, bit)).map(([bit, name]) => bit === 7 && level === "pte" ? "PAT" : name);

function bits(one, node) {
	hide();
	const box = make("div");
	box.id = "bits";
	box.setAttribute("role", "tooltip");
	box.append(make("strong", `${one.level} at sPA ${one.at}`), make("div", `frame ${one.frame}${one.type ? `, read as ${one.type}` : ""}`));
	const rows = box.appendChild(make("table"));
	const machine = one.machine === null ? one.model : one.machine;
	for (const [bit, name, what] of BITS) {
		const ours = has(one.model, bit), theirs = has(machine, bit);
		const line = rows.appendChild(make("tr", undefined, ours !== theirs ? "bad" : ours ? "" : "dim"));
		const shown = bit === 7 && one.level === "pte" ? "PAT" : name;
		line.append(make("td", bit), make("td", shown), make("td", ours === theirs ? String(ours) : `${ours}, machine ${theirs}`),
			make("td", bit === 7 && one.level === "pte" ? "memory type" : what));
	}
	document.body.appendChild(box);
	const at = node.getBoundingClientRect(), size = box.getBoundingClientRect();
	box.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 8))}px`;
	box.style.top = `${at.bottom + size.height + 8 < innerHeight ? at.bottom + 4 : Math.max(4, at.top - size.height - 4)}px`;
}
function hide() { by("bits")?.remove(); }

/* --- lost machines, errata, coverage --- */
for (const one of data.lost) {
	by("lost").hidden = false;
	by("lost-list").append(make("h3", one.scenario, "bad"), make("pre", one.text));
}
for (const one of data.known) {
	by("known").hidden = false;
	const box = by("known-list").appendChild(make("details"));
	const head = box.appendChild(make("summary"));
	head.append(make("span", one.id, "known"), ` ${one.title} (${one.count.toLocaleString("en")} divergences in ${one.scenarios.toLocaleString("en")} scenarios)`);
	box.append(make("p", one.explanation), make("p", one.reference, "dim"));
}
if (data.coverage.rows.length) {
	by("coverage").hidden = false;
	const heat = by("heat");
	heat.className = "heat";
	const heads = [make("tr"), make("tr")], { columns } = data.coverage;
	heads[0].appendChild(make("th", "rule")).rowSpan = 2;
	columns.forEach(([dimension, level], n) => {  // a dimension stands above its levels
		if (!n || dimension !== columns[n - 1][0])
			heads[0].appendChild(make("th", dimension || "no walk")).colSpan = columns.filter(one => one[0] === dimension).length;
		heads[1].append(make("th", level));
	});
	heat.append(...heads);
	for (const [rule, ...cells] of data.coverage.rows) {
		const line = heat.appendChild(make("tr"));
		line.appendChild(make("th", rule, "r"));
		for (const [n, [reached, of]] of cells.entries()) {
			const at = line.appendChild(make("td", of ? `${reached}/${of}` : "", of ? "" : "dim"));
			if (of) at.title = `${rule}, ${columns[n].join(" ") || "no walk"}: ${reached} of ${of} cells reached`;
			if (of) at.style.background = `color-mix(in srgb, var(--${reached === of ? "good" : "bad"}) ${reached === of ? 22 : 15 + 55 * (1 - reached / of)}%, transparent)`;
		}
	}
}
if (data.findings.length) filter();
else {
	by("new").querySelector(".tools").hidden = true;
	by("new").querySelector(".split").classList.add("empty");
	by("new").appendChild(make("p", "None.", "dim"));
}
