// The zoomable timelines of a report page: each <div class="viewer"> holds its data, times in microseconds.
(() => {
  "use strict";
  const LANE = 19, AXIS = 24, GUTTER = 150, MEMORY = 34, SHORTEST = 0.05;
  const START = 0, BEGIN = 1, STOP = 2, NAME = 3, KIND = 4, PEER = 5, BYTES = 6, FLOPS = 7, ROW = 8, PARTNER = 9;
  const three = (x) => (Math.abs(x) >= 99.95 ? x.toFixed(0) : Math.abs(x) >= 9.995 ? x.toFixed(1) : x.toFixed(2));
  const pick = (x, units) => {
    const [name, scale] = units.find(([, s]) => Math.abs(x) >= 0.9995 * s) || units[units.length - 1];
    return `${three(x / scale)} ${name}`;
  };
  const time = (us) => (Math.abs(us) < 1e-4 ? "0 s" : pick(us, [["s", 1e6], ["ms", 1e3], ["µs", 1], ["ns", 1e-3]]));
  const size = (n) => (n < 999.5 ? `${n} B` : pick(n, [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]));
  const rate = (x, unit) => pick(x, [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) + unit;

  for (const root of document.querySelectorAll(".viewer")) build(root);

  function build(root) {
    const data = JSON.parse(root.querySelector("script").textContent), end = Math.max(data.stop, SHORTEST);
    const canvas = root.querySelector("canvas"), pen = canvas.getContext("2d");
    const tip = root.querySelector(".tip"), said = root.querySelector("output");
    let view = [0, end], width = 0, chosen = null, pending = false, y = AXIS;

    // Vertical layout: every lane knows its height on the canvas, every bar its lane.
    const lanes = [], bars = [];
    data.groups.forEach((group, index) => {
      if (index) y += data.groups[index - 1].rank === group.rank ? 5 : 16;
      group.top = y;
      for (const lane of group.lanes) {
        Object.assign(lane, { y, group, height: LANE * Math.max(1, lane.rows * 0.6) });
        for (const bar of lane.bars) bars.push(Object.assign(bar, { lane }));
        lanes.push(lane);
        y += lane.height + 1;
      }
      if (group.memory.length) y += MEMORY;
      group.bottom = y;
    });
    const height = y + AXIS;

    const plot = () => width - GUTTER - 8;
    const toX = (us) => GUTTER + ((us - view[0]) / (view[1] - view[0])) * plot();
    const toTime = (x) => view[0] + ((x - GUTTER) / plot()) * (view[1] - view[0]);

    function look(from, span) {
      span = Math.min(end, Math.max(SHORTEST, span));
      from = Math.min(end - span, Math.max(0, from));
      view = [from, from + span];
      redraw();
    }
    const zoom = (factor, at) => look(at - (at - view[0]) * factor, (view[1] - view[0]) * factor);
    const slide = (pixels) => look(view[0] + toTime(GUTTER + pixels) - toTime(GUTTER), view[1] - view[0]);

    function redraw() {
      if (!pending) requestAnimationFrame(draw);
      pending = true;
    }

    function draw() {
      pending = false;
      const style = getComputedStyle(root), dots = window.devicePixelRatio || 1, colours = {};
      for (const name of ["ink", "muted", "line", "stripe", "compute", "exposed"]) {
        colours[name] = style.getPropertyValue(`--${name}`).trim();
      }
      colours.hatching = hatching(colours.exposed);
      width = root.clientWidth;
      Object.assign(canvas, { width: width * dots, height: height * dots });
      pen.setTransform(dots, 0, 0, dots, 0, 0);
      pen.font = "11px system-ui, sans-serif";
      pen.textBaseline = "middle";
      drawAxis(colours);
      for (const group of data.groups) drawGroup(group, colours);
      if (chosen) drawChosen(colours);
    }

    function drawAxis(colours) {
      const rough = (view[1] - view[0]) / Math.max(2, plot() / 110), ten = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((m) => m * ten).find((s) => s >= rough);
      const unit = view[1] >= 2e6 ? ["s", 1e6] : view[1] >= 2e3 ? ["ms", 1e3] : ["µs", 1];
      const digits = Math.max(0, Math.ceil(-Math.log10(step / unit[1]) - 1e-9));
      pen.textAlign = "center";
      for (let t = Math.ceil(view[0] / step) * step; t <= view[1] + step * 1e-6; t += step) {
        const x = Math.round(toX(t)) + 0.5;
        pen.fillStyle = colours.line;
        pen.fillRect(x, AXIS - 6, 1, height - 2 * AXIS + 10);
        pen.fillStyle = colours.muted;
        const text = `${(t / unit[1]).toFixed(digits)} ${unit[0]}`;
        const at = Math.min(x, width - 8 - pen.measureText(text).width / 2);
        pen.fillText(text, at, AXIS / 2 - 2);
        pen.fillText(text, at, height - AXIS / 2 + 2);
      }
    }

    function drawGroup(group, colours) {
      pen.textAlign = "left";
      pen.fillStyle = colours.ink;
      pen.font = "600 12px system-ui, sans-serif";
      pen.fillText(`rank ${group.rank}`, 4, group.top + LANE / 2);
      pen.font = "11px system-ui, sans-serif";
      pen.fillStyle = colours.muted;
      if (data.sources.length > 1) pen.fillText(data.sources[group.source], 4, group.top + LANE * 1.5, 66);
      pen.textAlign = "right";
      for (const lane of group.lanes) pen.fillText(lane.label, GUTTER - 8, lane.y + lane.height / 2, 76);
      if (group.memory.length) pen.fillText("live bytes", GUTTER - 8, group.bottom - MEMORY / 2, 76);
      pen.save();
      clip(group.top, group.bottom);
      for (const lane of group.lanes) {
        pen.fillStyle = colours.stripe;
        pen.fillRect(GUTTER, lane.y, plot(), lane.height);
        pen.fillStyle = colours.hatching;
        for (const [a, b] of lane.compute ? group.exposed : []) {
          if (b >= view[0] && a <= view[1]) pen.fillRect(toX(a), lane.y + 1, Math.max(1, toX(b) - toX(a)), lane.height - 2);
        }
        drawLane(lane, colours);
      }
      if (group.memory.length) drawMemory(group, colours);
      pen.restore();
    }

    function clip(top, bottom) {
      pen.beginPath();
      pen.rect(GUTTER, top, plot(), bottom - top);
      pen.clip();
    }

    function hatching(colour) {
      const tile = Object.assign(document.createElement("canvas"), { width: 6, height: 6 }), ink = tile.getContext("2d");
      ink.fillStyle = ink.strokeStyle = colour;
      ink.globalAlpha = 0.13;
      ink.fillRect(0, 0, 6, 6);
      ink.globalAlpha = 0.85;
      for (const x of [-6, 0, 6]) {
        ink.moveTo(x - 1, 7);
        ink.lineTo(x + 7, -1);
      }
      ink.stroke();
      return pen.createPattern(tile, "repeat");
    }

    const box = (bar) => {
      const deep = (bar.lane.height - 2) / bar.lane.rows, x = toX(bar[BEGIN]);
      return [x, bar.lane.y + 1 + bar[ROW] * deep, Math.max(1, toX(bar[STOP]) - x), deep];
    };

    function drawLane(lane, colours) {
      const hue = lane.compute ? colours.compute : data.colours[lane.channel], filled = Array(lane.rows).fill(-1);
      const shown = lane.bars.filter((bar) => bar[STOP] >= view[0] && bar[START] <= view[1]);
      pen.fillStyle = hue;
      pen.globalAlpha = 0.6;
      for (const bar of shown) {
        const [x, top, , deep] = box(bar), from = toX(bar[START]);
        if (x > from) pen.fillRect(from, top + deep / 2 - 0.5, x - from, 1);
      }
      for (const bar of shown) {
        const [x, top, w, deep] = box(bar);
        // Bars that fall on a pixel that is taken already cannot be seen.
        if (x + w <= filled[bar[ROW]] + 0.3) continue;
        filled[bar[ROW]] = x + w;
        const body = [x, top, w > 4 ? w - 0.7 : w, deep];
        pen.globalAlpha = 1;
        if (lane.pale) {
          pen.fillStyle = colours.stripe;
          pen.fillRect(...body);
          pen.globalAlpha = 0.48;
        }
        pen.fillStyle = hue;
        pen.fillRect(...body);
        pen.globalAlpha = 1;
        const left = Math.max(x, GUTTER), room = Math.min(x + w, width - 8) - left - 6;
        if (room < 14 || deep < 12) continue;
        const name = data.names[bar[NAME]], choices = [name, name.slice(name.lastIndexOf(" ") + 1)];
        if (bar[BYTES]) choices.unshift(`${name}  ${size(bar[BYTES])}`);
        const text = choices.find((choice) => pen.measureText(choice).width <= room);
        pen.textAlign = "center";
        pen.fillStyle = lane.pale ? colours.ink : data.dark.includes(hue) || lane.compute ? "#fff" : "#1c2430";
        if (text) pen.fillText(text, left + 3 + room / 2, top + deep / 2 + 0.5);
      }
    }

    function drawMemory(group, colours) {
      const base = group.bottom - 3, deep = MEMORY - 9, peak = group.peak || 1;
      const level = (n) => base - (deep * n) / peak;
      let last = 0;
      pen.beginPath();
      for (const [t, n] of [...group.memory, [end, 0]]) {
        pen.lineTo(toX(t), level(last));
        pen.lineTo(toX(t), level(n));
        last = n;
      }
      pen.fillStyle = colours.muted;
      pen.globalAlpha = 0.28;
      pen.fill();
      pen.globalAlpha = 1;
    }

    function drawChosen(colours) {
      const ends = [chosen, bars[chosen[PARTNER]]].filter(Boolean).map(box);
      const [[x, top, w, deep], [px, ptop, pw, pdeep]] = [ends[0], ends[1] || ends[0]];
      pen.save();
      clip(0, height);
      pen.strokeStyle = colours.ink;
      pen.lineWidth = 2;
      for (const end of ends) pen.strokeRect(...end);
      pen.beginPath();
      pen.moveTo(x + w / 2, ptop > top ? top + deep : top);
      if (ends[1]) pen.lineTo(px + pw / 2, ptop > top ? ptop : ptop + pdeep);
      pen.stroke();
      pen.restore();
    }

    function facts(bar) {
      const lane = bar.lane, moved = bar[STOP] - bar[BEGIN], waited = bar[BEGIN] - bar[START];
      const source = data.sources.length > 1 ? ` · ${data.sources[lane.group.source]}` : "";
      const speed = (amount, unit) => (moved > 0 ? ` at ${rate((amount / moved) * 1e6, unit)}` : "");
      return [
        data.names[bar[NAME]],
        `rank ${lane.group.rank} · ${lane.label}${source}`,
        `${time(moved)}, from ${time(bar[BEGIN])} to ${time(bar[STOP])}`,
        waited > 0 && `posted ${time(waited)} before its sender began`,
        bar[PEER] !== null && `${bar[KIND] === "recv" ? "from" : "to"} rank ${bar[PEER]}`,
        bar[BYTES] && size(bar[BYTES]) + speed(bar[BYTES], "B/s"),
        bar[FLOPS] && rate(bar[FLOPS], "FLOP") + speed(bar[FLOPS], "FLOP/s"),
      ].filter(Boolean);
    }

    function choose(bar, x, below, aloud) {
      if (bar || chosen) redraw();
      chosen = bar;
      tip.hidden = !bar;
      if (!bar) return;
      const element = (tag, textContent) => Object.assign(document.createElement(tag), { textContent });
      const [name, ...lines] = facts(bar);
      tip.replaceChildren(element("b", name), ...lines.map((line) => element("div", line)));
      tip.style.left = `${Math.max(0, Math.min(x + 14, root.clientWidth - tip.offsetWidth - 4))}px`;
      tip.style.top = `${below + 18 + canvas.offsetTop}px`;
      if (aloud) said.textContent = [name, ...lines].join(", ");
    }

    function barAt(x, yAt) {
      const lane = lanes.find((l) => yAt >= l.y && yAt < l.y + l.height && x >= GUTTER);
      return (lane ? lane.bars : []).find((bar) => {
        const [left, top, w, deep] = box(bar);
        return x >= left - 1 && x <= left + w + 1 && yAt >= top - 1 && yAt <= top + deep + 1;
      });
    }

    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons & 1) return slide(-event.movementX);
      choose(barAt(event.offsetX, event.offsetY), event.offsetX, event.offsetY);
    });
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    canvas.addEventListener("pointerleave", () => choose(null));
    canvas.addEventListener("dblclick", (event) => {
      const bar = barAt(event.offsetX, event.offsetY);
      if (bar) look(bar[BEGIN] - 1.5 * (bar[STOP] - bar[BEGIN]), 4 * (bar[STOP] - bar[BEGIN]));
    });
    canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey || event.metaKey) zoom(Math.exp(event.deltaY * 0.003), toTime(event.offsetX));
      else if (event.shiftKey || event.deltaX) slide(event.deltaX || event.deltaY);
      else return;
      event.preventDefault();
    }, { passive: false });

    function walk(sideways, down) {
      if (!lanes.length) return;
      const from = chosen || lanes[0].bars[0];
      const lane = lanes[Math.min(lanes.length - 1, Math.max(0, lanes.indexOf(from.lane) + down))];
      let next = from;
      if (down) next = lane.bars.find((bar) => bar[STOP] > from[BEGIN]) || lane.bars[lane.bars.length - 1];
      else if (chosen) next = lane.bars[lane.bars.indexOf(from) + sideways] || from;
      const span = view[1] - view[0];
      if (next[BEGIN] < view[0] || next[STOP] > view[1]) look((next[BEGIN] + next[STOP] - span) / 2, span);
      const [x, top, w] = box(next);
      choose(next, Math.max(GUTTER, x + w / 2), top, true);
    }
    const centre = () => (view[0] + view[1]) / 2;
    const keys = {
      "+": () => zoom(0.6, chosen ? chosen[BEGIN] : centre()), "-": () => zoom(1 / 0.6, centre()), "0": () => look(0, end),
      ArrowLeft: (event) => (event.shiftKey ? slide(-plot() / 5) : walk(-1, 0)),
      ArrowRight: (event) => (event.shiftKey ? slide(plot() / 5) : walk(1, 0)),
      ArrowUp: () => walk(0, -1), ArrowDown: () => walk(0, 1), Escape: () => choose(null),
    };
    canvas.addEventListener("keydown", (event) => {
      if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
      keys[event.key](event);
      event.preventDefault();
    });
    for (const button of root.querySelectorAll("button")) button.addEventListener("click", () => keys[button.value]());

    new ResizeObserver(redraw).observe(root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    // Paper is white: the canvas is drawn once more in the light colours before it is printed.
    for (const name of ["beforeprint", "afterprint"]) {
      addEventListener(name, () => {
        document.documentElement.classList.toggle("paper", name === "beforeprint");
        draw();
      });
    }
    draw();
    root.dataset.bars = bars.length;
  }
})();
