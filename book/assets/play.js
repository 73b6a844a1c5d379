// Questions to play with: a .play holds one question as HTML and many as JSON (notebooks/11_play.ipynb), of which this
// shows the chosen reader, adapter, candidates and part of the history. Without this script the one question stays.
document.addEventListener("DOMContentLoaded", () => {
  for (const play of document.querySelectorAll(".play")) start(play, JSON.parse(play.querySelector("script").text));
  for (const box of document.querySelectorAll(".sortable")) sortable(box);
});

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function start(play, data) {
  const { readers, systems, titles, colours, scale } = data;
  const state = { reader: 0, system: systems.at(-1), draw: 0, seen: 0 };

  // Controls: all native, so that mouse, touch and keys work.
  const kinds = Object.keys(data.counts);
  const choice = make("select", { id: `${play.id}-reader` }, ...kinds.map(kind => make("optgroup",
    { label: `${kind}: ${data.counts[kind]} of ${data.total}` },
    ...readers.flatMap((reader, place) => reader.kind === kind ? [make("option", { value: place, textContent: `${reader.name} (${kind})` })] : []))));
  const radios = systems.map(system => make("label", {},
    make("input", { type: "radio", name: `${play.id}-system`, value: system, checked: system === state.system }), system));
  const range = make("input", { type: "range", id: `${play.id}-seen`, min: 1, step: 1 });
  const seen = make("output");
  const button = make("button", { type: "button", textContent: "New candidates" });
  const draw = make("output");
  const says = make("p", { className: "play-says", ariaLive: "polite" });
  const counts = kinds.map(kind => `${kind} ${data.counts[kind]}`).join(", ");
  const controls = make("div", { className: "play-controls" },
    make("p", { textContent: `Of ${data.total} test questions (all titles, draw 1): ${counts}.` }),
    make("p", {}, make("label", { htmlFor: choice.id, textContent: "Reader" }), choice),
    make("fieldset", {}, make("legend", { textContent: "Adapter" }), ...radios),
    make("p", {}, make("label", { htmlFor: range.id, textContent: "Titles in view" }), range, seen),
    make("p", {}, button, draw));
  play.prepend(controls);
  play.querySelector("figcaption").replaceChildren(says);
  const [list, gate, head, body] = ["ol", ".gate", "thead tr", "tbody"].map(part => play.querySelector(part));
  const [above, note] = play.querySelectorAll(".question section p");

  const bar = (weights, parts) => weights.map((weight, expert) => {
    const [background, color] = colours[expert % colours.length];
    const share = weight / scale;
    const part = make("span", { textContent: parts && share >= 0.1 ? `${Math.round(100 * share)}%` : "" });
    Object.assign(part.style, { display: "inline-block", width: `${100 * share}%`, background, color });
    return part;
  });
  const words = weights => weights.map(weight => (weight / scale).toFixed(2)).join(", ");
  const first = shares => shares.indexOf(Math.max(...shares));

  function show() {
    const reader = readers[state.reader], asked = reader.draws[state.draw], length = reader.history.length;
    const shares = Object.fromEntries(systems.map(system => [system, asked.shares[system][state.seen - 1]]));
    const right = asked.offered.indexOf(reader.target), chosen = shares[state.system];
    range.max = length;
    range.value = state.seen;
    seen.textContent = `${state.seen} of ${length}`;
    range.setAttribute("aria-valuetext", `the last ${seen.textContent}`);
    draw.textContent = `draw ${state.draw + 1} of ${reader.draws.length}`;

    const gated = data.gated.includes(state.system);
    list.replaceChildren(...reader.history.map((item, place) => {
      const row = make("li", { className: place < length - state.seen ? "unseen" : "" }, make("span", { textContent: titles[item] }));
      if (gated) {
        const weights = reader.along[place];
        const bars = make("span", { className: "gate", role: "img", ariaLabel: `Gate weights after this title: ${words(weights)}` }, ...bar(weights));
        row.append(bars);
      }
      return row;
    }));
    const weights = reader.gate[state.seen - 1];
    above.textContent = `History, oldest first${gated ? ", and the gate after each title" : ""}`;
    note.textContent = gated ? `Gate for the titles in view: weights of the ${weights.length} experts` : `${state.system} has no gate: one update for every history`;
    gate.hidden = !gated;
    gate.replaceChildren(...bar(weights, true));
    gate.ariaLabel = `Gate weights ${words(weights)}`;

    head.replaceChildren(...["Candidate", ...systems].map(name =>
      make("th", { scope: "col", textContent: name, className: name === state.system ? "chosen" : "" })));
    const order = asked.offered.map((_, place) => place).sort((a, b) => chosen[b] - chosen[a] || a - b);
    body.replaceChildren(...order.map(place => make("tr", { className: place === right ? "target" : "" },
      make("th", { scope: "row", textContent: titles[asked.offered[place]] + (place === right ? " ✓" : "") }),
      ...systems.map((system, number) => {
        const share = shares[system][place] / scale, line = make("span");
        Object.assign(line.style, { display: "block", height: "4px", width: `${100 * share}%`, background: colours[number][0] });
        const top = place === first(shares[system]) ? " first" : "";
        return make("td", { className: (system === state.system ? "chosen" : "") + top }, share.toFixed(3), line);
      }))));
    const sentence = system => {
      const best = first(shares[system]);
      return `${system} puts ${titles[asked.offered[best]]} first: ${best === right ? "right" : "wrong"}.`;
    };
    says.textContent = `${[state.system, ...systems.filter(system => system !== state.system)].map(sentence).join(" ")} ✓ is what came next.`;
  }

  const choose = place => Object.assign(state, { reader: place, draw: 0, seen: readers[place].history.length });
  choice.addEventListener("change", () => { choose(Number(choice.value)); show(); });
  range.addEventListener("input", () => { state.seen = range.valueAsNumber; show(); });
  button.addEventListener("click", () => { state.draw = (state.draw + 1) % readers[state.reader].draws.length; show(); });
  for (const radio of controls.querySelectorAll("[type=radio]")) {
    radio.addEventListener("change", () => { state.system = radio.value; show(); });
  }
  choose(data.start);
  choice.value = data.start;
  show();
}

