/* --- the timeline: each visit of L2, a strip of all of them and a window of rows on it --- */
const KINDS = { done: "good", npf: "mark", exception: "known", other: "dim", refused: "bad" };
const KIND_NAMES = { done: "all done (VMMCALL)", npf: "#NPF", exception: "an exception", other: "another intercept", refused: "no L2" };
const ROWS = 24, LANES = [[0, 40], [44, 12], [60, 12], [76, 12]];  // exits, paging, contexts, findings: top and height

const line = data.timeline || { op: [], programs: [], exits: [], unders: [], notes: [], at: [], contexts: [], switches: [] };
const visits = line.op.length, programOf = new Uint32Array(visits);
let view = Uint32Array.from({ length: visits }, (_, n) => n), here = 0;

line.programs.reduce((first, [, count], n) => { programOf.fill(n, first, first + count); return first + count; }, 0);
const nameOf = visit => line.programs[programOf[visit]][0];
const noteKind = visit => line.notes[line.note[visit]][0];
const KNOWN = line.contexts.length > 0;  // whether KVM told of its contexts
const ways = line.switches.map(([before, ...rest]) => {  // direct → shadow → direct
	if (!rest.length) return "";
	const kind = n => n < 0 ? "?" : line.contexts[n][0], inside = rest.slice(0, -1).map(kind);
	return [kind(before), inside.filter((one, n) => one !== inside[n - 1]).join(", ") || "none", kind(rest.at(-1))].join(" → ");
});
const wayNumbers = new Map([...new Set(ways)].map((way, n) => [way, n]));
const hue = number => `hsl(${number * 137.5 % 360} 55% 55%)`;
const changes = visit => visit > 0 && (line.under[visit] !== line.under[visit - 1] ||
	ways[line.switch[visit]] !== ways[line.switch[visit - 1]]);

function strip() {
	const node = by("strip"), wide = node.width = Math.max(1, Math.round(node.clientWidth * devicePixelRatio));
	const high = devicePixelRatio, ink = node.getContext("2d"), style = getComputedStyle(document.documentElement);
	const colour = name => style.getPropertyValue(`--${name}`).trim();
	const [kinds, notes] = [KINDS, { new: "bad", known: "known" }].map(
		names => Object.fromEntries(Object.entries(names).map(([kind, name]) => [kind, colour(name)])));
	node.height = 92 * high;
	for (let x = 0; x < wide && view.length; x++) {
		const from = Math.floor(x * view.length / wide), to = Math.max(from + 1, Math.floor((x + 1) * view.length / wide));
		const counts = {}; let worst = "";
		for (let n = from; n < to; n++) {
			const kind = line.exits[line.exit[view[n]]][0], note = noteKind(view[n]);
			counts[kind] = (counts[kind] || 0) + 1;
			if (note === "new" || note && !worst) worst = note;
		}
		let top = LANES[0][0] * high;
		for (const kind of Object.keys(KINDS)) {
			const tall = (counts[kind] || 0) / (to - from) * LANES[0][1] * high;
			ink.fillStyle = kinds[kind];
			ink.fillRect(x, top, 1, tall);
			top += tall;
		}
		const bar = (lane, colour) => { ink.fillStyle = colour; ink.fillRect(x, LANES[lane][0] * high, 1, LANES[lane][1] * high); };
		bar(1, hue(line.under[view[from]]));
		const way = ways[line.switch[view[from]]];
		if (way) bar(2, hue(wayNumbers.get(way)));
		if (worst) bar(3, notes[worst]);
	}
	ink.fillStyle = colour("ink");
	ink.fillRect(Math.min(wide - 2 * high, here / Math.max(1, view.length) * wide), 0, 2 * high, node.height);
}

function rows() {
	const box = by("visits"), first = Math.max(0, Math.min(view.length - ROWS, here - (ROWS >> 1))), shown = [];
	for (let n = first; n < Math.min(view.length, first + ROWS); n++) {
		const visit = view[n], [kind, exit] = line.exits[line.exit[visit]], [found, note] = line.notes[line.note[visit]];
		const row = make("div", undefined, n === here ? "here" : "");
		row.id = `visit-${n}`;
		row.setAttribute("role", "option");
		row.setAttribute("aria-selected", n === here);
		const op = line.op[visit] < 0 ? "" : `op ${line.op[visit]}`;
		row.append(make("span", (visit + 1).toLocaleString("en"), "n"), make("span", nameOf(visit)), make("span", op),
			make("span", `${changes(visit) ? "◆ " : ""}${line.unders[line.under[visit]]}`, changes(visit) ? "" : "dim"),
			...(KNOWN ? [make("span", ways[line.switch[visit]])] : []),
			make("span", `${exit}${line.at[visit] ? ` at ${line.at[visit]}` : ""}`, `kind ${KINDS[kind]}`),
			make("span", note, found === "new" ? "bad" : "known"));
		row.onclick = () => go(n);
		row.ondblclick = () => finding(visit);
		shown.push(row);
	}
	box.replaceChildren(...(shown.length ? shown : [make("p", "Nothing matches.", "dim")]));
	if (shown.length) box.setAttribute("aria-activedescendant", `visit-${here}`);
	else box.removeAttribute("aria-activedescendant");
	by("passed").replaceChildren(...(shown.length && KNOWN ? passed(view[here]).map(text => make("li", text)) : []));
}

