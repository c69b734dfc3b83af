// Interactive pieces (companion/widgets): plain DOM and SVG, no library, nothing fetched.
document.addEventListener("DOMContentLoaded", () => {
  const SVG = "http://www.w3.org/2000/svg";
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else node.setAttribute(key, value);
    }
    node.append(...children.map((child) => (child === null || child === undefined ? "" : child)));
    return node;
  };
  const draw = (tag, attributes, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  let serial = 0;
  const labelled = (text, control) => {
    control.id = `capsae-control-${serial++}`;
    return make("span", { class: "capsae-control" }, make("label", { for: control.id }, text), " ", control);
  };
  const select = (options, onchange) => {
    const entries = Array.isArray(options) ? options.map((o) => [o, o]) : Object.entries(options);
    return make("select", { onchange }, ...entries.map(([value, text]) => make("option", { value }, text)));
  };
  const number = (value, digits = 1) => (value === null ? "" : value.toFixed(digits));

  // A table whose columns sort by a button in the head, shown `size` rows at a time.
  // columns: [title, row => value, value => text or node, is a number]
  const sortable = (columns, { size = 24, sort = 0, down = false, mark = () => false } = {}) => {
    const body = make("tbody"), status = make("span", { role: "status" });
    let rows = [], from = 0, by = sort, descending = down;
    const heads = columns.map(([title, , , numeric], i) =>
      make("th", { scope: "col", class: numeric ? "capsae-number" : "" },
        make("button", { type: "button", onclick: () => { descending = by === i ? !descending : false; by = i; from = 0; fill(); } }, title)));
    const step = (text, by) => make("button", { type: "button", onclick: () => { from = Math.max(0, from + by); fill(); } }, text);
    const back = step("previous", -size), on = step("next", size);
    const fill = () => {
      const key = columns[by][1];
      const sorted = [...rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return (x < y ? -1 : x > y ? 1 : 0) * (descending ? -1 : 1);
      });
      heads.forEach((head, i) => head.setAttribute("aria-sort", i !== by ? "none" : descending ? "descending" : "ascending"));
      from = Math.min(from, Math.max(0, sorted.length - 1));
      body.replaceChildren(...sorted.slice(from, from + size).map((row) =>
        make("tr", { class: mark(row) ? "capsae-marked" : "" }, ...columns.map(([, value, show, numeric]) =>
          make("td", { class: numeric ? "capsae-number" : "" }, show ? show(value(row), row) : value(row))))));
      const last = Math.min(from + size, sorted.length);
      status.textContent = sorted.length ? `${from + 1} to ${last} of ${sorted.length}` : "none";
      back.disabled = from === 0;
      on.disabled = last === sorted.length;
    };
    const box = make("div", { class: "capsae-scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body));
    const bar = make("p", { class: "capsae-bar" }, back, " ", on, " ", status);
    return { node: make("div", {}, box, bar), show: (found) => { rows = found; from = 0; fill(); } };
  };

  const KINDS = {
    results: ({ metrics, rows }, root) => {
      const metric = select(metrics, refresh), group = select({ all: "all", near: "near", far: "far" }, refresh);
      const kinds = ["every kind", ...new Set(rows.map((row) => row[1]))], kind = select(kinds, refresh);
      const experiment = select([...new Set(rows.map((row) => row[7]))], refresh);
      const text = make("input", { type: "search", oninput: refresh });
      const ours = (row) => ["paper", "ours"].includes(row[1]);
      const span = (value, row) => {
        if (row[5] === null) return number(value);
        const svg = draw("svg", { viewBox: "0 0 100 12", class: "capsae-interval", "aria-hidden": "true" });
        svg.append(draw("line", { x1: row[5], x2: row[6], y1: 6, y2: 6 }), draw("circle", { cx: value, cy: 6, r: 3 }));
        return make("span", {}, svg, ` ${number(value)} (${number(row[5])} to ${number(row[6])})`);
      };
      const table = sortable([["score", (row) => row[0]], ["kind", (row) => row[1]], ["mean (95 % interval)", (row) => row[4], span, true]],
        { sort: 2, mark: ours });
      function refresh() {
        const wanted = text.value.toLowerCase();
        table.show(rows.filter((row) => row[7] === experiment.value && row[2] === group.value && row[3] === metric.value && row[0].toLowerCase().includes(wanted)
          && (kind.value === kinds[0] || row[1] === kind.value)));
      }
      root.append(make("p", { class: "capsae-bar" }, labelled("experiment", experiment), labelled("metric", metric), labelled("OOD sets", group), labelled("kind", kind), labelled("find", text)), table.node);
      refresh();
    },

    threshold: ({ scores }, root) => {
      const method = select(Object.keys(scores), () => { slider.value = fiveOfHundred(); refresh(); });
      const slider = make("input", { type: "range", min: 0, step: 1, oninput: refresh });
      const svg = draw("svg", { viewBox: "0 0 640 240", role: "img", class: "capsae-chart" }), out = make("p", { role: "status" });
      const groups = [["id", "ID test"], ["near", "near OOD"], ["far", "far OOD"]];
      const above = (counts, cut) => counts.slice(cut).reduce((a, b) => a + b, 0) / counts.reduce((a, b) => a + b, 0);
      const fiveOfHundred = () => {
        const counts = scores[method.value].counts.id;
        return counts.findIndex((_, cut) => above(counts, cut) <= 0.05);
      };
      function refresh() {
        const of = scores[method.value], bins = of.counts.id.length, cut = Number(slider.value), wide = 640 / bins;
        slider.max = bins;
        const cutAt = of.lo + ((of.hi - of.lo) * cut) / bins;
        svg.replaceChildren();
        for (const [group] of groups) {
          const counts = of.counts[group];
          if (!counts) continue;
          const merged = counts.map((_, i) => counts.slice(i - (i % 6), i - (i % 6) + 6).reduce((a, b) => a + b, 0));
          const top = Math.max(...merged);
          const points = merged.flatMap((n, i) => [`${i * wide},${220 - (200 * n) / top}`, `${(i + 1) * wide},${220 - (200 * n) / top}`]);
          svg.append(draw("polygon", { points: `0,220 ${points.join(" ")} 640,220`, class: `capsae-${group}` }));
        }
        svg.append(draw("line", { x1: cut * wide, x2: cut * wide, y1: 8, y2: 220, class: "capsae-cut" }),
          draw("text", { x: 4, y: 236 }, number(of.lo, 2)), draw("text", { x: 636, y: 236, "text-anchor": "end" }, number(of.hi, 2)));
        const share = (group) => (of.counts[group] ? 100 * above(of.counts[group], cut) : null);
        const parts = groups.slice(1).filter(([g]) => of.counts[g]).map(([g, title]) => `${title} missed: ${number(100 - share(g))} %`);
        out.textContent = `Threshold ${cutAt.toPrecision(3)}. ID flagged: ${number(share("id"))} %. ${parts.join(". ")}.`;
        svg.setAttribute("aria-label", `Densities of ${method.value}; ${out.textContent}`);
        slider.setAttribute("aria-valuetext", out.textContent);
      }
      const legend = make("p", { class: "capsae-bar" }, ...groups.map(([g, title]) => make("span", { class: `capsae-key capsae-${g}` }, title)));
      root.append(make("p", { class: "capsae-bar" }, labelled("score", method), labelled("threshold", slider)), svg, legend, out);
      slider.max = scores[method.value].counts.id.length;
      slider.value = fiveOfHundred();
      refresh();
    },

    profiles: ({ classes, core }, root) => {
      const names = Object.fromEntries(classes.map((c, i) => [i, c[0]]));
      const which = select(names, () => { fill(); refresh(); });
      const sample = make("select", { onchange: refresh });
      const svg = draw("svg", { viewBox: "0 0 640 240", role: "img", class: "capsae-chart" }), out = make("p", { role: "status" });
      const fill = () => sample.replaceChildren(...classes[which.value][3].map((s, i) => make("option", { value: i }, s[0])));
      function refresh() {
        const [name, latents, q, samples] = classes[which.value], [set, epd, p, rest] = samples[sample.value];
        const top = Math.max(...q, ...p), wide = 640 / q.length;
        svg.replaceChildren(draw("line", { x1: 0, x2: 640, y1: 210, y2: 210, class: "capsae-axis" }));
        q.forEach((expected, i) => {
          const height = (value) => (200 * value) / top;
          const bar = draw("g", {});
          bar.append(draw("rect", { x: i * wide, y: 210 - height(expected), width: wide - 1, height: height(expected), class: "capsae-q" }));
          if (p[i] > 0) bar.append(draw("rect", { x: (i + 0.3) * wide, y: 210 - height(p[i]), width: 0.4 * wide, height: height(p[i]), class: "capsae-p" }));
          const term = p[i] > 0 && expected > 0 ? p[i] * Math.log(p[i] / expected) : 0;
          bar.append(draw("title", {}, `latent ${latents[i]}: Q ${number(expected, 4)}, P ${number(p[i], 4)}, term of EPD ${number(term, 3)} nats`));
          svg.append(bar);
        });
        svg.append(draw("text", { x: 4, y: 230 }, "strongest latent of the class first"));
        out.textContent = `${name}, median image of ${set} taken for it: EPD ${number(epd, 2)} nats; ${number(100 * rest, 0)} % of its core energy lies on the other ${core - q.length} latents.`;
        svg.setAttribute("aria-label", out.textContent);
      }
      const legend = make("p", { class: "capsae-bar" }, make("span", { class: "capsae-key capsae-q" }, "Q, the class"), make("span", { class: "capsae-key capsae-p" }, "P, the image"));
      root.append(make("p", { class: "capsae-bar" }, labelled("class", which), labelled("image from", sample)), svg, legend, out);
      fill();
      refresh();
    },

    latents: ({ kinds, rows }, root) => {
      const kind = select({ "": "every kind", ...kinds }, refresh), text = make("input", { type: "search", oninput: refresh });
      const table = sortable([
        ["latent", (r) => r[0], null, true], ["fires in, % of images", (r) => r[1], (v) => number(v, 2), true],
        ["selectivity", (r) => r[2], (v) => number(v, 2), true], ["kind", (r) => r[3], (v) => kinds[v]], ["name", (r) => r[4]], ["strongest classes", (r) => r[5]],
      ], { sort: 1, down: true });
      function refresh() {
        const wanted = text.value.toLowerCase();
        table.show(rows.filter((r) => (!kind.value || r[3] === kind.value) && `${r[0]} ${r[4]} ${r[5]}`.toLowerCase().includes(wanted)));
      }
      root.append(make("p", { class: "capsae-bar" }, labelled("kind", kind), labelled("find", text)), table.node);
      refresh();
    },
  };

  document.querySelectorAll(".capsae-widget").forEach((root) => {
    const data = JSON.parse(root.querySelector("script").textContent);
    root.querySelector(".capsae-static")?.remove();
    KINDS[root.dataset.kind](data, root);
  });
});