// A table whose heads sort its rows, and a choice of one value of its first column.
function sortable(box) {
  const body = box.querySelector("tbody"), rows = [...body.rows], text = (row, column) => row.cells[column].textContent.trim();
  const values = ["all", ...new Set(rows.map(row => text(row, 0)))];
  const heads = [...box.querySelectorAll("thead th")];
  const choice = make("select", { id: `${box.id}-filter` }, ...values.map(value => make("option", { textContent: value })));
  choice.addEventListener("change", () => {
    for (const row of rows) row.hidden = choice.value !== "all" && text(row, 0) !== choice.value;
  });
  heads.forEach((head, column) => {
    const button = make("button", { type: "button", textContent: head.textContent });
    button.addEventListener("click", () => {
      const down = head.ariaSort === "ascending" ? -1 : 1;
      const numbers = rows.some(row => !Number.isNaN(parseFloat(text(row, column))));
      const key = row => numbers ? parseFloat(text(row, column)) : text(row, column).toLowerCase();
      const known = row => !(numbers && Number.isNaN(key(row)));  // what is missing comes last
      rows.sort((a, b) => known(b) - known(a) || (known(a) ? down * (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) : 0));
      for (const other of heads) other.ariaSort = null;
      head.ariaSort = down > 0 ? "ascending" : "descending";
      body.append(...rows);
    });
    head.replaceChildren(button);
  });
  box.prepend(make("p", { className: "play-controls" },
    make("label", { htmlFor: choice.id, textContent: heads[0].textContent }), choice));
}