function passed(visit) {  // the contexts of one VMRUN, in words
	const [before, ...rest] = line.switches[line.switch[visit]], words = n => n < 0 ? "L1: not traced" : line.contexts[n][1];
	if (!rest.length) return [line.op[visit] < 0 ? "" : `VMRUN    ${line.unders[line.under[visit]]}: KVM refused it, or told nothing`];
	const times = line.entries[visit], inside = rest.slice(0, -1).map(words);
	const entered = `${times === 1 ? "1 entry" : `${times} entries`} of the processor into L2`;
	return [words(before), `VMRUN    ${line.unders[line.under[visit]]}; ${entered}`, ...inside,
		`#VMEXIT  ${line.exits[line.exit[visit]][1]}`, words(rest.at(-1))];
}

function go(n) {
	here = Math.max(0, Math.min(view.length - 1, n));
	by("place").value = here;
	strip();
	rows();
}

function sift() {
	const words = by("visit-filter").value.toLowerCase().split(/\s+/).filter(Boolean), found = by("found").value;
	const has = words.map(word => [line.programs, line.exits, line.unders, line.notes, ways].map(
		texts => texts.map(one => (Array.isArray(one) ? one.join(" ") : one).toLowerCase().includes(word))));
	const before = view[here] || 0;
	const kept = [];
	for (let n = 0; n < visits; n++) {
		const kind = noteKind(n);
		if (found && !(kind === "new" || kind === found)) continue;
		if (words.every((word, w) => has[w][0][programOf[n]] || has[w][1][line.exit[n]] || has[w][2][line.under[n]] ||
			has[w][3][line.note[n]] || has[w][4][line.switch[n]] || line.at[n].includes(word))) kept.push(n);
	}
	view = Uint32Array.from(kept);
	by("place").max = Math.max(0, view.length - 1);
	by("visit-count").textContent = view.length === visits ? visits.toLocaleString("en")
		: `${view.length.toLocaleString("en")} of ${visits.toLocaleString("en")}`;
	const after = view.findIndex(visit => visit >= before);
	go(after < 0 ? view.length - 1 : after);
}

function next(test, step) {
	for (let n = here + step; n >= 0 && n < view.length; n += step) if (test(view[n])) return go(n);
}

function finding(visit) {  // what was new in it, above
	const name = nameOf(visit), of = data.findings.filter(one => one.name === name);
	const one = of.find(other => other.op === line.op[visit]) || of[0];
	if (!one) return;
	for (const id of ["sort", "family"]) by(id).value = "";
	by("filter").value = name;
	filter();
	show(one, [...list.querySelectorAll("button")][shown.indexOf(one)] || list.querySelector("button"));
	detail.focus();
}

function inTimeline(one) {  // the visit that a finding is of
	by("visit-filter").value = by("found").value = "";
	sift();
	let at = -1;
	for (let n = 0; n < visits; n++) {
		if (nameOf(n) !== one.name) continue;
		if (at < 0 || noteKind(at) !== "new" && noteKind(n) === "new") at = n;
		if (line.op[n] === one.op && noteKind(n) === "new") { at = n; break; }
	}
	if (at >= 0) go(at);
	by("visits").focus();
}

if (visits) {
	by("timeline").hidden = false;
	by("about").textContent += line.about;
	by("visits").classList.toggle("contexts", KNOWN);
	for (const [kind, name] of Object.entries(KIND_NAMES)) by("kinds").append(make("span", `■ ${name}`, KINDS[kind]), " ");
	if (line.left_out) by("left-out").textContent = `${line.left_out.toLocaleString("en")} further VMRUNs, in which nothing is new, are left out.`;
	by("visit-filter").addEventListener("input", sift);
	by("found").addEventListener("change", sift);
	by("place").addEventListener("input", () => go(Number(by("place").value)));
	const point = event => go(Math.floor(event.offsetX / by("strip").clientWidth * view.length));
	by("strip").addEventListener("pointerdown", event => { by("strip").setPointerCapture(event.pointerId); point(event); });
	by("strip").addEventListener("pointermove", event => { if (event.buttons) point(event); });
	by("visits").addEventListener("wheel", event => {
		const to = here + 3 * Math.sign(event.deltaY);
		if (to < 0 || to >= view.length) return;
		event.preventDefault();
		go(to);
	}, { passive: false });
	by("visits").addEventListener("keydown", event => {
		const to = { ArrowDown: here + 1, j: here + 1, ArrowUp: here - 1, k: here - 1, PageDown: here + ROWS,
			PageUp: here - ROWS, Home: 0, End: view.length - 1 }[event.key];
		const act = { n: () => next(visit => noteKind(visit) === "new", 1), p: () => next(visit => noteKind(visit) === "new", -1),
			c: () => next(changes, 1), C: () => next(changes, -1), Enter: () => finding(view[here]) }[event.key];
		if (to === undefined && !act || event.ctrlKey || event.metaKey || event.altKey) return;
		event.preventDefault();
		event.stopPropagation();
		if (act) act();
		else go(to);
	});
	addEventListener("resize", strip);
	matchMedia("(prefers-color-scheme: dark)").addEventListener("change", strip);
	sift();
}
